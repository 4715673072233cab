"""Errors that a person can put right: told in one line. Any other exception is a bug, and keeps its traceback."""

import contextlib
import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def quoted(value):
    """A value as an error quotes it: 80 characters at most, with what a terminal would obey spelled out."""
    return _short.repr(value)


class UserError(ValueError):
    """What was given, or the machine, does not do. The message names it, its value and what would be right."""


@contextlib.contextmanager
def user_input():
    """Where what a person gave is judged: the library's ValueError and TypeError become a UserError."""
    try:
        yield
    except (ValueError, TypeError) as e:
        raise e if isinstance(e, UserError) else UserError(str(e)) from e
