"""`guidance-interval measure` on folders of digits: real ones, CFG everywhere, and CFG in an interval.

Writes the folders, runs the command twice and prints the seconds and the peak memory of both runs; with --write-only
just the folders, to try the command on.
`python benchmarks/measure_folders.py`
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from guidance_interval import GuidanceInterval
from guidance_interval.lab import demo
from guidance_interval.toy import data, model
from guidance_interval.toy.sampling import Guidance, sample
from PIL import Image

SETTINGS = [Guidance("cfg", 2.0), Guidance("interval", 6.0, GuidanceInterval(0.1, 2.5))]


def write(folder, lab, samples):
    """Class folders of PNG files: folder/<digit>/<number>.png."""
    pixels = data.to_pixels(samples.x[:, 0].cpu(), lab.config["pixel_mean"], lab.config["pixel_std"]).numpy()
    for i, (image, label) in enumerate(zip(pixels, samples.labels.tolist(), strict=True)):
        path = folder / str(label) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="emptied first")
    parser.add_argument("--samples", type=int, default=2000, help="images per folder")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    lab = model.load()
    write(args.out / "real", lab, demo.real_digits(lab, args.samples, seed=0))
    for setting in SETTINGS:
        write(args.out / setting.name, lab, sample(lab, setting, args.samples))
    if args.write_only:
        return

    command = [sys.executable, "-m", "guidance_interval", "measure", "--reference", str(args.out / "real")]
    command += ["--images", *(str(args.out / s.name) for s in SETTINGS), "--features", "digits"]
    command += ["--out", str(args.out / "measure")]
    print("guidance-interval", *command[3:], "\n")
    for run in ("first", "second"):
        begin = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        if run == "first":
            print(done.stdout)
        print(f"{run} run: {seconds:.1f} s")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
