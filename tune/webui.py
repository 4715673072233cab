"""Automatic1111, Forge and reForge as a backend, by their API and our accordion in it."""

import base64
import binascii
import concurrent.futures
import io
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from PIL import Image

from ..a1111.settings import BOTH_PASSES, CONDITIONAL_ONLY, CUSTOM, TITLE
from ..errors import UserError
from . import backends
from .backends import Refused, Rendered

TIMEOUT, SILENCE, ALONE, POLL = 30, 600, 120, 1.0  # Seconds, as in servers.py; between looks at the progress.
# What is rendered where no picture says otherwise; names as the API has them: (name in a picture's parameters, value).
DEFAULTS = {
    "negative_prompt": ("Negative prompt", ""),
    "steps": ("Steps", 20),
    "sampler_name": ("Sampler", "DPM++ 2M"),
    "scheduler": ("Schedule type", "Karras"),
    "cfg_scale": ("CFG scale", 7.0),
    "width": ("Size-1", 512),
    "height": ("Size-2", 512),
}


class Gone(Exception):
    """The web UI does not answer, or not as one does."""


class WebUI:
    """A backend: what the web UI at `url` has loaded, with the parameters of a picture that it saved, or DEFAULTS.

    Nobody tells the schedule, so the cost is seconds. Raises UserError when it does not answer, has no API or not our
    extension, or the picture has no parameters.
    """

    host, prompts, sigmas, workers = "A1111", None, None, 1

    def __init__(self, url, picture=None):
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--a1111 {url!r} is not an address; give one like http://127.0.0.1:7860")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        try:
            scripts = self._get("/sdapi/v1/scripts")["txt2img"]
            checkpoint = self._get("/sdapi/v1/options").get("sd_model_checkpoint")
        except (Gone, Refused, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"--a1111 {self.url}: no web UI with an API there ({e}); start it with --api, or give another address"
            ) from e
        if TITLE.lower() not in map(str.lower, scripts):
            raise UserError(
                f"--a1111 {self.url} lacks the extension {TITLE}: install it with the address of this repository, and "
                "restart"
            )
        self.parameters = {key: value for key, (_, value) in DEFAULTS.items()}
        if picture is not None:
            self.parameters |= self._read(picture)
        self.weight = float(self.parameters["cfg_scale"])
        if self.weight <= 1:
            raise UserError(
                f"the picture {str(picture)!r} has CFG scale {self.weight:g}: there is no guidance to limit"
            )
        self.source = self.url if picture is None else Path(picture).name
        self.identity = {"checkpoint": checkpoint, "parameters": self.parameters}
        self.warm = False

    def _read(self, picture):
        """The parameters in a picture, as the web UI itself reads them."""
        try:
            content = Path(picture).read_bytes()
        except OSError as e:
            raise UserError(f"picture {str(picture)!r} cannot be read ({e.strerror})") from e
        encoded = "data:image/png;base64," + base64.b64encode(content).decode()
        try:
            found = self._post("/sdapi/v1/png-info", {"image": encoded}, TIMEOUT).get("parameters") or {}
        except (Gone, Refused) as e:
            raise UserError(f"picture {str(picture)!r} cannot be read by {self.url} ({e})") from e
        if "Steps" not in found:
            raise UserError(
                f"picture {str(picture)!r} holds no parameters: give a PNG that the web UI saved, or none for "
                f"{DEFAULTS['steps'][1]} steps of {DEFAULTS['sampler_name'][1]}"
            )
        kept = {k: type(value)(found[name]) for k, (name, value) in DEFAULTS.items() if found.get(name) is not None}
        if "Schedule type" not in found:
            kept["scheduler"] = "Automatic"
        return kept

    def render(self, jobs):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for i, job in enumerate(jobs):
                yield i, self._render(pool, job)

    def _render(self, pool, job):
        """One image; a web UI that goes away is waited for, a while."""
        away, said = time.monotonic(), False
        while True:
            try:
                begin = time.monotonic()
                answer = self._await(pool.submit(self._post, "/sdapi/v1/txt2img", self.payload(job), None))
                seconds, self.warm = (time.monotonic() - begin if self.warm else None), True
                return Rendered(self._image(answer), None, seconds)
            except Gone as e:
                if time.monotonic() - away > ALONE:
                    raise UserError(
                        f"--a1111 {self.url} does not answer any more ({e}); what is done is kept: start it and run "
                        "the command again"
                    ) from e
                if not said:
                    print(f"{self.url} is waited for: {e}", file=sys.stderr)
                said = True
                time.sleep(POLL)

    def _await(self, answer):
        """The result of a request, while its progress tells that it goes on."""
        seen, since = None, time.monotonic()
        while not answer.done():
            concurrent.futures.wait([answer], timeout=POLL)
            if answer.done():
                break
            try:
                told = self._get("/sdapi/v1/progress?skip_current_image=true")
                now = told.get("progress"), (told.get("state") or {}).get("sampling_step")
            except (Gone, Refused):
                continue  # The request itself will tell.
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > SILENCE:
                raise UserError(
                    f"--a1111 {self.url} has made no progress for {SILENCE} s; what is done is kept: restart it and "
                    "run the command again"
                )
        return answer.result()

    def payload(self, job):
        """The request for one image."""
        setting = job.setting
        if setting.conditional_only:
            args = [True, CONDITIONAL_ONLY, 0.0, 0.0, BOTH_PASSES]
        else:
            hi = setting.sigma_hi if setting.sigma_hi < float("inf") else 0.0  # 0: no upper limit.
            args = [True, CUSTOM, setting.sigma_lo, hi, BOTH_PASSES]
        weight = self.weight if setting.conditional_only else setting.weight
        return {
            **self.parameters,
            "cfg_scale": weight,
            "prompt": job.prompt,
            "seed": job.seed,
            "batch_size": 1,
            "n_iter": 1,
            "save_images": False,
            "send_images": True,
            "alwayson_scripts": {TITLE: {"args": args}},
        }

    def _image(self, answer):
        try:
            content = base64.b64decode(answer["images"][0].rpartition(",")[2])
            return Image.open(io.BytesIO(content)).convert("RGB")
        except (KeyError, IndexError, TypeError, AttributeError, binascii.Error, OSError, SyntaxError) as e:
            raise Refused(f"{self.url} gave no image") from e

    def _get(self, path):
        return self._open(path, None, TIMEOUT)

    def _post(self, path, body, timeout):
        return self._open(path, json.dumps(body).encode(), timeout)

    def _open(self, path, data, timeout):
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            try:
                told = json.loads(e.read())
            except (OSError, ValueError):
                told = {}
            if e.code in (422, 500) and isinstance(told, dict) and told:
                raise Refused(_words(told)) from e
            raise Gone(f"{path} answers {e.code} {e.reason}") from e
        except Exception as e:  # Of urllib, http.client, json.
            raise Gone(f"it does not answer ({getattr(e, 'reason', None) or e})") from e

    def describe(self):
        told = ", ".join(f"{k} {v}" for k, v in self.parameters.items() if v != "")
        return [f"web UI: {self.url}, {self.identity['checkpoint']}", f"  {told}"]

    paste = staticmethod(backends.paste)

    def close(self):
        """The web UI goes on."""


def _words(told):
    """An error of the web UI, as it says it: {"error", "detail", "errors"}."""
    detail = told.get("detail")
    parts = [told.get("error"), detail if isinstance(detail, str) else json.dumps(detail) if detail else "",
             told.get("errors")]  # fmt: skip
    return ": ".join(str(p) for p in parts if p) or json.dumps(told)
