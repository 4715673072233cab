"""The command `guidance-interval`: each of its commands, what it takes, and what it runs."""

import contextlib
import errno
import importlib
import math
import os
import sys
import warnings
from pathlib import Path

import torch

from . import __version__, noise_level, presets
from .arguments import (
    MAX_SAMPLES,
    MAX_STEPS,
    Parser,
    count,
    database,
    device,
    path,
    positive,
    sampling_arguments,
    worker_arguments,
)
from .errors import UserError, told, user_input
from .sampler_patch import GuidanceInterval
from .toy.data import DATA
from .toy.sampling import MAX_SEED
from .tune import LANGUAGES

# What the machine refuses, wherever it shows: a full disk and the like.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def main(argv=None):
    """Run the command; return its exit code: 0, 2 after an error told in one line on stderr, 130 after Ctrl-C.

    Only errors that a person can fix are told so; any other exception is a bug and passes.
    """
    if sys.stderr is None:  # Closed by the caller; progress bars write there.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # A terminal that lacks a character is no reason to fail.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # By what k-diffusion imports.
    warnings.formatwarning = _format_warning
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    options = {name: value for name, value in vars(args).items() if name not in ("run", "extra", "interrupted")}
    try:
        with contextlib.redirect_stdout(_Stdout(sys.stdout) if sys.stdout else None):
            args.run(**options)
            if sys.stdout:
                sys.stdout.flush()
        return 0
    except UserError as e:
        return _error(e, given)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == __package__:
            raise
        extra = "cluster" if e.name == "distributed" else getattr(args, "extra", "lab")
        return _error(f"{e}; in the folder of this repository, run: pip install -e '.[{extra}]'")
    except _StdoutError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Else the interpreter complains at its end.
        if isinstance(e.__cause__, BrokenPipeError):  # `guidance-interval info | head`: the reader has seen enough.
            return 0
        return _error(f"standard output cannot be written to ({e.__cause__.strerror})")
    except OSError as e:
        if e.errno not in MACHINE:
            raise
        return _error(e, given)
    except KeyboardInterrupt:
        print(f"\nguidance-interval: interrupted; {args.interrupted}", file=sys.stderr)
        return 130


def _error(text, given=()):
    print(f"guidance-interval: error: {told(text, given)}", file=sys.stderr)
    return 2


def _format_warning(message, category, filename, lineno, line=None):
    """Our own warnings are for users and tell no line of code; others stay as they are."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"guidance-interval: warning: {told(message)}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


class _StdoutError(Exception):
    """Standard output takes no more."""


class _Stdout:
    """Standard output, whose errors are told from those of other pipes and files."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        return self._try(self.stream.flush)

    def _try(self, do, *args):
        try:
            return do(*args)
        except OSError as e:
            raise _StdoutError from e


# ----------------------------------------------------------------------------
# The commands: what each takes, and what it runs.

GO_ON = "what is done is kept, run the same command to go on"
NOTHING = "nothing is written"


def parser():
    p = Parser(
        prog="guidance-interval", description="Guidance in a limited interval of noise levels, shown and measured."
    )
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(required=True, metavar="command")
    for add in (_demo, _sweep, _results, _measure, _tune, _report, _train, _emoji, _memorization, _info):
        add(commands)
    return p


def _function(place):
    """The function at `module:name` of the package, imported when it is called."""

    def call(**options):
        module, _, name = place.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)(**options)

    return call


def _demo(commands):
    command = commands.add_parser(
        "demo", help="sample the model that ships without guidance, with CFG and with an interval, and compare"
    )
    command.add_argument("--out", type=path, default="out/demo", help="folder for the pictures and report.json")
    sampling_arguments(command, samples=1000, sampler=None, steps=None)
    command.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    command.add_argument(
        "--model", dest="name", choices=("emoji", "digits"), default="emoji", help="which of the models that ship"
    )
    theirs = "(default: the model's best)"
    command.add_argument("--weight", type=float, help=f"guidance weight in the interval {theirs}")
    command.add_argument("--cfg-weight", type=float, help=f"guidance weight of CFG everywhere, its rival {theirs}")
    command.add_argument("--sigma-lo", type=float, help=f"guidance ends at this noise level, 0: never {theirs}")
    command.add_argument("--sigma-hi", type=float, help=f"guidance begins at this noise level, inf: at once {theirs}")
    command.set_defaults(run=_function("lab.demo:run"), interrupted=NOTHING)


