"""What a person sees while it runs."""

import io
import itertools
import time

from guidance_interval.tune import objectives
from guidance_interval.tune.view import View
from rich.console import Console


def test_the_time_left_is_told_by_images_and_from_the_first_on(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 4)
    view = View(objectives.Goal(("rows",), ("variety",), "adherence", 5.0), Console(file=io.StringIO()))
    view.trials(0, 10, [], 0, 400)
    for _ in range(100):
        view.image()
    assert view.bar.tasks[0].fields["speed"] == "4 images/s, 2 min left"
    view.trials(1, 10, [], 100, 400)  # The baseline, with a quarter of all images.
    assert view.bar.tasks[0].fields["speed"] == "4 images/s, 76 s left"
