"""Errors that speak to people: one line that says what is wrong, where, and what would be right."""


class PhoenixError(Exception):
    """Bad input. The command line prints the message and exits with `exit_code`."""

    exit_code = 2


class CheckFailed(PhoenixError):
    """A check on a model or a mask did not hold."""

    exit_code = 1
