"""Errors that a person can fix: told in one line. Any other exception is a bug, and keeps its traceback."""

import contextlib
import re
import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_SECRET = re.compile(r"(?<=://)(?:[^/@:]*:.*|[^/@]+)@")  # Name and password of an address, whatever is in them.
MOST = 1000  # Characters of an error that is told.


def quoted(value):
    """A value as an error quotes it: 80 characters at most, with what a terminal would obey spelled out."""
    return _short.repr(value)


def told(error, given=()):
    """An error as a terminal may show it: on one line and not too long.

    given: what a person typed. Where the error repeats it, what is long is shortened, and the passwords of addresses
    are left out.
    """
    text = str(error)
    for value in [part for typed in given for part in (typed, typed.partition("=")[2])]:
        for secret in _SECRET.findall(value):
            text, value = text.replace(secret, ""), value.replace(secret, "")
        if len(value) > _short.maxstring:
            text = text.replace(repr(value), quoted(value)).replace(value, quoted(value)[1:-1])
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MOST else f"{text[: MOST - 200]} ... {text[-195:]}"


class UserError(ValueError):
    """Something given, or the machine, is not right. The message names it, its value and what would be right."""


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
    return _SECRET.sub("…@", plain(url))
