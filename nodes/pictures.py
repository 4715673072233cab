"""Pictures that the nodes return: a plot of a schedule and its interval, and a labelled grid. PIL alone."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, GUIDED, UNGUIDED, BAND = "#222222", "#cccccc", "#1f6fb4", "#999999", "#dcebf7"
MAX_SIDE, MAX_PIXELS = 4096, 16_000_000  # Of a grid: what browsers show and PNG saves in a second.
LABEL_WIDTH = 200


def to_image(picture):
    """A PIL picture as ComfyUI's IMAGE: float32 [1, height, width, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def _to_picture(image):
    return Image.fromarray((image[..., :3].cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def plot_schedule(levels, guided, bounds, title, size=(768, 512)):
    """The noise level of each step, logarithmic, with the interval as a band and the guided steps filled.

    levels: one sigma per step; guided: one bool per step; bounds: (lo, hi] in the unit of `levels`. What a
    logarithm cannot show, 0 and inf, is drawn at the edge.
    """
    width, height = size
    left, top, right, bottom = 72, 44, width - 20, height - 48
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    drawable = [s for s in levels if 0 < s < math.inf] or [1.0]  # Flow starts at inf; an inner step may be at 0.
    low = math.floor(math.log10(min(drawable)))
    high = max(math.ceil(math.log10(max(drawable))), low + 1)

    def x_of(step):
        return left + (right - left) * (step + 0.5) / len(levels)

    def y_of(sigma):
        exponent = low if sigma <= 0 else high if sigma == math.inf else min(max(math.log10(sigma), low), high)
        return bottom - (bottom - top) * (exponent - low) / (high - low)

    draw.rectangle([left, y_of(bounds[1]), right, y_of(bounds[0])], fill=BAND)
    for exponent in range(low, high + 1):
        y = y_of(10.0**exponent)
        draw.line([left, y, right, y], fill=FAINT)
        draw.text((left - 8, y), f"{10.0**exponent:g}", fill=INK, font=font, anchor="rm")
    points = [(x_of(i), y_of(s)) for i, s in enumerate(levels)]
    draw.line(points, fill=UNGUIDED, width=2)
    for (x, y), filled in zip(points, guided, strict=True):
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=GUIDED if filled else "white", outline=GUIDED, width=2)
    every = max(1, math.ceil(len(levels) / 16))
    for step in range(0, len(levels), every):
        draw.text((x_of(step), bottom + 8), str(step), fill=INK, font=font, anchor="mt")
    draw.line([left, top, left, bottom, right, bottom], fill=INK)
    draw.text(((left + right) / 2, height - 8), "step", fill=INK, font=font, anchor="mb")
    draw.text((8, 12), title, fill=INK, font=ImageFont.load_default(16))
    return picture


def label_grid(columns, label_height=44):
    """One column per setting, its label above its images; as many beside each other as a picture holds, then below.

    columns: [(label, images)], images float [batch, height, width, 3] of one size in all columns. They are drawn
    smaller where the whole would have more than MAX_PIXELS or a column be higher than MAX_SIDE.
    """
    batch, height, width = columns[0][1].shape[:3]
    scale = min(
        1.0,
        (MAX_PIXELS / (len(columns) * batch * height * width)) ** 0.5,
        MAX_SIDE / (batch * height),
        MAX_SIDE / width,
    )
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    cell = max(width, LABEL_WIDTH)
    per_row = min(len(columns), max(1, MAX_SIDE // cell))
    bands = math.ceil(len(columns) / per_row)
    per_row = math.ceil(len(columns) / bands)  # Even rows.
    band_height = label_height + height * batch
    font = ImageFont.load_default(max(11, min(16, cell // 14)))
    picture = Image.new("RGB", (cell * per_row, band_height * bands), "white")
    draw = ImageDraw.Draw(picture)
    for i, (label, images) in enumerate(columns):
        x, y = cell * (i % per_row), band_height * (i // per_row)
        draw.multiline_text((x + 6, y + 4), label, fill=INK, font=font, spacing=2)
        for j, image in enumerate(images):
            tile = _to_picture(image)
            tile = tile if tile.size == (width, height) else tile.resize((width, height))
            picture.paste(tile, (x, y + label_height + j * height))
    return picture
