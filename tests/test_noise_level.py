"""Conversions between noise measures: exact both ways, and known values."""

import math

import pytest
import torch
from guidance_interval import GuidanceInterval, noise_level
from hypothesis import given
from hypothesis import strategies as st

sigmas = st.floats(1e-4, 1e4)


def log_snr(sigma):
    return -2 * torch.as_tensor(sigma, dtype=torch.float64).log()


def alpha_bar(sigma):
    return 1 / (1 + torch.as_tensor(sigma, dtype=torch.float64) ** 2)


PAIRS = [
    (noise_level.sigma_to_flow_time, noise_level.flow_time_to_sigma),
    (log_snr, noise_level.log_snr_to_sigma),
    (alpha_bar, noise_level.alpha_bar_to_sigma),
]
# Stable Diffusion's training schedule: 1000 timesteps, betas linear in their square root.
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SD_SIGMAS = noise_level.alpha_bar_to_sigma((1 - BETAS).cumprod(0))


@pytest.mark.parametrize(("there", "back"), PAIRS, ids=lambda f: f.__name__)
@given(sigma=sigmas)
def test_round_trip(there, back, sigma):
    assert back(there(sigma)) == pytest.approx(sigma, rel=1e-6)
    tensor = torch.tensor([[sigma], [2 * sigma]], dtype=torch.float32)
    result = back(there(tensor))
    assert result.dtype == torch.float64 and result.shape == tensor.shape
    torch.testing.assert_close(result, tensor.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("there", "back"), PAIRS, ids=lambda f: f.__name__)
def test_round_trip_at_the_limits(there, back):
    for sigma in (0.0, math.inf):
        assert back(there(sigma)) == sigma


@pytest.mark.parametrize(("there", "back"), PAIRS, ids=lambda f: f.__name__)
@given(a=sigmas, b=sigmas)
def test_monotonic(there, back, a, b):
    if a < b:
        falls = there(0.5) > there(2.0)
        assert there(a) >= there(b) if falls else there(a) <= there(b)


