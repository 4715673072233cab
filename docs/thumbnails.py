"""Draws workflows/*.jpg, which the template browser shows: `python docs/thumbnails.py`, with what the tests need.

Workflows of the demo model show its images; for the others, whose models are not here, the forecast of their run is
drawn: the schedule, the guided band, and what it saves.
"""

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "nodes"))

import comfy_harness as harness  # noqa: E402
from comfy_server import load_workflow, to_prompt  # noqa: E402
from guidance_interval.interval_text import CONDITIONAL_ONLY, LIMITING_NODES  # noqa: E402

SIZE = (640, 480)
SCALE = 2  # Drawn larger, for smooth edges.
PAPER, INK, SOFT, LINE, BLUE, BAND = "#1b1c1e", "#f2f2f2", "#b4b4b4", "#8c8c8c", "#56b4e9", "#24404f"
# Title, and whose noise levels: those of the tests' small models are of the same kind.
CHARTS = {
    "02_drag_it": ("Drag the interval: no download", None),
    "03_sdxl_ksampler": ("SDXL, KSampler", "sdxl"),
    "04_sdxl_preset_custom_sampler": ("SDXL, the published interval", "sdxl"),
    "07_sd35_flow": ("Stable Diffusion 3.5", "flow"),
    "08_inpaint": ("Inpaint a masked part", "sd15"),
    "09_autoguidance_two_models": ("Autoguidance: a second, weaker model", "sdxl"),
    "10_wan_video": ("Wan 2.1, text to video", "video"),
    "11_ace_step_audio": ("ACE-Step, text to music", "audio"),
}


def main():
    host = harness.start_comfyui(harness.find_comfyui(tempfile.mkdtemp()))
    pictures = {name: chart_of(host, name, *about) for name, about in CHARTS.items()}
    pictures["01_try_it"] = try_it(host)
    pictures["02_drag_it"] = with_images(pictures["02_drag_it"], sample_demo(host, "02_drag_it"))
    pictures["05_compare_intervals"] = bars(host, "05_compare_intervals")
    pictures["06_schedule_plot"] = schedule_plot(host)
    for name, picture in sorted(pictures.items()):
        path = ROOT / "workflows" / f"{name}.jpg"
        picture.resize(SIZE, Image.LANCZOS).save(path, quality=88, optimize=True)
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1024} KiB")


# ----------------------------------------------------------------------------
# From the workflow to what is known of its run.


def prompt_of(host, name):
    info = {k: {"input": c.INPUT_TYPES(), "output": c.RETURN_TYPES} for k, c in host.nodes.items()}
    return to_prompt(load_workflow(name), info)


def find(prompt, *types):
    return next(key for key, node in prompt.items() if node["class_type"] in types)


def forecast(host, prompt, node_id, kind):
    if kind is not None:
        hidden = types.SimpleNamespace(unique_id=node_id, prompt=prompt)
        events = harness.our_module(host, "live.events")
        events.teller(types.SimpleNamespace(hidden=hidden), harness.tiny_model(kind))
    return harness.our_module(host, "live.route").describe(prompt, node_id)


def chart_of(host, name, title, kind):
    prompt = prompt_of(host, name)
    data = forecast(host, prompt, find(prompt, *LIMITING_NODES), kind)
    assert not data["notes"], data["notes"]
    return draw_chart(title, data, right=SIZE[0] - (248 if name == "02_drag_it" else 24))


def demo_parts(host, prompt):
    model, vae, latent = harness.run_node(host, "GuidanceIntervalDemoModel", batch_size=6)
    positive, negative = (
        harness.run_node(host, "GuidanceIntervalDemoPrompt", **node["inputs"])[0]
        for node in prompt.values()
        if node["class_type"] == "GuidanceIntervalDemoPrompt"
    )
    return model, vae, latent, positive, negative


def own_values(prompt, key):
    return {k: v for k, v in prompt[key]["inputs"].items() if not isinstance(v, list)}


def sample_demo(host, name):
    """[6, height, width, 3], uint8."""
    prompt = prompt_of(host, name)
    model, vae, latent, positive, negative = demo_parts(host, prompt)
    limited = own_values(prompt, find(prompt, "GuidanceInterval"))
    model = harness.run_node(host, "GuidanceInterval", model=model, **limited)[0]
    conds = {"positive": positive, "negative": negative, "latent_image": latent}
    with torch.inference_mode():
        values = own_values(prompt, find(prompt, "KSampler"))
        samples = harness.run_node(host, "KSampler", model=model, **conds, **values)[0]
        return to_uint8(vae.decode(samples["samples"]))


def to_uint8(images):
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


# ----------------------------------------------------------------------------
# Drawing.


def font(size):
    return ImageFont.load_default(size * SCALE)


def sheet(title):
    picture = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(picture)
    size = 36
    while draw.textlength(title, font=font(size)) > (SIZE[0] - 48) * SCALE:
        size -= 1
    draw.text((24 * SCALE, 20 * SCALE), title, fill=INK, font=font(size))
    return picture, draw