def _sweep(commands):
    command = commands.add_parser(
        "sweep",
        help="measure a grid of intervals and weights; goes on where it was stopped",
        epilog="docs/command-line.md says what the function of --model returns.",
    )
    command.add_argument(
        "--out", type=path, default="out/sweep", help="folder for the cells, the table and the pictures"
    )
    sampling_arguments(command, samples=500)
    worker_arguments(command, "cpu")
    command.add_argument(
        "--weight",
        dest="weights",
        metavar="WEIGHT",
        type=float,
        nargs="+",
        default=[1.5, 2.0, 4.0],
        help="guidance weights",
    )
    command.add_argument(
        "--sigma-lo",
        dest="sigma_los",
        metavar="SIGMA_LO",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.5],
        help="where guidance ends, a list",
    )
    command.add_argument(
        "--sigma-hi",
        dest="sigma_his",
        metavar="SIGMA_HI",
        type=float,
        nargs="+",
        default=[1.0, 2.5, 6.0, math.inf],
        help="where guidance begins, a list",
    )
    command.add_argument(
        "--model",
        dest="source",
        metavar="MODEL",
        type=path,
        help="one of the repository (emoji, clips, ...; default: digits), a .safetensors file that `train` wrote, or "
        "module:function, called with a device, for a lab of your own",
    )
    command.set_defaults(run=_function("lab.sweep:run"), interrupted=GO_ON)


def _results(commands):
    command = commands.add_parser(
        "results", help="every figure and number of docs/results.md; goes on where it was stopped"
    )
    command.add_argument("--quick", action="store_true", help="few samples, to see that it works")
    command.add_argument("--only", nargs="+", metavar="FIGURE", help="draw and print these, and leave the page alone")
    command.add_argument("--out", type=path, help="folder of the cells (default: out/results, or out/results-quick)")
    command.add_argument(
        "--page",
        dest="page_path",
        metavar="PAGE",
        type=path,
        help="the page to write, its pictures beside it in results/ (default: docs/results.md, or results.md in --out "
        "for --quick)",
    )
    worker_arguments(command, "GPU or cpu")
    command.set_defaults(run=_function("lab.results:run"), interrupted=GO_ON)


def _measure(commands):
    command = commands.add_parser(
        "measure",
        help="compare folders of images with a reference: distances, fidelity, variety, adherence, saturation",
    )
    command.add_argument(
        "--images", type=path, nargs="+", required=True, metavar="DIR", help="folders to measure, a row for each"
    )
    command.add_argument(
        "--reference", type=path, required=True, metavar="DIR", help="folder of the images to compare with"
    )
    command.add_argument(
        "--features",
        nargs="+",
        default=["clip"],
        metavar="NAME[=PATH]",
        help="digits, inception, dinov2 or clip; PATH: weights that are not where their library keeps them",
    )
    command.add_argument(
        "--prompts", type=path, metavar="FILE", help="JSON {name: prompt} for the CLIP score; else .txt by image"
    )
    command.add_argument("--out", type=path, default="out/measure", help="folder for report.json and the picture")
    command.add_argument(
        "--cache", type=path, metavar="DIR", help="folder for what is computed, if not beside each DIR"
    )
    command.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    command.set_defaults(
        run=_run_measure, extra="measure", interrupted="what is computed is kept, run the command again"
    )


def _run_measure(features, device, **options):
    from .lab.judge import Digits
    from .measure.features import get_extractor
    from .measure.report import run

    run(extractors=[get_extractor(spec, device, [Digits]) for spec in features], **options)


