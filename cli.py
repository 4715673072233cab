"""The command `guidance-interval`: `demo`, `sweep`, `results`, `measure`, `tune`, `report`, `train` and `info`."""

import argparse
import contextlib
import errno
import math
import os
import sys
import warnings
from pathlib import Path

import torch

from . import __version__, noise_level, presets
from .errors import UserError, told, user_input
from .sampler_patch import GuidanceInterval
from .toy.data import DATA
from .toy.sampling import MAX_SEED
from .tune import LANGUAGES

# What the machine refuses, wherever it shows: a full disk and the like.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
MAX_SAMPLES = 100_000  # Variety compares all pairs of a class.
MAX_STEPS = 10_000


def main(argv=None):
    """Run the command; return its exit code: 0, 2 after an error told in one line on stderr, 130 after Ctrl-C.

    Only errors that a person can put right are told so; any other exception is a bug and passes.
    """
    if sys.stderr is None:  # Closed by the caller; progress bars write there.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # A terminal that lacks a character is no reason to fail.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # By what k-diffusion imports.
    warnings.formatwarning = _format_warning
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    try:
        with contextlib.redirect_stdout(_Stdout(sys.stdout) if sys.stdout else None):
            code = args.run(args) or 0
            if sys.stdout:
                sys.stdout.flush()
        return code
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
# Arguments.


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells defaults, where there is one, and keeps the lines of examples."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class _Once(argparse.Action):
    """An option that is given twice is an error: the first value would be lost without a word."""

    given = False

    def __call__(self, parser, namespace, values, option_string=None):
        if self.given:
            raise argparse.ArgumentError(self, "given twice" + ("; list its values after one" if self.nargs else ""))
        self.given = True
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Options are spelled out, and given once."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        self.given = args
        return super().parse_known_args(args, namespace)

    def _get_values(self, action, arg_strings):
        values = super()._get_values(action, arg_strings)
        if values == [] and action.nargs is None:  # Python before 3.13 takes `--out=--` so.
            raise argparse.ArgumentError(action, "expected one argument")
        return values

    def error(self, message):
        super().error(told(message, self.given))

    def add_argument(self, *names, **kwargs):
        return super().add_argument(*names, **{"action": _Once, **kwargs})


