"""Seconds and peak memory of `guidance-interval measure` against the number of images and of features.

Two folders of shifted digits, 28x28, are measured three times: for the first time, with nothing new, and with a
hundred images more. `python benchmarks/measure_scale.py 2500 20000` takes the classifier that ships, with 64 features;
`python benchmarks/measure_scale.py 50000 --dim 2048` a random network of as many features as Inception has, which
costs next to nothing: what is left is reading, scores and memory. It needs 4 KiB of disk per image and its features.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from guidance_interval.lab import judge
from guidance_interval.measure import report
from guidance_interval.toy import data
from PIL import Image


class RandomFeatures:
    """One random layer: [28, 28] pixels to `dim` features, of full rank and with a spectrum that falls."""

    classes, needs = (), "torch"

    def __init__(self, dim):
        self.name, self.dim, self.identity = "random", dim, f"random/{dim}"
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(data.IMAGE_SIZE**2, dim, generator=generator) / data.IMAGE_SIZE

    def load(self):
        pass

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.convert("L")))

    def rows(self, tensors):
        return (torch.stack(tensors).flatten(1) / 255 @ self.weight).relu_()


def write(folder, start, num):
    """Digits, shifted by up to 3 pixels, each with a grain of its own."""
    images, _ = data.load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + num):
        rng = np.random.default_rng(i)
        pixels = np.roll(images[rng.integers(len(images))], rng.integers(-3, 4, 2), (0, 1))
        pixels[:3] = rng.integers(0, 16, pixels[:3].shape)
        Image.fromarray(pixels).save(folder / f"{i:07d}.png")


def measure(root, dim):
    """One run of the command in this process; prints its seconds, by the clock and of CPU, and its peak in MiB."""
    begin, cpu = time.perf_counter(), time.process_time()
    extractor = RandomFeatures(dim) if dim else judge.Digits()
    report.run([str(root / "images")], str(root / "reference"), [extractor], out=root / "out")
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(f"{seconds:.1f} {cpu:.1f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num", type=int, nargs="+", help="images per folder")
    parser.add_argument("--dim", type=int, default=0, help="features of a random network (default: `digits`)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return measure(args.run, args.dim)
    print("| images | first run | CPU | peak | nothing new | CPU | peak | 100 more | CPU | peak |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for num in args.num:
        root = Path(tempfile.mkdtemp(prefix="measure-scale-"))
        try:
            write(root / "reference", 0, num)
            write(root / "images", num, num)
            cells = []
            for more in (0, 0, 100):
                write(root / "images", 2 * num, more)
                command = [sys.executable, __file__, str(num), "--dim", str(args.dim), "--run", str(root)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                seconds, cpu, peak = done.stdout.split()[-3:]
                cells += [f"{seconds} s", f"{cpu} s", f"{peak} MiB"]
            print(f"| {num:,} | {' | '.join(cells)} |", flush=True)
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
