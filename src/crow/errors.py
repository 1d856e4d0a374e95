"""The errors that users see: one line that names the thing, the place and the remedy."""

_LONGEST = 2000


class CrowError(Exception):
    """Something failed while running; the command line exits with 1."""

    exit_code = 1

    def __str__(self) -> str:
        # What is quoted may hold line breaks, escape sequences, or a whole file
        return "".join(c if c.isprintable() else " " for c in super().__str__()[:_LONGEST])


class UsageError(CrowError, ValueError):
    """What was asked for cannot be done as asked; the command line exits with 2."""

    exit_code = 2
