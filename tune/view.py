"""What a person sees while it runs: the best so far, trials, images a second, the time that is left."""

import sys
import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import objectives, study


class View:
    """On stderr: live in a terminal, else a line for each trial. Use it as a context."""

    def __init__(self, goal, console=None):
        self.goal, self.console = goal, console or Console(stderr=True, highlight=False)
        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[speed]}", TimeElapsedColumn()
        self.bar = Progress(*[TextColumn(c) if isinstance(c, str) else c for c in columns], console=self.console)
        self.task = self.bar.add_task("trials", total=None, speed="")
        self.count, self.since, self.times = 0, time.monotonic(), deque(maxlen=200)
        self.best, self.done, self.total, self.confirming = [], 0, 0, False
        self.left = self.begun = self.per_image = None  # Images, those that there were at the start, seconds.
        self.live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self):
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_):
        self.live.stop()

    def say(self, text):
        self.console.print(text, markup=False, soft_wrap=True)

    def image(self):
        self.count += 1
        self.times.append(time.monotonic())
        self._speed()

    @property
    def speed(self):
        """Images a second, of the last ones."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span > 0 else 0.0

    def phase(self, name, total):
        """From now on single images are counted: the confirmation."""
        self.bar.update(self.task, description=name, total=total, completed=0, speed="")
        self.count, self.confirming = 0, True
        self.times.clear()

    def trials(self, done, total, front, images, most):
        """How many trials are done, and those of the front; their images, and how many there will be at most."""
        if done > self.done and not self.console.is_terminal:
            self.say(f"{done} of {total} trials, {self.speed:.2g} images/s; on the front: "
                     + ("; ".join(self._words(t) for t in front) or "none yet"))  # fmt: skip
        if self.begun is None:
            self.begun = images
        if images > self.begun:  # Of all processes.
            self.per_image = (time.monotonic() - self.since) / (images - self.begun)
        self.done, self.total, self.best, self.left = done, total, front, most - images
        self.bar.update(self.task, completed=done, total=total)
        self._speed()

    def waiting(self, count):
        self.bar.update(self.task, speed=f"waiting for {count} of other processes")

    def failed(self, number, setting, error):
        if error != study.SURPLUS:
            self.say(f"trial {number} ({setting}) failed: {error}")

    def _speed(self):
        if self.confirming:
            self.bar.update(self.task, completed=self.count)
            left = (self.bar.tasks[0].total - self.count) / self.speed if self.speed else None
        else:
            each = self.per_image or (1 / self.speed if self.speed else None)
            left = None if each is None or self.left is None else each * self.left
        text = f"{self.speed:.2g} images/s" + ("" if left is None else f", {duration(left)} left")
        self.bar.update(self.task, speed=text)

    def _draw(self):
        table = Table(title="best so far", title_justify="left", box=None, pad_edge=False)
        for name in ("setting", *self.goal.keys, self.goal.bound):
            table.add_column(objectives.word(name), justify="left" if name == "setting" else "right")
        for trial in self.best[:8]:
            table.add_row(
                str(study.from_json(trial.user_attrs["setting"])),
                *[f"{v:.3g}" for v in trial.values],
                f"{trial.user_attrs[self.goal.bound]:.3g}",
            )
        grid = Table.grid()
        grid.add_row(table)
        grid.add_row(self.bar)
        return grid

    def _words(self, trial):
        told = zip(self.goal.keys, trial.values, strict=True)
        values = ", ".join(f"{objectives.word(k)} {v:.3g}" for k, v in told)
        return f"{study.from_json(trial.user_attrs['setting'])} ({values})"


class Quiet:
    """No one looks on."""

    def say(self, text):
        print(text, file=sys.stderr)

    def _nothing(self, *_):
        pass

    image = phase = trials = waiting = failed = _nothing


def duration(seconds):
    """Seconds in words for people who wait."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