def _tune(commands):
    command = commands.add_parser(
        "tune",
        help="find the interval for a model of your own, confirm it, and judge it blind; goes on where it was stopped",
        epilog="examples:\n  guidance-interval tune --model emoji\n"
        "  guidance-interval tune workflow.json --prompts prompts.txt --save mine\n\ndocs/tuning.md walks through it.",
    )
    command.add_argument(
        "source", nargs="?", metavar="WORKFLOW", action="store", type=path,
        help="of ComfyUI: exported for the API (.json), or an image that ComfyUI saved (.png); with --a1111 an "
        "image that it saved, for its parameters",
    )  # fmt: skip
    command.add_argument(
        "--server", dest="servers", action="append", metavar="URL", type=path,
        help="a ComfyUI that runs the workflow, once for each (default: http://127.0.0.1:8188)",
    )  # fmt: skip
    command.add_argument(
        "--output-node", metavar="ID", type=path,
        help="of a workflow that saves several images, the node whose image is judged (default: the last one)",
    )  # fmt: skip
    command.add_argument(
        "--a1111", metavar="URL", type=path, help="tune what an Automatic1111 or Forge has loaded instead"
    )
    command.add_argument("--model", choices=["emoji"], help="tune the model that ships instead: offline, in minutes")
    command.add_argument("--prompts", type=path, metavar="FILE", help="one prompt on a line, 8 or more")
    command.add_argument("--trials", type=count(4, 10_000), default=40, help="settings to try")
    command.add_argument("--images", type=count(4, 10_000), default=64, help="images per trial; it begins with 16")
    command.add_argument(
        "--reference", type=path, metavar="DIR",
        help="images to come close to: minimize the distance (CMMD) instead of maximizing variety; with --model emoji "
        "also `emoji`",
    )  # fmt: skip
    command.add_argument("--storage", type=database, metavar="URL", help="a database that several machines share")
    command.add_argument("--name", type=path, help="of the study; the same on all machines (default: the source's)")
    command.add_argument("--out", type=path, default="out/tune", help="folder for the images and the report")
    command.add_argument("--seed", type=count(0, MAX_SEED), default=0, help="which prompts and seeds are drawn")
    command.add_argument("--dry-run", action="store_true", help="say what would be done, and how long it would take")
    command.add_argument(
        "--save", type=path, metavar="NAME[=ID]", help="keep the best, or the one of that ID, as a preset of yours"
    )
    command.add_argument("--language", choices=LANGUAGES, default="en", help="of the report")
    command.add_argument("--device", type=device, default="cpu", help="where images are judged: cpu, cuda, ...")
    command.add_argument(
        "--clip", type=path, metavar="DIR", help="CLIP's weights, where they are not in the hub's cache"
    )
    command.set_defaults(run=_function("tune.command:run"), extra="tune", interrupted=GO_ON)


def _report(commands):
    command = commands.add_parser(
        "report", help="write the report of a study again, from what `tune` left in its folder"
    )
    command.add_argument(
        "folder", metavar="FOLDER", action="store", type=path, help="the --out folder of a `tune` that has ended"
    )
    command.add_argument("--language", choices=LANGUAGES, default="en", help="in which the page opens; it holds both")
    command.set_defaults(run=_run_report, extra="tune", interrupted="the report is as it was")


def _run_report(folder, language):
    from .tune.report.report import write_report

    print(f"wrote {write_report(folder, language)}")


def _train(commands):
    command = commands.add_parser("train", help="train a model like those that ship, for `sweep --model`")
    command.add_argument("--data", choices=[*DATA, "emoji"], default="digits", help="what it learns")
    command.add_argument("--images", type=path, help="for emoji: what `emoji` wrote (default: out/emoji.npz)")
    command.add_argument("--out", type=path, help="the file to write (default: out/train/DATA.safetensors)")
    command.add_argument("--device", type=device, help="cpu, cuda, ... (default: the GPU, or cpu)")
    command.add_argument("--steps", type=count(1, 10_000_000), default=30_000, help="batches for the denoiser")
    command.add_argument("--batch", type=count(1, 100_000), default=512, help="images in each")
    command.add_argument("--lr", type=positive, default=1e-3, help="learning rate of the denoiser")
    command.add_argument(
        "--seed", type=count(0, MAX_SEED), default=0, help="of the denoiser; the classifier's is fixed"
    )
    command.add_argument(
        "--classifier-steps", type=count(1, 10_000_000), default=3_000, help="batches for the classifier"
    )
    command.add_argument(
        "--classifier",
        dest="donor",
        metavar="CLASSIFIER",
        type=path,
        help="a model file whose classifier is taken: the distances of both compare then",
    )
    command.set_defaults(run=_run_train, interrupted=NOTHING)


