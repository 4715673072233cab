"""A backend and a judge without networks, and a search with them."""

import random

import numpy as np
import torch
from guidance_interval.measure.metrics import cmmd
from guidance_interval.tune import study
from guidance_interval.tune.objectives import SEEDS
from guidance_interval.tune.servers.backend import Refused, Rendered
from guidance_interval.tune.view import Quiet
from PIL import Image

PROMPTS = [f"prompt {i}" for i in range(20)]


class Painter:
    """A backend whose images are one colour: red is adherence, green and blue are drawn by the seed."""

    host, source, workers, weight, identity = "painter", "painter", 0, 4.0, {}
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1])

    def __init__(self, refuses=lambda setting: False, before=lambda job: None):
        self.jobs, self.refuses, self.before = [], refuses, before

    def render(self, jobs):
        for i, job in enumerate(jobs):
            self.before(job)
            if self.refuses(job.setting):
                raise Refused("CUDA out of memory")
            self.jobs.append(job)
            yield i, Rendered(self.paint(job), job.setting.rows(self.sigmas), 0.1)

    def paint(self, job):
        guided = job.setting.rows(self.sigmas) - len(self.sigmas)
        draw = random.Random(job.seed)
        red = 60 + 9 * guided * (job.setting.weight > 1) * min(job.setting.weight, 10) / 4 + draw.uniform(-5, 5)
        spread = 100 / max(1, guided)
        other = [128 + draw.uniform(-spread, spread) for _ in range(2)]
        return Image.new("RGB", (4, 4), tuple(round(min(255, max(0, v))) for v in (red, *other)))

    def describe(self):
        return ["a painter"]

    @staticmethod
    def paste(setting):
        return {"comfyui": {}, "a1111": ""}


class Eye:
    adherence, margin, digits, distance_name, identity = "red", 5.0, 1, "distance", "eye"

    def __init__(self, reference=None):
        self.reference = reference

    def check(self, prompts):
        pass

    look = check

    def measure(self, images, prompts):
        pixels = torch.tensor(np.stack([np.asarray(i)[0, 0] for i in images]), dtype=torch.float64)
        return pixels[:, 1:] / 50, pixels[:, 0]

    def distance(self, features):
        return cmmd(features, self.reference, influence=True)


def make_search(tmp_path, backend=None, trials=8, images=16, judge=None, out="out", storage=None, prompts=PROMPTS):
    plan = study.make_plan("s", prompts, trials, images, 0, confirm_images=16, screen=8)
    storage = study.open_storage(storage or f"sqlite:///{tmp_path / 's.db'}")
    return study.Search(plan, backend or Painter(), judge or Eye(), storage, tmp_path / out, Quiet())


def settings_of(trials):
    return [tuple(t.user_attrs["setting"]) for t in trials]


GRIDS = [[(a, b) for a, b in zip(*[random.Random(s).choices(range(6), k=7) for s in (s, s + 99)], strict=True)]
         for s in range(30)]  # fmt: skip


def measured(adherence, saturation=None, first=0):
    blocks = len(adherence)
    return {
        "blocks": [*range(first, first + blocks)],
        "adherence": adherence,
        "variety": [1.0] * blocks,
        "seconds": [1.0] * blocks,
        "saturation": saturation or [0.0] * blocks * SEEDS,
    }
