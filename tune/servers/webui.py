"""Automatic1111, Forge and reForge as a backend, by their API and our accordion in it."""

import base64
import concurrent.futures
import contextlib
import json
import math
import sys
import time
from pathlib import Path

from ...errors import UserError, plain
from ...files import content_of
from ...interval_text import BOTH_PASSES, CONDITIONAL_ONLY, CUSTOM, TITLE
from .backend import Refused, Rendered, paste
from .client import ALONE, FAILURES, SILENCE, Client, Gone, read_image

POLL = 1.0  # Seconds between looks at the progress, and until it is asked again.
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


class WebUI:
    """A backend: what the web UI at `url` has loaded, with the parameters of a picture that it saved, or DEFAULTS.

    Nobody tells the schedule, so the cost is seconds. Raises UserError when it does not answer, has no API or not our
    extension, or the picture has no parameters.
    """

    host, prompts, sigmas, workers = "A1111", None, None, 1

    def __init__(self, url, picture=None, limits=None):
        self.client = Client("--a1111", url, "http://127.0.0.1:7860", _refusal, limits)
        try:
            self._set_up(picture)
        except BaseException:
            self.close()
            raise

    def _set_up(self, picture):
        try:
            scripts = self._get("/sdapi/v1/scripts", lambda told: [name.lower() for name in told["txt2img"]])
            checkpoint = self._get("/sdapi/v1/options", lambda told: told.get("sd_model_checkpoint"))
        except (Gone, Refused) as e:
            raise UserError(
                f"--a1111 {self.client}: no web UI with an API there ({e}); start it with --api, or give another "
                "address"
            ) from e
        if TITLE.lower() not in scripts:
            raise UserError(
                f"--a1111 {self.client} lacks the extension {TITLE}: install it with the address of this repository, "
                "and restart"
            )
        self.parameters = {key: value for key, (_, value) in DEFAULTS.items()}
        if picture is not None:
            self.parameters |= self._read(picture)
        self.weight = self.parameters["cfg_scale"]
        if not 1 < self.weight <= 1000:
            why = "there is no guidance to limit" if self.weight <= 1 else "no web UI takes more than 1000"
            raise UserError(f"the picture {str(picture)!r} has CFG scale {self.weight:g}: {why}")
        self.source = str(self.client) if picture is None else Path(picture).name
        self.identity = {"checkpoint": checkpoint, "parameters": self.parameters}
        self.warm = False

    def _read(self, picture):
        """The parameters in a picture, as the web UI itself reads them."""
        content = content_of(picture, "picture")
        encoded = "data:image/png;base64," + base64.b64encode(content).decode()
        path = "/sdapi/v1/png-info"
        try:
            answer = self.client.post(path, {"image": encoded})
            found = self.client.read(path, answer, lambda told: dict(told.get("parameters") or {}))
        except (Gone, Refused) as e:
            raise UserError(f"picture {str(picture)!r} cannot be read by {self.client} ({e})") from e
        if "Steps" not in found:
            raise UserError(
                f"picture {str(picture)!r} holds no parameters: give a PNG that the web UI saved, or none for "
                f"{DEFAULTS['steps'][1]} steps of {DEFAULTS['sampler_name'][1]}"
            )
        try:
            kept = {k: type(value)(found[name]) for k, (name, value) in DEFAULTS.items() if found.get(name) is not None}
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(f"picture {str(picture)!r} holds invalid parameters ({plain(e, 100)})") from e
        if "Schedule type" not in found:
            kept["scheduler"] = "Automatic"
        return kept

    def render(self, jobs):
        for i, job in enumerate(jobs):
            yield i, self._render(job)

    def _render(self, job):
        """One image; a web UI that goes away is waited for, a while, and one that only fails is not."""
        away, failures = None, 0
        while True:
            try:
                begin = time.monotonic()
                image = self._image(job)
                seconds, self.warm = (time.monotonic() - begin if self.warm else None), True
                return Rendered(image, None, seconds)
            except Gone as e:
                if away is None:
                    print(f"{self.client} is waited for: {e}", file=sys.stderr)
                away = away or time.monotonic()
                failures += self._is_there()
                if failures >= FAILURES or time.monotonic() - away > ALONE:
                    gone = f"failed {failures} times" if failures >= FAILURES else "does not answer any more"
                    raise UserError(
                        f"--a1111 {self.client} {gone} ({e}); what is done is kept: start it and run the command again"
                    ) from e
                time.sleep(POLL)

    def _is_there(self):
        with contextlib.suppress(Gone, Refused):
            self.client.get("/sdapi/v1/progress", skip_current_image="true")
            return True
        return False

    def _image(self, job):
        path = "/sdapi/v1/txt2img"
        future = self.client.start_post(path, self.payload(job))
        self._await(future)
        answer = self.client.answer_of(path, future)
        content = self.client.read(path, answer, lambda told: base64.b64decode(told["images"][0].rpartition(",")[2]))
        try:
            return read_image(content, self.client.limits)
        except ValueError as e:
            raise Refused(f"{self.client} gave no image to use ({e})") from e

    def _await(self, future):
        """Wait for a request, while its progress tells that it goes on."""
        seen, since = None, time.monotonic()
        while not concurrent.futures.wait([future], timeout=POLL).done:
            with contextlib.suppress(Gone, Refused):  # The request itself will tell.
                now = self._get(
                    "/sdapi/v1/progress",
                    lambda told: (told.get("progress"), (told.get("state") or {}).get("sampling_step")),
                    skip_current_image="true",
                )
                if now != seen:
                    seen, since = now, time.monotonic()
            if time.monotonic() - since > SILENCE:
                raise UserError(
                    f"--a1111 {self.client} has made no progress for {SILENCE} s; what is done is kept: restart it and "
                    "run the command again"
                )

    def _get(self, path, how, **query):
        return self.client.read(path, self.client.get(path, **query), how)

    def payload(self, job):
        """The request for one image."""
        setting = job.setting
        if setting.conditional_only:
            args = [True, CONDITIONAL_ONLY, 0.0, 0.0, BOTH_PASSES]
        else:
            hi = setting.sigma_hi if setting.sigma_hi < math.inf else 0.0  # 0: no upper limit.
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

    def describe(self):
        told = ", ".join(f"{k} {v}" for k, v in self.parameters.items() if v != "")
        return [f"web UI: {self.client}, {self.identity['checkpoint']}", f"  {told}"]

    paste = staticmethod(paste)

    def close(self):
        """The web UI goes on."""
        self.client.close()


def _refusal(status, told):
    """An error of the web UI, {"error", "detail", "errors"}, as it says it, or None if it is no such answer."""
    if status not in (422, 500) or not isinstance(told, dict) or not told:
        return None
    detail = told.get("detail")
    parts = [told.get("error"), detail if isinstance(detail, str) else json.dumps(detail) if detail else "",
             told.get("errors")]  # fmt: skip
    return ": ".join(str(p) for p in parts if p) or json.dumps(told)
