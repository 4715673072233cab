"""Errors that a person can put right: told in one line. Any other exception is a bug, and keeps its traceback."""

import contextlib
import re


class UserError(ValueError):
    """What was given, or the machine, does not do. The message names it, its value and what would be right."""


@contextlib.contextmanager
def user_input():
    """Where what a person gave is judged: the library's ValueError and TypeError become a UserError."""
    try:
        yield
    except (ValueError, TypeError) as e:
        raise e if isinstance(e, UserError) else UserError(str(e)) from e


def plain(text, most=500):
    """What a file or another machine says, fit for a line of a terminal: nothing that controls it, and no more than
    `most`: of what is longer the beginning and, where errors tell the value, the end.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}"
    return "".join(c if c.isprintable() else " " for c in text).rstrip()


def without_password(url):
    """A URL as it may be shown."""
    return re.sub(r"(?<=://)[^/@]*:[^/@]*@", "…@", plain(url))