def parser():
    p = _Parser(
        prog="guidance-interval", description="Guidance in a limited interval of noise levels, shown and measured."
    )
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(required=True, metavar="command")
    again = "what is done is kept, run the same command to go on"

    demo = commands.add_parser(
        "demo", help="sample the model that ships without guidance, with CFG and with an interval, and compare"
    )
    demo.add_argument("--out", type=path, default="out/demo", help="folder for the pictures and report.json")
    _sampling_arguments(demo, samples=1000, sampler=None, steps=None)
    demo.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    demo.add_argument("--model", choices=("emoji", "digits"), default="emoji", help="which of the models that ship")
    theirs = "(default: the model's best)"
    demo.add_argument("--weight", type=float, help=f"guidance weight in the interval {theirs}")
    demo.add_argument("--cfg-weight", type=float, help=f"guidance weight of CFG everywhere, its rival {theirs}")
    demo.add_argument("--sigma-lo", type=float, help=f"guidance ends at this noise level, 0: never {theirs}")
    demo.add_argument("--sigma-hi", type=float, help=f"guidance begins at this noise level, inf: at once {theirs}")
    demo.set_defaults(run=run_demo, interrupted="nothing is written")

    sweep = commands.add_parser(
        "sweep",
        help="measure a grid of intervals and weights; goes on where it was stopped",
        epilog="docs/command-line.md says what the function of --model returns.",
    )
    sweep.add_argument("--out", type=path, default="out/sweep", help="folder for the cells, the table and the pictures")
    _sampling_arguments(sweep, samples=500)
    _worker_arguments(sweep, "cpu")
    sweep.add_argument("--weight", type=float, nargs="+", default=[1.5, 2.0, 4.0], help="guidance weights")
    sweep.add_argument("--sigma-lo", type=float, nargs="+", default=[0.0, 0.1, 0.5], help="where guidance ends, a list")
    sweep.add_argument(
        "--sigma-hi", type=float, nargs="+", default=[1.0, 2.5, 6.0, math.inf], help="where guidance begins, a list"
    )
    sweep.add_argument(
        "--model",
        type=path,
        help="one of the repository (emoji, clips, ...; default: digits), a .safetensors file that `train` wrote, or "
        "module:function, called with a device, for a lab of your own",
    )
    sweep.set_defaults(run=run_sweep, interrupted=again)

    results = commands.add_parser(
        "results", help="every figure and number of docs/results.md; goes on where it was stopped"
    )
    results.add_argument("--quick", action="store_true", help="few samples, to see that it works")
    results.add_argument("--only", nargs="+", metavar="FIGURE", help="draw and print these, and leave the page alone")
    results.add_argument("--out", type=path, help="folder of the cells (default: out/results, or out/results-quick)")
    results.add_argument(
        "--page",
        type=path,
        help="the page to write, its pictures beside it in results/ (default: docs/results.md, or results.md in --out "
        "for --quick)",
    )
    _worker_arguments(results, "GPU or cpu")
    results.set_defaults(run=run_results, interrupted=again)

    measure = commands.add_parser(
        "measure",
        help="compare folders of images with a reference: distances, fidelity, variety, adherence, saturation",
    )
    measure.add_argument(
        "--images", type=path, nargs="+", required=True, metavar="DIR", help="folders to measure, a row for each"
    )
    measure.add_argument(
        "--reference", type=path, required=True, metavar="DIR", help="folder of the images to compare with"
    )
    measure.add_argument(
        "--features",
        nargs="+",
        default=["clip"],
        metavar="NAME[=PATH]",
        help="digits, inception, dinov2 or clip; PATH: weights that are not where their library keeps them",
    )
    measure.add_argument(
        "--prompts", type=path, metavar="FILE", help="JSON {name: prompt} for the CLIP score; else .txt by image"
    )
    measure.add_argument("--out", type=path, default="out/measure", help="folder for report.json and the picture")
    measure.add_argument(
        "--cache", type=path, metavar="DIR", help="folder for what is computed, if not beside each DIR"
    )
    measure.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    measure.set_defaults(
        run=run_measure, extra="measure", interrupted="what is computed is kept, run the command again"
    )

    tune = commands.add_parser(
        "tune",
        help="find the interval for a model of your own, confirm it, and judge it blind; goes on where it was stopped",
        epilog="examples:\n  guidance-interval tune --model emoji\n"
        "  guidance-interval tune workflow.json --prompts prompts.txt --save mine\n\ndocs/tuning.md walks through it.",
    )
    tune.add_argument(
        "source", nargs="?", metavar="WORKFLOW", action="store", type=path,
        help="of ComfyUI: exported for the API (.json), or an image that ComfyUI saved (.png); with --a1111 an "
        "image that it saved, for its parameters",
    )  # fmt: skip
    tune.add_argument(
        "--server", action="append", metavar="URL", type=path,
        help="a ComfyUI that runs the workflow, once for each (default: http://127.0.0.1:8188)",
    )  # fmt: skip
    tune.add_argument(
        "--output-node", metavar="ID", type=path,
        help="of a workflow that saves several images, the node whose image is judged (default: the last one)",
    )  # fmt: skip
    tune.add_argument(
        "--a1111", metavar="URL", type=path, help="tune what an Automatic1111 or Forge has loaded instead"
    )
    tune.add_argument("--model", choices=["emoji"], help="tune the model that ships instead: offline, in minutes")
    tune.add_argument("--prompts", type=path, metavar="FILE", help="one prompt on a line, 8 or more")
    tune.add_argument("--trials", type=count(4, 10_000), default=40, help="settings to try")
    tune.add_argument("--images", type=count(4, 10_000), default=64, help="images per trial; it begins with 16")
    tune.add_argument(
        "--reference", type=path, metavar="DIR",
        help="images to come close to: minimize the distance (CMMD) instead of maximizing variety; with --model emoji "
        "also `emoji`",
    )  # fmt: skip
    tune.add_argument("--storage", type=database, metavar="URL", help="a database that several machines share")
    tune.add_argument("--name", type=path, help="of the study; the same on all machines (default: the source's)")
    tune.add_argument("--out", type=path, default="out/tune", help="folder for the images and the report")
    tune.add_argument("--seed", type=count(0, MAX_SEED), default=0, help="which prompts and seeds are drawn")
    tune.add_argument("--dry-run", action="store_true", help="say what would be done, and how long it would take")
    tune.add_argument(
        "--save", type=path, metavar="NAME[=ID]", help="keep the best, or the one of that ID, as a preset of yours"
    )
    tune.add_argument("--language", choices=LANGUAGES, default="en", help="of the report")
    tune.add_argument("--device", type=device, default="cpu", help="where images are judged: cpu, cuda, ...")
    tune.add_argument("--clip", type=path, metavar="DIR", help="CLIP's weights, where they are not in the hub's cache")
    tune.set_defaults(run=run_tune, extra="tune", interrupted=again)

    report = commands.add_parser(
        "report", help="write the report of a study again, from what `tune` left in its folder"
    )
    report.add_argument(
        "folder", metavar="FOLDER", action="store", type=path, help="the --out folder of a `tune` that has ended"
    )
    report.add_argument("--language", choices=LANGUAGES, default="en", help="in which the page opens; it holds both")
    report.set_defaults(run=run_report, extra="tune", interrupted="the report is as it was")

    train = commands.add_parser("train", help="train a model like those that ship, for `sweep --model`")
    train.add_argument("--data", choices=[*DATA, "emoji"], default="digits", help="what it learns")
    train.add_argument(
        "--images", type=path, help="for emoji: what guidance_interval.lab.emoji wrote (default: out/emoji.npz)"
    )
    train.add_argument("--out", type=path, help="the file to write (default: out/train/DATA.safetensors)")
    train.add_argument("--device", type=device, help="cpu, cuda, ... (default: the GPU, or cpu)")
    train.add_argument("--steps", type=count(1, 10_000_000), default=30_000, help="batches for the denoiser")
    train.add_argument("--batch", type=count(1, 100_000), default=512, help="images in each")
    train.add_argument("--lr", type=positive, default=1e-3, help="learning rate of the denoiser")
    train.add_argument("--seed", type=count(0, MAX_SEED), default=0, help="of the denoiser; the classifier's is fixed")
    train.add_argument(
        "--classifier-steps", type=count(1, 10_000_000), default=3_000, help="batches for the classifier"
    )
    train.add_argument(
        "--classifier", type=path, help="a model file whose classifier is taken: the distances of both compare then"
    )
    train.set_defaults(run=run_train, interrupted="nothing is written")

    info = commands.add_parser("info", help="the published intervals, and which steps of a schedule each would guide")
    info.add_argument("--steps", type=count(2, MAX_STEPS), default=20, help="sampling steps")
    info.add_argument(
        "--scheduler", choices=sorted(noise_level.SCHEDULES), default="karras", help="the schedule's form"
    )
    info.add_argument("--sigma-min", type=float, default=0.0292, help="the schedule's last noise level above 0")
    info.add_argument("--sigma-max", type=float, default=14.6146, help="the schedule's first noise level")
    info.add_argument("--sigma-lo", type=float, help="an interval of your own: where guidance ends")
    info.add_argument("--sigma-hi", type=float, help="an interval of your own: where guidance begins")
    info.set_defaults(run=run_info, interrupted="nothing is written")
    return p


