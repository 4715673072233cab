"""A small study of the emoji model, as `guidance-interval tune` leaves it: real images, real numbers, few of both."""

import json
import math
import os
import shutil

import pytest
import torch

PROMPTS = ["face-smiling", "heart", "animal-mammal", "food-fruit", "drink", "transport-ground", "time", "sport"]
SEEDS = [11, 12, 13, 14]
ADHERENCE = "Adherence (classifier's probability of the prompt, %)"
METRICS = [
    {"key": "rows", "name": "Network evaluations per image", "better": "lower", "digits": 1},
    {"key": "adherence", "name": ADHERENCE, "better": "higher", "digits": 1},
    {"key": "variety", "name": "Variety between seeds of a prompt", "better": "higher", "digits": 3},
]
# sigma_lo, sigma_hi, weight, label. The first three are the confirmed ones: the baseline, the best and the second.
TRIALS = [
    (0.0, math.inf, 4.0, "baseline"),
    (0.1, 3.5, 2.5, ""),
    (0.15, 5.0, 3.0, ""),
    (0.0, math.inf, 1.0, "conditional only"),
    (0.28, 5.42, 4.0, "preset sdxl"),
    (0.3, 2.0, 6.0, ""),
]


def interval(values):
    """`[mean, low, high]` of numbers, with their 95% confidence interval."""
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    mean = values.mean().item()
    return [mean, mean - half, mean + half]


class Emoji:
    """The model that ships, asked for `PROMPTS`, 4 images of each."""

    def __init__(self):
        from guidance_interval.toy import model

        self.lab = model.load(model.shipped()["emoji"])
        self.labels = torch.tensor([self.lab.config["classes"].index(p) for p in PROMPTS]).repeat_interleave(len(SEEDS))

    @torch.inference_mode()
    def render(self, sigma_lo, sigma_hi, weight, seed):
        """`(x, {metric: values of each prompt})`; the noise is the same for every setting."""
        from guidance_interval import CFGDenoiser, GuidanceInterval
        from guidance_interval.toy.sampling import get_sampler, karras_sigmas

        denoiser = CFGDenoiser(self.lab.denoiser, GuidanceInterval(sigma_lo, sigma_hi))
        sigmas = karras_sigmas(8)
        noise = torch.randn(len(self.labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        null = torch.full_like(self.labels, self.lab.denoiser.null_class)
        args = dict(cond={"class_cond": self.labels}, uncond={"class_cond": null}, cond_scale=weight)
        x = get_sampler("dpmpp_2m")(denoiser, noise * sigmas[0], sigmas, extra_args=args, disable=True)
        right = (self.lab.classifier(x)[1].argmax(1) == self.labels).float()
        spread = torch.stack([torch.pdist(f).mean() for f in self.lab.ruler(x).split(len(SEEDS))])
        per_prompt = torch.full((len(PROMPTS),), denoiser.rows / len(x))
        return x, {"rows": per_prompt, "adherence": 100 * right.view(-1, len(SEEDS)).mean(1), "variety": spread}


def write_images(emoji, x, folder):
    """PNGs that tell their setting in their text, as those of ComfyUI do."""
    from guidance_interval.toy.data import SIGMA_DATA
    from PIL import Image, PngImagePlugin

    folder.mkdir(parents=True)
    pixels = x * (emoji.lab.config["pixel_std"] / SIGMA_DATA) + emoji.lab.config["pixel_mean"]
    pixels = pixels.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    told = PngImagePlugin.PngInfo()
    told.add_text("prompt", f"a workflow of {folder.name}")
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i // len(SEEDS)}-{i % len(SEEDS)}.png", pnginfo=told)


def build_study(folder):
    """Fill `folder` with confirmed.json and its images, and return what confirmed.json holds."""
    emoji, settings, trials, baseline = Emoji(), [], [], None
    for number, (lo, hi, weight, label) in enumerate(TRIALS):
        bounds = {"sigma_lo": lo, "sigma_hi": None if hi == math.inf else hi, "weight": weight}
        search = {key: interval(v) for key, v in emoji.render(lo, hi, weight, seed=1)[1].items()}
        trials.append({"number": number, "label": label, "state": "complete", "error": "", **bounds, "images": 32,
                       "values": search, "front": number in (1, 2, 3)})  # fmt: skip
        if number > 2:
            continue
        name = ["baseline", "best-1", "best-2"][number]
        x, values = emoji.render(lo, hi, weight, seed=2)
        write_images(emoji, x, folder / "confirmed" / name)
        baseline = values if baseline is None else baseline
        confirmed = {}
        for key, own in values.items():
            change = None if number == 0 else interval(own - baseline[key])
            side = None if change is None else "lower" if change[2] < 0 else "higher" if change[1] > 0 else "unclear"
            confirmed[key] = {"value": interval(own), "difference": change, "verdict": side}
        inputs = {"sigma_lo": lo, "sigma_hi": -1.0 if hi == math.inf else hi}
        paste = {
            "comfyui": {"class_type": "GuidanceInterval", "inputs": inputs},
            "a1111": f"CFG scale: {weight:g}, Guidance interval: {lo:g}-{hi:g}",
        }
        settings.append({
            "id": name, "label": label or f"({lo:g}, {hi:g}] w={weight:g}", **bounds, "search": search,
            "confirmed": confirmed, "paste": paste,
            "images": [f"confirmed/{name}/{p}-{s}.png" for p in range(len(PROMPTS)) for s in range(len(SEEDS))],
        })  # fmt: skip
    error = "CUDA out of memory. <b>Tried</b> to allocate 2 GiB"
    trials.append({"number": len(TRIALS), "label": "", "state": "failed", "error": error, "sigma_lo": 0.02,
                   "sigma_hi": 20.0, "weight": 9.0, "images": 0, "values": {}, "front": False})  # fmt: skip
    study = {
        "name": "emoji </script> & co", "created": "2026-05-01T20:15:00+00:00", "source": "emoji", "host": "emoji",
        "versions": {"guidance_interval": "0.1.0", "torch": torch.__version__}, "seed": 7, "fresh_prompts": True,
        "objective": {"minimize": ["rows"], "maximize": ["variety"], "bound": {"metric": "adherence", "margin": 5.0}},
        "metrics": METRICS, "prompts": PROMPTS, "seeds": SEEDS, "trials": trials, "settings": settings,
    }  # fmt: skip
    (folder / "confirmed.json").write_text(json.dumps(study), encoding="utf-8")
    return study


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    build_study(folder)
    return folder


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium: CHROMIUM_PATH, or what is installed under one of its names."""
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    path = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium is installed; CHROMIUM_PATH may name one")
    return path
