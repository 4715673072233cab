"""A folder of images, and what is known of them: rows of features, kept beside it by content.

`DIR.<features>.safetensors` holds one row for each different image, by the SHA-256 of its file. The size and the
time of change of each file, which spare reading it again, are in the metadata of the one for "pixels". A cache is
never a reason to fail: one that is corrupt or of other weights is computed anew.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
import struct
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import UserError
from ..files import atomic_path, output_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMAT = "guidance-interval-rows/2"  # 2: images are turned as their EXIF orientation says.
BATCH = 32
DECODED = 2**26  # Pixels that are decoded at once; an image alone may have more.
AHEAD = 2**27  # Bytes of tensors that wait for their turn, and as many for their batch.
SAVE_EVERY = 30.0  # Seconds, or 20 times what it takes.
# What Pillow raises for broken files, found by breaking files of every format.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, struct.error)
UNREADABLE += (Image.DecompressionBombError, Image.DecompressionBombWarning)
CORRUPT = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)  # What a damaged cache raises.


class Rows:
    """Rows [N, width] of float32 by key, in a safetensors file; `identity` says what computed them."""

    def __init__(self, path, identity, width):
        self.path, self.identity, self.width = Path(path), identity, width
        self.files, self._where, self._rows = {}, {}, torch.empty(0, width)  # There may be room for more at the end.
        self._changed = self._mapped = False
        if self.path.exists():
            self._read()

    def _read(self):
        try:
            with safe_open(self.path, framework="pt") as f:
                metadata, rows = f.metadata() or {}, f.get_tensor("rows")  # Mapped, not read.
            known = metadata.get("format"), metadata.get("identity")
            if known != (FORMAT, self.identity):
                _note(f"{self.path} was computed by {known[1]}, {known[0]}; computing it anew by {self.identity}")
                return
            keys, files = json.loads(metadata["keys"]), json.loads(metadata["files"])
            where = {key: i for i, key in enumerate(keys)}
            if rows.dtype != torch.float32 or rows.shape != (len(where), self.width) or len(where) < len(keys):
                raise ValueError(f"{len(keys)} keys for {rows.dtype} {list(rows.shape)}")
            if len(rows) and not all(bound.isfinite() for bound in rows.aminmax()):
                raise ValueError("it holds NaN or infinity")
            if not all(
                isinstance(size + changed, int) and isinstance(key, str) for size, changed, key in files.values()
            ):
                raise ValueError("its list of files does not fit")
        except CORRUPT as e:
            _note(f"{self.path} cannot be read ({first_line(e)}); computing it anew")
            return
        self.files, self._where, self._rows, self._mapped = files, where, rows, True

    def __contains__(self, key):
        return key in self._where

    def make_room(self, num):
        """For `num` more rows, so that adding them copies nothing; until then it takes no memory."""
        rows, known = torch.empty(len(self._where) + num, self.width), len(self._where)
        rows[:known] = self._rows[:known]
        self._rows, self._mapped = rows, False

    def add(self, keys, rows):
        """Rows [len(keys), width], except those of keys that are there: two files may have one content."""
        new = [i for i, key in enumerate(keys) if key not in self._where and key not in keys[:i]]
        start, end = len(self._where), len(self._where) + len(new)
        if end > len(self._rows):
            self.make_room(max(len(new), start))
        if new:
            self._rows[start:end] = rows[new]
            self._where.update(zip([keys[i] for i in new], range(start, end), strict=True))
            self._changed = True

    def saw(self, name, stat):
        self.files[name], self._changed = stat, True

    def get(self, keys):
        """Rows of `keys`, float32 [len(keys), width], not to be changed: a copy only where the order is another one."""
        index = [self._where[key] for key in keys]
        rows = self._rows[: len(self._where)]
        return rows if index == list(range(len(rows))) else rows[index]

    def keep(self, keys, files=None):
        """Forget the rows of other keys, and remember `files`, {name: [size, time, key]}."""
        keys = list(dict.fromkeys(keys))
        if list(self._where) != keys:
            self._rows, self._where = self.get(keys), {key: i for i, key in enumerate(keys)}
            self._changed, self._mapped = True, False
        if files is not None and files != self.files:
            self.files, self._changed = files, True

    def save(self):
        if not self._changed:
            return
        if self._mapped:  # Windows replaces no file that is mapped.
            self._rows, self._mapped = self._rows.clone(), False
        metadata = dict(format=FORMAT, identity=self.identity)
        metadata |= {"keys": json.dumps(list(self._where)), "files": json.dumps(self.files)}
        save_tensors({"rows": self._rows[: len(self._where)]}, self.path, metadata)
        self._changed = False


def save_tensors(tensors, path, metadata):
    """Write a safetensors file, whole or not at all; raises UserError, naming the path, when it cannot be written."""
    with atomic_path(path) as tmp:
        tmp.touch()
        mode = tmp.stat().st_mode  # safetensors closes its files to others, who may share a reference.
        try:
            save_file(tensors, tmp, metadata)
        except SafetensorError as e:  # Its own kind, for a full disk too.
            raise OSError(first_line(e)) from e
        tmp.chmod(mode)


class Folder:
    """The images of a folder and of those in it; `names` and `keys` are those that could be read, sorted by name.

    `files` are all that look like images, before any is read; `unreadable` lists (name, reason). Raises UserError when
    there is no such folder, or its caches can't be written.
    """

    def __init__(self, path, cache=None):
        self.path = Path(os.path.abspath(path))
        if not os.path.isdir(self.path):  # Which is not, too, where a name is too long.
            raise UserError(
                f"{str(path)!r} is {'a file' if os.path.exists(self.path) else 'not there'}; give a folder of images"
            )
        where = self.path.parent if cache is None else Path(cache)
        try:
            output_folder(where)
        except UserError as e:
            raise UserError(
                f"features of {str(path)!r} cannot be kept in {str(where)!r} ({e.__cause__.strerror}); "
                "choose another folder with --cache"
            ) from e
        # Two folders of one name may share a cache that was chosen for both.
        tag = "" if cache is None else "-" + hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]
        self._cache = str(where / (self.path.name + tag))
        self.label, self.names, self.keys = self.path.name, [], []
        self._found, self.unreadable = _scan(self.path)
        self.files = [name for name, *_ in self._found]
        self._rows, self._statistics, self._decoding = {}, {}, _Share(DECODED)

    def __str__(self):
        return self.label

    def cache(self, kind):
        """The path beside the folder in which something of this kind is kept."""
        return Path(f"{self._cache}.{kind}")

    def rows(self, extractor):
        """Its rows of all readable images, float32 [N, width], as `compute` left them; not to be changed."""
        return self._rows[extractor.name].get(self.keys)

    def release(self, *extractors):
        """Forget the rows of these: they take most of the memory."""
        for extractor in extractors:
            self._rows.pop(extractor.name, None)

    def statistics(self, extractor, version, compute):
        """`compute()`, {name: tensor}, kept beside the folder as long as its images and the extractor are the same."""
        name, path = extractor.name, self.cache(f"{extractor.name}.statistics.safetensors")
        if name in self._statistics:
            return self._statistics[name]
        parts = [FORMAT, extractor.identity, version, self.keys]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        kept = None
        if path.exists():
            try:
                with safe_open(path, framework="pt") as f:
                    fits = (f.metadata() or {}).get("key") == key
                kept = load_file(path) if fits else None
            except CORRUPT as e:
                _note(f"{path} cannot be read ({first_line(e)}); computing it anew")
        if kept is None:
            kept = compute()
            save_tensors({k: v.contiguous() for k, v in kept.items()}, path, {"key": key})
        self._statistics[name] = kept
        return kept

    def compute(self, pixels, extractors, bar):
        """Read what is new, in batches; memory holds the rows and a few batches. `bar` is a tqdm.

        A network is loaded, and its files are judged, before the first image is read.
        """
        extractors = [pixels, *extractors]
        self._rows = {
            e.name: Rows(self.cache(f"{e.name}.safetensors"), e.identity, e.dim + len(e.classes)) for e in extractors
        }
        index, found = self._rows[pixels.name], self._found
        known = {name: f[2] for name, *stat in found if (f := index.files.get(name)) and f[:2] == stat}
        missing = {e.name: sum(known.get(f[0]) not in self._rows[e.name] for f in found) for e in extractors}
        for e in extractors:
            if missing[e.name]:
                e.load()
                self._rows[e.name].make_room(missing[e.name])
        todo = [f for f in found if any(known.get(f[0]) not in rows for rows in self._rows.values())]
        bar.total = len(found)
        bar.update(len(found) - len(todo))
        waiting = {e.name: [] for e in extractors}
        keys, due = dict(known), time.monotonic() + SAVE_EVERY
        try:
            for (name, size, changed), key, tensors, error in _read_ahead(self._read, todo, extractors):
                if error:
                    keys.pop(name, None)
                    self.unreadable.append((name, error))
                else:
                    keys[name] = key
                    index.saw(name, [size, changed, key])
                for e in extractors:
                    if e.name in tensors:
                        waiting[e.name].append((key, tensors[e.name]))
                    if len(waiting[e.name]) >= BATCH or sum(tensor.nbytes for _, tensor in waiting[e.name]) > AHEAD:
                        self._flush(e, waiting)
                bar.update()
                if time.monotonic() > due:
                    begin = time.monotonic()
                    self._save()
                    due = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - begin))
            for e in extractors:
                self._flush(e, waiting)
            self.names = [name for name in self.files if name in keys]
            self.keys = [keys[name] for name in self.names]
            stats = {name: [size, changed, keys[name]] for name, size, changed in found if name in keys}
            for rows in self._rows.values():
                rows.keep(self.keys, stats if rows is index else None)
        finally:  # Whatever stops it, what is done is kept.
            self._save()

    def _flush(self, extractor, waiting):
        if waiting[extractor.name]:
            keys, tensors = zip(*waiting[extractor.name], strict=True)
            rows = extractor.rows(list(tensors))
            if not rows.isfinite().all():
                raise UserError(
                    f"features {extractor.name}: the network gives NaN or infinity for images of {str(self.path)!r}; "
                    "are its weights intact?"
                )
            self._rows[extractor.name].add(keys, rows)
            waiting[extractor.name].clear()

    def _save(self):
        for rows in self._rows.values():
            rows.save()

    def _read(self, file, extractors):
        """One file: its key and, for each extractor that has no row of it, a tensor. Runs in a thread."""
        try:
            content = (self.path / file[0]).read_bytes()
            key = hashlib.sha256(content).hexdigest()
            missing = [e for e in extractors if key not in self._rows[e.name]]
            if not missing:
                return file, key, {}, None
            image = Image.open(io.BytesIO(content))
        except UNREADABLE as e:
            return file, None, {}, _reason(e)
        del content
        with self._decoding.of(image.width * image.height):
            try:
                image = decode(image)
            except UNREADABLE as e:
                return file, None, {}, _reason(e)
            return file, key, {e.name: e.preprocess(image) for e in missing}, None


def decode(image):
    """An image that was opened, in RGB and upright."""
    with image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}; convert it to 8 bits per channel")
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error):
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format, or damaged"  # Pillow would name a buffer of ours.
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than Pillow's limit of {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error):
    """The first line of an error, for a message of one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


