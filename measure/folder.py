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
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import atomic_path, output_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMAT = "guidance-interval-rows/1"
BATCH = 32
SAVE_EVERY = 30.0  # Seconds, or 20 times what it takes.


class Rows:
    """Rows [N, width] of float32 by key, in a safetensors file; `identity` says what computed them."""

    def __init__(self, path, identity):
        self.path, self.identity = Path(path), identity
        self.files, self._where, self._parts = {}, {}, []
        self._changed = False
        if self.path.exists():
            self._read()

    def _read(self):
        try:
            with safe_open(self.path, framework="pt") as f:
                metadata, rows = f.metadata() or {}, f.get_tensor("rows").clone()  # The file will be replaced.
            known = [metadata.get("format"), metadata.get("identity")]
            keys, files = json.loads(metadata["keys"]), json.loads(metadata["files"])
            if len(keys) != len(rows):
                raise ValueError(f"{len(keys)} keys for {len(rows)} rows")
        except Exception as e:  # Of whatever kind: the images are still there.
            _note(f"{self.path} cannot be read ({str(e).splitlines()[0]}); computing it anew")
            return
        if known != [FORMAT, self.identity]:
            _note(f"{self.path} was computed by {known[1]}, not by {self.identity}; computing it anew")
            return
        self.files, self._where, self._parts = files, {key: i for i, key in enumerate(keys)}, [rows]

    def __contains__(self, key):
        return key in self._where

    def add(self, keys, rows):
        new = []
        for i, key in enumerate(keys):
            if key not in self._where:  # Two files may have one content.
                self._where[key] = len(self._where)
                new.append(i)
        if new:
            self._parts.append(rows[new])
            self._changed = True

    def saw(self, name, stat):
        self.files[name], self._changed = stat, True

    def get(self, keys):
        """Rows of `keys`, float32 [len(keys), width]."""
        self._parts = [torch.cat(self._parts)]
        return self._parts[0][[self._where[key] for key in keys]]

    def keep(self, keys, files=None):
        """Forget the rows of other keys, and remember `files`, {name: [size, time, key]}."""
        keys = list(dict.fromkeys(keys))
        if list(self._where) != keys:
            self._parts, self._where = [self.get(keys)], {key: i for i, key in enumerate(keys)}
            self._changed = True
        if files is not None and files != self.files:
            self.files, self._changed = files, True

    def save(self):
        if not self._changed or not self._parts:
            return
        self._parts = [torch.cat(self._parts)]
        metadata = dict(format=FORMAT, identity=self.identity)
        metadata |= {"keys": json.dumps(list(self._where)), "files": json.dumps(self.files)}
        with atomic_path(self.path) as tmp:
            tmp.touch()
            mode = tmp.stat().st_mode  # safetensors closes its files to others, who may share a reference.
            save_file({"rows": self._parts[0].contiguous()}, tmp, metadata)
            tmp.chmod(mode)
        self._changed = False


class Folder:
    """The images of a folder and of those in it; `names` and `keys` are those that could be read, sorted by name.

    Raises ValueError when there is no such folder, OSError when its caches can't be written; `unreadable` lists
    (name, reason).
    """

    def __init__(self, path, cache=None):
        self.path = Path(os.path.abspath(path))
        if not self.path.is_dir():
            raise ValueError(
                f"{str(path)!r} is {'a file' if self.path.exists() else 'not there'}; give a folder of images"
            )
        where = self.path.parent if cache is None else Path(cache)
        try:
            output_folder(where)
        except OSError as e:
            raise OSError(
                f"features of {str(path)!r} cannot be kept in {str(where)!r} ({e.__cause__.strerror}); "
                "choose another folder with --cache"
            ) from e
        # Two folders of one name may share a cache that was chosen for both.
        tag = "" if cache is None else "-" + hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        self._cache = str(where / (self.path.name + tag))
        self.label, self.names, self.keys, self.unreadable = self.path.name, [], [], []
        self._rows = {}

    def __str__(self):
        return self.label

    def cache(self, kind):
        """The path beside the folder in which something of this kind is kept."""
        return Path(f"{self._cache}.{kind}")

    def rows(self, extractor):
        """Its rows of all readable images, float32 [N, width], as `compute` left them."""
        return self._rows[extractor.name].get(self.keys)

    def compute(self, pixels, extractors, bar):
        """Read what is new, in batches; memory holds the rows and a few batches. `bar` is a tqdm."""
        extractors = [pixels, *extractors]
        self._rows = {e.name: Rows(self.cache(f"{e.name}.safetensors"), e.identity) for e in extractors}
        index, found = self._rows[pixels.name], list(_scan(self.path))
        known = {name: f[2] for name, *stat in found if (f := index.files.get(name)) and f[:2] == stat}
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
                    if len(waiting[e.name]) >= BATCH:
                        self._flush(e, waiting)
                bar.update()
                if time.monotonic() > due:
                    begin = time.monotonic()
                    self._save()
                    due = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - begin))
            for e in extractors:
                self._flush(e, waiting)
            self.names = [name for name, *_ in found if name in keys]
            self.keys = [keys[name] for name in self.names]
            stats = {name: [size, changed, keys[name]] for name, size, changed in found if name in keys}
            for rows in self._rows.values():
                rows.keep(self.keys, stats if rows is index else None)
        finally:  # Whatever stops it, what is done is kept.
            self._save()

    def _flush(self, extractor, waiting):
        if waiting[extractor.name]:
            keys, tensors = zip(*waiting[extractor.name], strict=True)
            self._rows[extractor.name].add(keys, extractor.rows(list(tensors)))
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
            with Image.open(io.BytesIO(content)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode}; convert it to 8 bits per channel")
                image = image.convert("RGB")
            return file, key, {e.name: e.preprocess(image) for e in missing}, None
        except Exception as e:  # Pillow has errors of many kinds; none of them is to end a run.
            return file, None, {}, (str(e).splitlines() or [type(e).__name__])[0].replace(f"{self.path}{os.sep}", "")


def _scan(folder):
    """Yield (name, size, time of change) of every image, by name, hidden ones left out."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                full = os.path.join(path, file)
                with contextlib.suppress(OSError):  # Gone since, or a link to nowhere.
                    stat = os.stat(full)
                    found.append((os.path.relpath(full, folder).replace(os.sep, "/"), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _read_ahead(read, todo, extractors):
    """Yield read(file, extractors) of each file in order, from threads that are a few files ahead."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        try:
            for file in todo:
                ahead.append(pool.submit(read, file, extractors))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _note(text):
    print(f"note: {text}", file=sys.stderr)