def _sampling_arguments(command, samples, sampler="dpmpp_2m", steps=16):
    command.add_argument("--samples", type=count(20, MAX_SAMPLES), default=samples, help="images per setting")
    command.add_argument("--sampler", default=sampler, help="a sampler of k-diffusion: euler, heun, dpmpp_2m, ...")
    told = "sampling steps" if steps else "sampling steps (default: the model's best)"
    command.add_argument("--steps", type=count(2, MAX_STEPS), default=steps, help=told)
    command.add_argument("--seed", type=count(0, MAX_SEED), default=0, help="the same seed gives the same numbers")


def _worker_arguments(command, default):
    command.add_argument(
        "--device", type=device, nargs="+", help=f"several, or one several times, share the cells (default: {default})"
    )
    command.add_argument(
        "--cluster", type=path, metavar="ADDRESS", help="a Dask scheduler whose workers share them: docs/cluster.md"
    )


def count(low, high):
    """An argparse type: a whole number between two bounds."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def positive(text):
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def path(text):
    """An argparse type: a path, or another name that must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def database(text):
    """An argparse type: the URL of a database, but for one in memory, which ends with the command."""
    scheme, _, where = text.partition("://")
    if scheme.partition("+")[0] == "sqlite" and (where.strip("/") in ("", ":memory:") or "mode=memory" in where):
        raise argparse.ArgumentTypeError(f"{text!r} is in memory and would be lost; give a file: sqlite:///study.db")
    return path(text)


