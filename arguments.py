"""What the options of the command line take, and a parser that is strict with them."""

import argparse
import math

import torch

from .errors import told
from .toy.sampling import MAX_SEED

MAX_SAMPLES = 100_000  # Variety compares all pairs of a class.
MAX_STEPS = 10_000


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


class Parser(argparse.ArgumentParser):
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


# ----------------------------------------------------------------------------
# Options that several commands have.


def sampling_arguments(command, samples, sampler="dpmpp_2m", steps=16):
    command.add_argument("--samples", type=count(20, MAX_SAMPLES), default=samples, help="images per setting")
    command.add_argument("--sampler", default=sampler, help="a sampler of k-diffusion: euler, heun, dpmpp_2m, ...")
    told = "sampling steps" if steps else "sampling steps (default: the model's best)"
    command.add_argument("--steps", type=count(2, MAX_STEPS), default=steps, help=told)
    command.add_argument("--seed", type=count(0, MAX_SEED), default=0, help="the same seed gives the same numbers")


def worker_arguments(command, default):
    command.add_argument(
        "--device",
        dest="devices",
        metavar="DEVICE",
        type=device,
        nargs="+",
        help=f"several, or one several times, share the cells (default: {default})",
    )
    command.add_argument(
        "--cluster", type=path, metavar="ADDRESS", help="a Dask scheduler whose workers share them: docs/cluster.md"
    )


# ----------------------------------------------------------------------------
# Types.


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
