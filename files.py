"""What the commands write: files that appear whole or not at all, and tables that read well in a terminal too."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path):
    """Give a temporary name beside `path`; move it into place at the end, or remove it after an error.

    The name is always the same, so what a killed process left there is overwritten and moved by the next.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def output_folder(path):
    """Make the folder `path` and return it; raises OSError, naming the path, when it cannot be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise OSError(f"output folder {str(path)!r} cannot be written to ({e.strerror}); choose another one") from e
    return path


def aligned(head, body):
    """A Markdown table padded to its widest cells, the first column left and the others right."""
    head, *body = (list(map(str, row)) for row in [head, *body])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells):
        first, *rest = cells
        return "| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |"
    return "\n".join([line(head), rule, *map(line, body)])
