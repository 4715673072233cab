"""The README's example runs as it stands there, on the CPU."""

import re
from pathlib import Path

import guidance_interval
import torch

README = (Path(guidance_interval.__file__).parent / "README.md").read_text()


def test_the_example_runs_and_evaluates_the_rows_it_says():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = dict(
        torch=torch,
        model=lambda x, sigma, context: x / (1 + sigma[:, None, None, None] ** 2) + context.mean(),
        prompt=torch.ones(4, 77, 8),
        empty=torch.zeros(4, 77, 8),
    )
    exec(example.replace('"cuda"', '"cpu"'), names)
    assert names["x"].isfinite().all()
    assert names["denoiser"].rows == 4 * (20 + 9)
    assert "4 x (20 + 9 guided steps)" in example


def test_every_picture_and_page_that_it_names_is_there():
    root = Path(guidance_interval.__file__).parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (root / target).is_file(), target