class _Share:
    """Room for so much at once, shared by threads; what is larger is alone."""

    def __init__(self, total):
        self.total = self.free = total
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, amount):
        amount = min(amount, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= amount)
            self.free -= amount
        try:
            yield
        finally:
            with self.changed:
                self.free += amount
                self.changed.notify_all()


def _scan(folder):
    """Images by name, as (name, size, time of change), and (name, reason) of what is none; hidden ones are left out."""
    found, left_out = [], []

    def relative(path):
        return os.path.relpath(path, folder).replace(os.sep, "/")

    def unreadable(error):
        left_out.append((relative(error.filename), error.strerror))

    for path, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for full in (os.path.join(path, f) for f in folders):
            if os.path.islink(full):
                left_out.append((relative(full), "a link to a folder, which is not followed"))
        for full in (os.path.join(path, f) for f in files if not f.startswith(".") and f.lower().endswith(SUFFIXES)):
            try:
                info = os.stat(full)
            except OSError as e:  # Gone since, or a link to nowhere.
                unreadable(e)
                continue
            if stat.S_ISREG(info.st_mode):
                found.append((relative(full), info.st_size, info.st_mtime_ns))
            else:
                left_out.append((relative(full), "not a regular file"))  # A pipe would be waited for.
    return sorted(found), sorted(left_out)


def _read_ahead(read, todo, extractors):
    """Yield read(file, extractors) of each file in order, from threads that are a few files ahead."""
    workers = min(8, os.cpu_count() or 1)
    sizes = deque(maxlen=BATCH)  # Of what the last files became: as many of the largest may wait as AHEAD has room for.
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        ahead, room = deque(), 1
        try:
            for file in todo:
                while len(ahead) >= room:
                    done = ahead.popleft().result()
                    sizes.append(sum(tensor.nbytes for tensor in done[2].values()))
                    room = max(1, min(2 * workers, AHEAD // max(1, *sizes)))
                    yield done
                ahead.append(pool.submit(read, file, extractors))
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _note(text):
    print(f"note: {text}", file=sys.stderr)
