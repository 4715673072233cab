"""The picture, and what the folder holds."""

import math
import subprocess
import sys
from pathlib import Path

import guidance_interval
from guidance_interval import GuidanceInterval
from guidance_interval.a1111 import picture

ROOT = Path(guidance_interval.__file__).parent


def drawn(sigmas, interval, *args, **rows):
    return picture.draw([picture.Pass(sigmas, [s in interval for s in sigmas], **rows)], *args)


def test_the_picture_tells_steps_and_saving():
    sigmas = [14.6, 5.0, 1.0, 0.3, 0.1]
    html = drawn(sigmas, GuidanceInterval(0.28, 5.42), 5)
    assert html.count(f'fill="{picture.GUIDED}"') == 3 and html.count("<rect") == 5
    assert "3 of 5 steps are guided (2 to 4): 8 network evaluations per image instead of 10, 20% saved" in html
    assert "None of the 5 steps is guided" in drawn(sigmas, GuidanceInterval(50, 80), 5)
    assert "1 of 1 steps is guided (1)" in drawn([1.0], GuidanceInterval(), 1)


def test_the_picture_counts_evaluations_where_they_are_not_the_steps():
    heun = [14.6, 5.0, 5.0, 1.0, 1.0]
    assert "4 of 5 evaluations are guided (2 to 5)" in drawn(heun, GuidanceInterval(0.28, 5.42), 3)
    restart = [5.0, 0.1, 5.0, 0.1]
    html = drawn(restart, GuidanceInterval(0.28, 5.42), 3)
    assert "2 of 4 evaluations are guided (1 to 3, with gaps)" in html


def test_the_picture_counts_and_prompts_and_passes():
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, cond=2)
    assert "5 network evaluations per image instead of 6" in html
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, uncond=2)
    assert "4 network evaluations per image instead of 6" in html
    html = drawn([5.0, 0.1], GuidanceInterval(0.28, 5.42), 2, uncond=0)
    assert "2 network evaluations per image instead of 2, 0% saved" in html
    both = [picture.Pass([5.0, 0.1], [True, False]), picture.Pass([1.0], [True], cond=2)]
    assert "2 of 3 evaluations are guided (1 to 3, with gaps): 6 network evaluations" in picture.draw(both, 2)


def test_the_picture_of_a_flow_model_starts_at_infinity():
    html = drawn([math.inf, 3.0, 1.0, 0.2], GuidanceInterval(0.5, math.inf), 4)
    assert "nan" not in html and html.count("<rect") == 4 and "3 of 4 steps" in html
    heights = [float(part.split('"')[0]) for part in html.split(' height="')[1:]]
    assert heights[0] == heights[1] == picture.HEIGHT and heights[3] < heights[2] < heights[1]
    assert "nan" not in drawn([math.inf], GuidanceInterval(), 1)


def test_scripts_holds_one_file_because_the_web_ui_runs_all():
    assert [p.name for p in (ROOT / "scripts").glob("*.py")] == ["guidance_interval.py"]


def test_host_free_modules_need_no_web_ui():
    code = (
        "from guidance_interval.a1111 import settings, patch, picture; import sys; assert 'gradio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