def device(text):
    """An argparse type: a torch device that this machine has, and that holds data."""
    try:
        torch.ones(1, device=text).item()
    except Exception as e:  # Of as many kinds as there are devices.
        reason = "it holds no data" if text.startswith("meta") else str(e).splitlines()[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason}); try cpu") from e
    return text


# ----------------------------------------------------------------------------
# Commands.


def run_demo(args):
    from .lab import demo

    demo.run(
        out=args.out,
        samples=args.samples,
        sampler=args.sampler,
        seed=args.seed,
        device=args.device,
        name=args.model,
        steps=args.steps,
        weight=args.weight,
        cfg_weight=args.cfg_weight,
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
        cluster=args.cluster,
    )


def run_results(args):
    from .lab import results

    results.run(
        quick=args.quick,
        only=args.only,
        out=args.out,
        page_path=args.page,
        devices=args.device,
        cluster=args.cluster,
    )


def run_measure(args):
    from .lab import judge
    from .measure import features, report

    report.run(
        images=args.images,
        reference=args.reference,
        extractors=[features.get_extractor(spec, args.device, [judge.Digits]) for spec in args.features],
        prompts=args.prompts,
        out=args.out,
        cache=args.cache,
    )


def run_tune(args):
    from .tune import command

    command.run(
        source=args.source,
        servers=args.server,
        a1111=args.a1111,
        output_node=args.output_node,
        model=args.model,
        prompts=args.prompts,
        reference=args.reference,
        device=args.device,
        clip=args.clip,
        trials=args.trials,
        images=args.images,
        storage=args.storage,
        name=args.name,
        out=args.out,
        seed=args.seed,
        dry_run=args.dry_run,
        save=args.save,
        language=args.language,
    )


def run_report(args):
    from .tune.report.report import write_report

    print(f"wrote {write_report(args.folder, args.language)}")


def run_train(args):
    from .lab import train, train_emoji

    options = dict(
        out=args.out or f"out/train/{args.data}.safetensors",
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        classifier_steps=args.classifier_steps,
        donor=args.classifier,
    )
    if args.data == "emoji":
        train_emoji.run(args.images or "out/emoji.npz", **options)
    elif args.images is not None:
        raise UserError(f"--images is for --data emoji, and {args.data!r} brings its own; leave it out")
    else:
        train.run(args.data, **options)


def run_info(args):
    with user_input():
        sigmas = noise_level.schedule(args.scheduler, args.steps, args.sigma_min, args.sigma_max)
        intervals = [(name, p.interval(), p) for name, p in presets.all_presets().items()]
        if (args.sigma_lo, args.sigma_hi) != (None, None):
            lo = 0.0 if args.sigma_lo is None else args.sigma_lo
            hi = math.inf if args.sigma_hi is None else args.sigma_hi
            intervals = [("yours", GuidanceInterval(lo, hi), None)]
    print(f"{args.scheduler} schedule, {args.steps} steps, sigma {sigmas[0]:.4g} to {sigmas[-2]:.4g}")
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
