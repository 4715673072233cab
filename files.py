"""What the commands read and write: whole files, or none at all; and tables that read well in a terminal too."""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows: there, two processes are not kept apart.
    fcntl = None  # type: ignore[assignment]


LARGEST = 256 * 2**20  # Bytes of a file that is read as a whole.


def content_of(path, what, most=LARGEST):
    """The bytes of a file that is given; raises UserError, naming it, for what is none, and what is too large."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{what} {str(path)!r} is not a file")
        if (size := os.path.getsize(path)) > most:
            raise UserError(f"{what} {str(path)!r} is too large ({size / 2**20:.0f} MB, at most {most / 2**20:.0f})")
        return Path(path).read_bytes()
    except (OSError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{what} {str(path)!r} cannot be read ({getattr(e, 'strerror', None) or e})") from e


@contextlib.contextmanager
def atomic_path(path):
    """Give a temporary name beside `path`; move it into place at the end, or remove it after an error.

    The name is always the same, so what a killed process left there is overwritten and moved by the next; a process
    that is to write the same file at the same time waits. Raises UserError, naming the path, when it cannot be
    written, on a full disk for one.
    """
    path = _no_device(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with _one_writer(tmp):
            try:
                yield tmp
                os.replace(tmp, path)
            except BaseException:  # Not after success: then the name may be the next writer's.
                tmp.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise UserError(f"{str(path)!r} cannot be written ({e.strerror or e})") from e


@contextlib.contextmanager
def _one_writer(tmp):
    """Create the file `tmp` and keep other processes from it."""
    if fcntl is None:
        yield
        return
    while True:
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            _lock(fd, wait=True)
            if _is_at(fd, tmp):  # Else its last writer moved or removed it while we waited.
                yield
                return
        finally:
            os.close(fd)


def _is_at(fd, path):
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(fd, wait):
    """Lock an open file or folder until it is closed; raises BlockingIOError if another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # A file system without locks.


@contextlib.contextmanager
def sole_use(folder):
    """Keep a folder to this process; raises UserError if another one writes there."""
    if fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        _lock(fd, wait=False)
    except BlockingIOError as e:
        os.close(fd)
        raise UserError(
            f"output folder {str(folder)!r} is in use by another run; wait for it, or choose another one"
        ) from e
    try:
        yield
    finally:
        os.close(fd)


def output_folder(path, what="output folder", remedy="choose another one"):
    """Make the folder `path` and return it; raises UserError, naming the path, when it cannot be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        try:
            probe.write_bytes(bytes(2**20))  # A disk that is full now will be so after the work.
        finally:
            probe.unlink(missing_ok=True)
    except OSError as e:
        reason = "it is a file" if isinstance(e, FileExistsError) else e.strerror
        raise UserError(f"{what} {str(path)!r} cannot be written to ({reason}); {remedy}") from e
    return path


def output_file(path):
    """Return the path of a file to be written, in a folder that is made; raises UserError when that cannot be."""
    path = _no_device(path)
    output_folder(path.parent)
    return path


def _no_device(path):
    path = Path(path)
    with contextlib.suppress(OSError):  # Which is told when it is opened.
        if path.exists() and not path.is_file():  # What moves there would take the place of /dev/null.
            raise UserError(f"{str(path)!r} is a folder or a device; name the file to write")
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


def printed(head, body):
    """The table for standard output: as `aligned`, but for a terminal that is too narrow, where cells take lines."""
    text, width = aligned(head, body), shutil.get_terminal_size().columns
    if sys.stdout is None or not sys.stdout.isatty() or text.index("\n") <= width:
        return text
    from rich import box, console, table

    wrapped = table.Table(box=box.ASCII2, show_lines=True, padding=0)
    for i, title in enumerate(head):
        wrapped.add_column(title, justify="right" if i else "left", overflow="fold")
    for row in body:
        wrapped.add_row(*map(str, row))
    screen = console.Console(file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False)
    screen.print(wrapped)
    return screen.file.getvalue().rstrip("\n")