def draw_chart(title, data, right):
    picture, draw = sheet(title)
    left, right, top, bottom = 24 * SCALE, right * SCALE, 84 * SCALE, 344 * SCALE

    def x_of(x):
        return left + 14 * SCALE + x * (right - left - 28 * SCALE)

    def y_of(y):
        return bottom - y * (bottom - top)

    low, high = data["band"]
    draw.rectangle([left, y_of(high), right, y_of(low)], fill=BAND)
    for y in (low, high):
        draw.line([left, y_of(y), right, y_of(y)], fill=BLUE, width=3 * SCALE)
        draw.rounded_rectangle(
            [right - 44 * SCALE, y_of(y) - 9 * SCALE, right - 8 * SCALE, y_of(y) + 9 * SCALE], 9 * SCALE, fill=BLUE
        )
    steps = [p for p in data["points"] if p[3]]
    draw.line([(x_of(x), y_of(y)) for x, y, *_ in steps], fill=LINE, width=3 * SCALE)
    radius = min(9, 0.4 * (right - left) / SCALE / len(steps)) * SCALE
    for x, y, guided, _ in steps:
        box = [x_of(x) - radius, y_of(y) - radius, x_of(x) + radius, y_of(y) + radius]
        draw.ellipse(box, fill=BLUE if guided else PAPER, outline=BLUE if guided else LINE, width=2 * SCALE)
    draw.text((left, 360 * SCALE), f"{data['saved']} % fewer evaluations", fill=BLUE, font=font(56))
    small = f"{data['guided']} of {data['steps']} steps guided, {data['sampler']}"
    draw.text((left, 432 * SCALE), small, fill=SOFT, font=font(24))
    return picture


def with_images(picture, images):
    """The first 4 of the images, beside the chart."""
    side = 96 * SCALE
    for i, image in enumerate(images[:4]):
        tile = Image.fromarray(image).resize((side, side), Image.NEAREST)
        place = (SIZE[0] * SCALE - (2 - i % 2) * (side + 8 * SCALE) - 16 * SCALE, (104 + (i // 2) * 104) * SCALE)
        picture.paste(tile, place)
    return picture


def try_it(host):
    prompt = prompt_of(host, "01_try_it")
    model, vae, latent, positive, negative = demo_parts(host, prompt)
    values = own_values(prompt, find(prompt, "GuidanceIntervalCompare"))
    given = {"model": model, "positive": positive, "negative": negative, "vae": vae, "latent": latent}
    with torch.inference_mode():
        images = to_uint8(harness.run_node(host, "GuidanceIntervalCompare", **given, **values)[1])
    picture, draw = sheet("Try it: no download, seconds on a CPU")
    labels = ("CFG everywhere", "in the interval", CONDITIONAL_ONLY)
    side = 98 * SCALE
    for column, label in enumerate(labels):
        left = (24 + column * 201) * SCALE
        draw.text((left, 80 * SCALE), label, fill=(INK, BLUE, INK)[column], font=font(24))
        for i in range(6):
            tile = Image.fromarray(images[6 * column + i]).resize((side - 4 * SCALE, side - 4 * SCALE), Image.NEAREST)
            picture.paste(tile, (left + (i % 2) * side, 118 * SCALE + (i // 2) * (side + 18 * SCALE)))
    return picture


def bars(host, name):
    """The rows of each setting of a comparison, as its run would evaluate them."""
    prompt = prompt_of(host, name)
    compare = prompt[find(prompt, "GuidanceIntervalCompare")]["inputs"]
    sampler = {k: v for k, v in compare.items() if k in ("steps", "cfg", "scheduler", "denoise")}
    settings = [("CFG everywhere", None)]
    settings += [(f"({line.replace(', ', ' to ')}]", line) for line in compare["intervals"].splitlines()]
    picture, draw = sheet("Compare intervals, side by side")
    longest = None
    for i, (label, line) in enumerate(settings):
        low, high = map(float, line.split(",")) if line else (-1.0, -1.0)
        run = {
            "1": prompt[find(prompt, "CheckpointLoaderSimple")],
            "2": {"class_type": "GuidanceInterval", "inputs": {"model": ["1", 0], "sigma_lo": low, "sigma_hi": high}},
            "3": {
                "class_type": "KSampler",
                "inputs": {"model": ["2", 0], "sampler_name": compare["sampler"], **sampler},
            },
        }
        rows = forecast(host, run, "2", "sd15")["rows"]
        longest = longest or rows
        top, width = (92 + 94 * i) * SCALE, (SIZE[0] - 48) * SCALE * rows / longest
        draw.text((24 * SCALE, top), label, fill=INK, font=font(26))
        box = [24 * SCALE, top + 36 * SCALE, 24 * SCALE + width, top + 76 * SCALE]
        draw.rounded_rectangle(box, 6 * SCALE, fill=BLUE if i else LINE)
        draw.text((38 * SCALE, top + 56 * SCALE), f"{rows} network evaluations", fill=PAPER, font=font(26), anchor="lm")
    return picture


def schedule_plot(host):
    prompt = prompt_of(host, "06_schedule_plot")
    limited = own_values(prompt, find(prompt, "GuidanceInterval"))
    model = harness.run_node(host, "GuidanceInterval", model=harness.tiny_model("sd15"), **limited)[0]
    values = own_values(prompt, find(prompt, "BasicScheduler"))
    sigmas = harness.run_node(host, "BasicScheduler", model=model, **values)[0]
    plot = harness.run_node(host, "GuidanceIntervalSchedule", model=model, sigmas=sigmas)[0]
    plot = Image.fromarray(np.ascontiguousarray(to_uint8(plot)[0]))
    picture, _ = sheet("Which steps are guided, before you sample")
    width = (SIZE[0] - 48) * SCALE
    plot = plot.resize((width, round(width * plot.height / plot.width)), Image.LANCZOS)
    picture.paste(plot, (24 * SCALE, 84 * SCALE))
    return picture


if __name__ == "__main__":
    main()
