"""The images of a study in its output folder: what is there is not rendered again, after whatever stopped it."""

import json
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..files import atomic_path
from .servers.backend import Rendered

KEY = "guidance_interval_tune"


class Images:
    """`SETTING/PROMPT-SEED.png`, each with what it is of and what it cost in its text.

    identity: of the backend. What is of another one is not taken, whatever else is alike.
    """

    def __init__(self, path, identity=None):
        self.path, self.identity = Path(path), json.loads(json.dumps(identity or {}))

    def file(self, setting, at):
        return self.path / setting.folder / f"{at[0]}-{at[1]}.png"

    def get(self, at, job):
        """The Rendered of a job, or None if there is none, or it is of another job or damaged."""
        try:
            with Image.open(self.file(job.setting, at)) as image:
                told = json.loads(image.text[KEY])
                if told["of"] != self._of(job):
                    return None
                return Rendered(image.convert("RGB"), told["rows"], told["seconds"])
        except (OSError, KeyError, ValueError, AttributeError, SyntaxError):
            return None

    def put(self, at, job, rendered):
        file, info = self.file(job.setting, at), PngImagePlugin.PngInfo()
        info.add_text(KEY, json.dumps({"of": self._of(job), "rows": rendered.rows, "seconds": rendered.seconds}))
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as tmp:
            rendered.image.convert("RGB").save(tmp, "PNG", pnginfo=info)
        return rendered

    def _of(self, job):
        return [job.setting.folder, job.prompt, job.seed, self.identity]