def test_known_values():
    assert noise_level.flow_time_to_sigma(0.5) == 1
    assert noise_level.sigma_to_flow_time(3.0) == 0.75
    assert noise_level.log_snr_to_sigma(-2.0) == pytest.approx(math.e)
    assert noise_level.alpha_bar_to_sigma(0.5) == 1
    assert noise_level.rescale_sigma(1.61, 0.5) == pytest.approx(3.22)
    # The noise levels that Stable Diffusion's own tools print.
    assert SD_SIGMAS[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert SD_SIGMAS[-1].item() == pytest.approx(14.6146, abs=1e-4)


@given(sigmas, st.floats(0.1, 10), st.floats(0.1, 10))
def test_rescale_round_trip(sigma, a, b):
    there = noise_level.rescale_sigma(sigma, a, b)
    assert noise_level.rescale_sigma(there, b, a) == pytest.approx(sigma, rel=1e-6)
    assert there / b == pytest.approx(sigma / a, rel=1e-6)


def test_timesteps_are_k_diffusion_s():
    from k_diffusion.external import DiscreteSchedule

    t = torch.linspace(0, 999, 777)
    theirs = DiscreteSchedule(SD_SIGMAS, quantize=False).t_to_sigma(t)
    torch.testing.assert_close(noise_level.Timesteps(SD_SIGMAS).sigma(t), theirs.double(), rtol=1e-4, atol=0)


def test_timesteps_between_and_beyond():
    timesteps = noise_level.Timesteps(SD_SIGMAS)
    assert timesteps.sigma(torch.tensor([0, 500, 999])).tolist() == pytest.approx(SD_SIGMAS[[0, 500, 999]].tolist())
    assert timesteps.sigma(500.5).item() == pytest.approx(math.sqrt(SD_SIGMAS[500] * SD_SIGMAS[501]))
    assert timesteps.sigma(torch.tensor([-1.0, 1000.0])).tolist() == pytest.approx(SD_SIGMAS[[0, -1]].tolist())


def test_timesteps_may_repeat_a_noise_level_but_have_none_of_0():
    assert noise_level.Timesteps([1.0, 1.0, 2.0]).sigma([0, 1, 2]).tolist() == pytest.approx([1, 1, 2])
    assert noise_level.Timesteps([1.0, 2.0]).sigma(1).item() == pytest.approx(2)
    for levels in ([0.0, 1.0], [-1.0, 1.0], [2.0, 1.0], [1.0], [[1.0, 2.0]], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="model_sigmas must be 1-D, positive and increasing, got shape"):
            noise_level.Timesteps(levels)


def test_percent_ends_are_open_and_a_timestep_is_itself():
    assert noise_level.percent_to_sigma(0.0, SD_SIGMAS) == math.inf
    assert noise_level.percent_to_sigma(1.0, SD_SIGMAS) == 0
    assert noise_level.percent_to_sigma(1 - 500 / 999, SD_SIGMAS) == pytest.approx(SD_SIGMAS[500].item())
    shares = noise_level.percent_to_sigma(torch.tensor([0.0, 0.25, 1.0]), SD_SIGMAS)
    assert shares.tolist() == [math.inf, noise_level.percent_to_sigma(0.25, SD_SIGMAS), 0]


@given(st.integers(0, 19), st.integers(0, 19))
def test_steps_round_trip(a, b):
    first, last = sorted((a, b))
    schedule = noise_level.schedule("karras", 20, 0.03, 14.6)
    for sigmas in (schedule, schedule.float()):
        interval = noise_level.steps_to_interval(sigmas, first, last)
        guided = interval.mask(sigmas[:-1]).nonzero()[:, 0].tolist()
        assert guided == list(range(first, last + 1))


def test_two_noise_levels_are_a_step():
    assert noise_level.steps_to_interval([2.0, 1.0], 0, 0) == GuidanceInterval(1, 2)
    assert len(noise_level.schedule("karras", 2, 0.1, 10)) == 3


def test_steps_count_from_the_end_too():
    schedule = noise_level.schedule("karras", 20, 0.03, 14.6)
    assert noise_level.steps_to_interval(schedule, -20, -1) == GuidanceInterval(0, schedule[0].item())


@pytest.mark.parametrize("name", noise_level.SCHEDULES)
def test_schedules_decrease_between_their_ends(name):
    schedule = noise_level.schedule(name, 12, 0.02, 50)
    assert len(schedule) == 13 and schedule[-1] == 0
    assert (schedule[1:] < schedule[:-1]).all()
    assert schedule[[0, -2]].tolist() == pytest.approx([50, 0.02])


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_schedules_are_k_diffusion_s(name):
    from k_diffusion import sampling

    theirs = getattr(sampling, f"get_sigmas_{name}")(12, 0.02, 50)
    torch.testing.assert_close(noise_level.schedule(name, 12, 0.02, 50).float(), theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: noise_level.flow_time_to_sigma(1.5), r"flow_time_to_sigma: 1.5 is out of range.*\[0, 1\]"),
        (lambda: noise_level.sigma_to_flow_time(10**400), "a noise level is larger than a float can be"),
        (lambda: noise_level.sigma_to_flow_time(-1.0), "sigma_to_flow_time: -1.0 is out of range"),
        (lambda: noise_level.log_snr_to_sigma(math.nan), "nan is out of range"),
        (lambda: noise_level.alpha_bar_to_sigma(torch.tensor([0.5, 2.0])), "out of range"),
        (lambda: noise_level.percent_to_sigma(1.5, SD_SIGMAS), "1.5 is out of range"),
        (lambda: noise_level.percent_to_sigma(0.5, SD_SIGMAS.flip(0)), "model_sigmas must be 1-D, positive and incr"),
        (lambda: noise_level.rescale_sigma(1.0, 0), "sigma_data must be a standard deviation above 0, got 0"),
        (lambda: noise_level.steps_to_interval(SD_SIGMAS, 0, 1), "sigmas must be a decreasing schedule"),
        (lambda: noise_level.steps_to_interval([2.0, 2.0, 1.0], 0, 1), "sigmas must be a decreasing schedule"),
        (lambda: noise_level.steps_to_interval([2.0], 0, 0), "sigmas must be a decreasing schedule of at least one"),
        (lambda: noise_level.steps_to_interval([2.0, 1.0], -2, 0), r"first must be .*, -1 to 0, got -2"),
        (lambda: noise_level.steps_to_interval([2.0, 1.0], 0, 1), r"last must be .*, -1 to 0, got 1"),
        (lambda: noise_level.steps_to_interval(SD_SIGMAS.flip(0), 5, 3), "first=5 and last=3"),
        (lambda: noise_level.steps_to_interval(SD_SIGMAS.flip(0), 0, 999), "last must be the index of a step"),
        (lambda: noise_level.steps_to_interval(SD_SIGMAS.flip(0), 0.5, 3), "first must be the index of a step"),
        (lambda: noise_level.schedule("cosine", 10, 0.1, 10), "unknown schedule 'cosine'; there are exp"),
        (lambda: noise_level.schedule("karras", 1, 0.1, 10), "steps must be at least 2, got 1"),
        (lambda: noise_level.schedule("karras", 10, 10, 0.1), "sigma_min=10, sigma_max=0.1"),
        (lambda: noise_level.schedule("karras", 10, 0, 1), "sigma_min=0, sigma_max=1"),
        (lambda: noise_level.schedule("karras", 10, 1, 1), "sigma_min=1, sigma_max=1"),
        (lambda: noise_level.schedule("karras", 10, 1, math.inf), "sigma_min=1, sigma_max=inf"),
        (lambda: noise_level.rescale_sigma(1.0, 1.0, math.inf), "to_sigma_data must be a standard deviation above 0"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
