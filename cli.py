"""The command `guidance-interval`: `demo`, `sweep`, `measure` and `info`."""

import argparse
import math
import os
import sys

import torch

from . import __version__, noise_level
from .presets import PRESETS
from .sampler_patch import GuidanceInterval


def main(argv=None):
    """Run the command; return its exit code: 0, or 2 after an error told in one line on stderr."""
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # `guidance-interval info | head`: the reader has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError) as e:
        print(f"guidance-interval: error: {e}", file=sys.stderr)
        return 2
    except ImportError as e:
        extra = getattr(args, "extra", "lab")
        print(
            f"guidance-interval: error: {e}; install it with: pip install 'guidance-interval[{extra}]'", file=sys.stderr
        )
        return 2
    return 0


def parser():
    p = argparse.ArgumentParser(prog="guidance-interval", description=__doc__.split(": ")[0])
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="sample the model that ships without guidance, with CFG and with an interval, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="out/demo", help="folder for the pictures and report.json")
    _sampling_arguments(demo, samples=1000)
    demo.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    demo.add_argument("--weight", type=float, default=6.0, help="guidance weight in the interval")
    demo.add_argument("--sigma-lo", type=float, default=0.1, help="guidance begins above this noise level")
    demo.add_argument("--sigma-hi", type=float, default=2.5, help="guidance ends at this noise level (inf: open)")
    demo.set_defaults(run=run_demo)

    sweep = commands.add_parser(
        "sweep",
        help="measure a grid of intervals and weights; goes on where it was stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sweep.add_argument("--out", default="out/sweep", help="folder for the cells, the table and the pictures")
    _sampling_arguments(sweep, samples=500)
    sweep.add_argument("--device", type=device, nargs="+", default=["cpu"], help="one, or several to share the cells")
    sweep.add_argument("--weight", type=float, nargs="+", default=[1.5, 2.0, 4.0], help="guidance weights")
    sweep.add_argument("--sigma-lo", type=float, nargs="+", default=[0.0, 0.1, 0.5], help="lower bounds")
    sweep.add_argument("--sigma-hi", type=float, nargs="+", default=[1.0, 2.5, 6.0, math.inf], help="upper bounds")
    sweep.add_argument("--model", help="your own: a file of lab/train.py, or module:function(device) -> lab.model.Lab")
    sweep.set_defaults(run=run_sweep)

    measure = commands.add_parser(
        "measure",
        help="compare folders of images with a reference: distances, fidelity, variety, adherence, saturation",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    measure.add_argument("--images", nargs="+", required=True, metavar="DIR", help="folders to measure, a row for each")
    measure.add_argument("--reference", required=True, metavar="DIR", help="folder of the images to compare with")
    measure.add_argument(
        "--features",
        nargs="+",
        default=["clip"],
        metavar="NAME[=PATH]",
        help="digits, inception, dinov2 or clip; PATH: weights that are not where their library keeps them",
    )
    measure.add_argument("--prompts", metavar="FILE", help="JSON {name: prompt} for the CLIP score; else .txt by image")
    measure.add_argument("--out", default="out/measure", help="folder for report.json and the picture")
    measure.add_argument("--cache", metavar="DIR", help="folder for what is computed, if not beside each DIR")
    measure.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    measure.set_defaults(run=run_measure, extra="measure")

    info = commands.add_parser(
        "info",
        help="the published intervals, and which steps of a schedule each would guide",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    info.add_argument("--steps", type=count(2), default=20, help="sampling steps")
    info.add_argument(
        "--scheduler", choices=sorted(noise_level.SCHEDULES), default="karras", help="the schedule's form"
    )
    info.add_argument("--sigma-min", type=float, default=0.0292, help="the schedule's last noise level above 0")
    info.add_argument("--sigma-max", type=float, default=14.6146, help="the schedule's first noise level")
    info.add_argument("--sigma-lo", type=float, help="an interval of your own, with --sigma-hi")
    info.add_argument("--sigma-hi", type=float, help="an interval of your own, with --sigma-lo")
    info.set_defaults(run=run_info)
    return p


def _sampling_arguments(command, samples):
    command.add_argument("--samples", type=count(20), default=samples, help="images per setting")
    command.add_argument("--sampler", default="dpmpp_2m", help="a sampler of k-diffusion: euler, heun, dpmpp_2m, ...")
    command.add_argument("--steps", type=count(2), default=16, help="sampling steps")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers")


def count(at_least):
    """An argparse type: a whole number, not below a bound."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = -math.inf
        if value < at_least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
        return value

    return parse


def device(text):
    """An argparse type: a torch device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({str(e).splitlines()[0]}); try cpu") from e
    return text


# ----------------------------------------------------------------------------
# Commands.


def run_demo(args):
    from .lab import demo

    demo.run(
        out=args.out,
        samples=args.samples,
        sampler=args.sampler,
        steps=args.steps,
        seed=args.seed,
        device=args.device,
        weight=args.weight,
        sigma_lo=args.sigma_lo,
        sigma_hi=args.sigma_hi,
    )


def run_sweep(args):
    from .lab import sweep

    sweep.run(
        out=args.out,
        sigma_los=args.sigma_lo,
        sigma_his=args.sigma_hi,
        weights=args.weight,
        samples=args.samples,
        sampler=args.sampler,
        steps=args.steps,
        seed=args.seed,
        devices=args.device,
        source=args.model,
    )


def run_measure(args):
    from .lab import measure

    try:
        measure.run(
            images=args.images,
            reference=args.reference,
            features=args.features,
            prompts=args.prompts,
            out=args.out,
            device=args.device,
            cache=args.cache,
        )
    except KeyboardInterrupt:
        print("guidance-interval: interrupted; what is computed is kept, run the command again", file=sys.stderr)
        return 130


def run_info(args):
    sigmas = noise_level.schedule(args.scheduler, args.steps, args.sigma_min, args.sigma_max)
    intervals = [(p.name, p.interval(), p) for p in PRESETS.values()]
    if (args.sigma_lo, args.sigma_hi) != (None, None):
        lo = 0.0 if args.sigma_lo is None else args.sigma_lo
        hi = math.inf if args.sigma_hi is None else args.sigma_hi
        intervals = [("yours", GuidanceInterval(lo, hi), None)]
    print(f"{args.scheduler} schedule, {args.steps} steps, sigma {sigmas[0]:.4g} to {sigmas[-2]:.4g}")
    print("(noise levels for data of unit scale; g = guided, . = cond alone)\n")
    for name, interval, preset in intervals:
        guided = interval.mask(sigmas[:-1])
        rows = args.steps + int(guided.sum())
        print(f"{name}: sigma in {interval}")
        if preset is not None:
            published = GuidanceInterval(preset.sigma_lo, preset.sigma_hi)
            print(f"  {preset.model}; published as {published} for data of scale {preset.sigma_data:g}")
            weight = "your usual one" if preset.weight is None else f"{preset.weight:g}"
            everywhere = preset.weight_everywhere
            everywhere = "" if everywhere is None else f" ({everywhere:g} without the interval)"
            chosen = "" if preset.metric is None else f"; chosen by {preset.metric}"
            print(f"  weight {weight}{everywhere}{chosen}\n  {preset.source}")
        span = noise_level.interval_to_steps(interval, sigmas)
        print("  [" + "".join("g" if g else "." for g in guided.tolist()) + "]", end="  ")
        which = "no step is guided" if span is None else f"steps {span[0]} to {span[1]} are guided"
        saved = 1 - rows / (2 * args.steps)
        print(f"{which}: {rows} rows per image instead of {2 * args.steps}, {saved:.0%} saved\n")
