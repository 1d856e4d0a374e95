"""The errors that users see: one line that names the thing, the place and the remedy."""


class CrowError(Exception):
    """Something failed while running; the command line exits with 1."""

    exit_code = 1


class UsageError(CrowError, ValueError):
    """What was asked for cannot be done as asked; the command line exits with 2."""

    exit_code = 2
