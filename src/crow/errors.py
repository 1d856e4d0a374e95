"""The errors that users see: one line that names the thing, the place and the remedy."""

_LONGEST = 2000


def printable(text: str) -> str:
    """The text on one line, without characters that do something to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


class CrowError(Exception):
    """Something failed while running; the command line exits with 1."""

    exit_code = 1

    def __str__(self) -> str:
        # What is quoted may hold line breaks, escape sequences, or a whole file; behind it stands what to do
        text = super().__str__()
        whole = len(text) <= _LONGEST
        return printable(text if whole else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}")


class UsageError(CrowError, ValueError):
    """What was asked for cannot be done as asked; the command line exits with 2."""

    exit_code = 2


class Unfit(UsageError):
    """A defense, or a reference, that does not fit this suspect, however often it is tried."""
