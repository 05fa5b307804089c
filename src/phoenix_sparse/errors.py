"""Errors that speak to people: one line that says what is wrong, where, and what would be right."""


class PhoenixError(Exception):
    """Bad input. The command line prints the message and exits with `exit_code`."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of a library's message, short enough to stand in ours."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else text[:197] + "..."


class Exhausted(PhoenixError):
    """The memory is full: not bad input, since at another time, or without others beside, it may suffice."""

    exit_code = 1


class CheckFailed(PhoenixError):
    """A check on a model or a mask did not hold."""

    exit_code = 1