def _run_train(data, images, out, device, **options):
    from .lab import train, train_emoji

    options["out"] = out or f"out/train/{data}.safetensors"
    options["device"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if data == "emoji":
        train_emoji.run(images or "out/emoji.npz", **options)
    elif images is not None:
        raise UserError(f"--images is for --data emoji, and {data!r} brings its own; leave it out")
    else:
        train.run(data, **options)


def _emoji(commands):
    command = commands.add_parser(
        "emoji", help="draw the emoji that `train --data emoji` learns, from packages that npm fetches"
    )
    command.add_argument("--out", type=path, default="out/emoji.npz", help="the file to write")
    command.add_argument("--packages", type=path, help="keep npm's packages in this folder, or take them from it")
    command.set_defaults(run=_function("lab.emoji:run"), extra="train", interrupted=NOTHING)


def _memorization(commands):
    command = commands.add_parser("memorization", help="look for copies of training images among samples of the emoji")
    command.add_argument("--data", dest="data_path", metavar="FILE", type=path, default="out/emoji.npz",
                         help="what `emoji` wrote")  # fmt: skip
    command.add_argument("--out", type=path, default="out/memorization.png", help="the picture to write")
    command.add_argument("--samples", type=count(20, MAX_SAMPLES), default=1000, help="images to sample")
    command.add_argument("--seed", type=count(0, MAX_SEED), default=0, help="the same seed gives the same numbers")
    command.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    command.set_defaults(run=_function("lab.memorization:run"), interrupted=NOTHING)


def _info(commands):
    command = commands.add_parser(
        "info", help="the published intervals, and which steps of a schedule each would guide"
    )
    command.add_argument("--steps", type=count(2, MAX_STEPS), default=20, help="sampling steps")
    command.add_argument(
        "--scheduler", choices=sorted(noise_level.SCHEDULES), default="karras", help="the schedule's form"
    )
    command.add_argument("--sigma-min", type=float, default=0.0292, help="the schedule's last noise level above 0")
    command.add_argument("--sigma-max", type=float, default=14.6146, help="the schedule's first noise level")
    command.add_argument("--sigma-lo", type=float, help="an interval of your own: where guidance ends")
    command.add_argument("--sigma-hi", type=float, help="an interval of your own: where guidance begins")
    command.set_defaults(run=_run_info, interrupted=NOTHING)


def _run_info(steps, scheduler, sigma_min, sigma_max, sigma_lo, sigma_hi):
    with user_input():
        sigmas = noise_level.schedule(scheduler, steps, sigma_min, sigma_max)
        intervals = [(name, p.interval(), p) for name, p in presets.all_presets().items()]
        if (sigma_lo, sigma_hi) != (None, None):
            lo = 0.0 if sigma_lo is None else sigma_lo
            hi = math.inf if sigma_hi is None else sigma_hi
            intervals = [("yours", GuidanceInterval(lo, hi), None)]
    print(f"{scheduler} schedule, {steps} steps, sigma {sigmas[0]:.4g} to {sigmas[-2]:.4g}")
    print("(noise levels for data of unit scale; g = guided, . = conditional only)\n")
    for name, interval, preset in intervals:
        guided = interval.mask(sigmas[:-1]).tolist()
        print(f"{name}: sigma in {interval}")
        if preset is not None:
            published = GuidanceInterval(preset.sigma_lo, preset.sigma_hi)
            told = f"; published as {published} for data of scale {preset.sigma_data:g}"
            print(f"  {preset.model}{told if name in presets.PRESETS else ''}")
            weight = f"{preset.weight:g}"
            best = preset.weight_everywhere
            everywhere = "" if best is None else f" ({best:g} without the interval)"
            chosen = "" if preset.metric is None else f"; chosen by {preset.metric}"
            print(f"  weight {weight}{everywhere}{chosen}\n  {preset.source}")
        print("  [" + "".join("g" if g else "." for g in guided) + "]")
        print(f"  {noise_level.describe_cost(guided)}\n")
    print(f"presets of your own, from `tune --save`: {presets.my_file()}")
