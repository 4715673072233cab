"""GuidanceInterval: the half-open interval, in every dtype, and its validation."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from guidance_interval import GuidanceInterval
from hypothesis import given
from hypothesis import strategies as st

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
levels = st.floats(0, 1e4, allow_nan=False)


@st.composite
def intervals(draw):
    lo = draw(levels)
    return GuidanceInterval(lo, draw(st.floats(lo, exclude_min=True, allow_nan=False)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_are_half_open_in_every_dtype(dtype):
    sigma = torch.tensor([0.28, 5.42, 0.0, 1.0, 80.0, math.inf], dtype=dtype)
    assert GuidanceInterval(0.28, 5.42).mask(sigma).tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lo", "hi"), [(0.28, 5.42), (0.1, 2.7), (0.3, 14.61), (0.0625, 4.0)])
def test_mask_rows_and_membership_agree_next_to_the_bounds(lo, hi, dtype):
    """Bounds that a dtype holds too high, too low or as they are; sigmas at most one last bit away."""
    bounds = torch.tensor([lo, hi], dtype=dtype)
    below, above = bounds.nextafter(torch.zeros_like(bounds)), bounds.nextafter(torch.full_like(bounds, math.inf))
    sigma = torch.stack([below, bounds, above], dim=1).flatten()
    expected = [False, False, True, True, True, False]
    interval = GuidanceInterval(lo, hi)
    assert interval.mask(sigma).tolist() == expected
    assert interval.guided_rows(sigma) == expected
    assert [s in interval for s in sigma] == expected


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numpy_s_numbers_are_judged_in_their_own_precision(kind):
    interval = GuidanceInterval(0.28, 5.42)
    assert kind(5.42) in interval and kind(0.28) not in interval
    assert np.nextafter(kind(5.42), kind(9)) not in interval and np.nextafter(kind(0.28), kind(9)) in interval


def test_whole_numbers_are_judged_as_they_are():
    interval = GuidanceInterval(0.28, 5.42)
    sigma = torch.tensor([0, 1, 5, 6])
    assert interval.mask(sigma).tolist() == interval.guided_rows(sigma) == [False, True, True, False]
    assert GuidanceInterval().guided_rows(sigma) == [False, True, True, True]
    assert 5 in interval and np.int64(6) not in interval


def test_edges_of_numbers():
    interval = GuidanceInterval(0.28, 5.42)
    assert 5.42 in interval and 0.3 in interval
    assert 0.28 not in interval and 5.43 not in interval and 0 not in interval


def test_open_ends():
    assert GuidanceInterval().mask(torch.tensor([1e-30, 1.0, math.inf])).all()
    assert 0.0 not in GuidanceInterval()
    assert math.inf in GuidanceInterval(3)
    assert math.inf not in GuidanceInterval(0, 3)


@given(intervals(), st.lists(levels, min_size=1, max_size=20), st.sampled_from(DTYPES))
def test_mask_is_membership_of_each_element(interval, values, dtype):
    sigma = torch.tensor(values, dtype=dtype).reshape(1, -1, 1)
    mask = interval.mask(sigma)
    assert mask.dtype == torch.bool and mask.shape == sigma.shape
    lo, hi = torch.tensor([interval.sigma_lo, interval.sigma_hi], dtype=torch.float64).to(dtype).tolist()
    assert mask.flatten().tolist() == [lo < s <= hi for s in sigma.flatten().tolist()]
    assert interval.guided_rows(sigma.flatten()) == mask.flatten().tolist()
    for s, m in zip(sigma.flatten(), mask.flatten(), strict=True):
        assert (s in interval) == m


@given(intervals(), levels)
def test_two_adjacent_intervals_share_no_noise_level(interval, sigma):
    below = GuidanceInterval(0, interval.sigma_lo) if interval.sigma_lo > 0 else None
    above = GuidanceInterval(interval.sigma_hi) if interval.sigma_hi < math.inf else None
    parts = [i for i in (below, interval, above) if i is not None]
    assert sum(sigma in part for part in parts) == (1 if sigma > 0 else 0)


@pytest.mark.parametrize(
    ("lo", "hi", "error", "says"),
    [
        (3.0, 1.0, ValueError, r"sigma_lo=3.0 and sigma_hi=1.0.*swap"),
        (1.0, 1.0, ValueError, r"sigma_lo=1.0 and sigma_hi=1.0"),
        (math.inf, math.inf, ValueError, "sigma_lo=inf"),
        (-0.1, 1.0, ValueError, r"sigma_lo must not be negative, got -0.1"),
        (0.0, -1, ValueError, r"sigma_hi must not be negative, got -1"),
        (math.nan, 1.0, ValueError, "sigma_lo is NaN"),
        (0.0, math.nan, ValueError, "sigma_hi is NaN"),
        ("0.28", 5.42, TypeError, r"sigma_lo must be a number, got '0.28' \(str\)"),
        (0.28, None, TypeError, "sigma_hi must be a number, got None"),
        (True, 5.42, TypeError, "sigma_lo must be a number, got True"),
        (0.28, 10**400, ValueError, "^sigma_hi is larger than a float can be; inf leaves sigma_hi open$"),
    ],
)
def test_bad_bounds_name_the_argument_and_the_value(lo, hi, error, says):
    with pytest.raises(error, match=says):
        GuidanceInterval(lo, hi)


def test_immutable_hashable_and_copied_as_a_value():
    interval = GuidanceInterval(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        interval.sigma_lo = 0
    for twin in (copy.deepcopy(interval), pickle.loads(pickle.dumps(interval)), GuidanceInterval(1.0, 2.0)):
        assert twin == interval and hash(twin) == hash(interval)
    assert str(interval) == "(1, 2]"


def test_membership_of_several_sigmas_is_refused():
    with pytest.raises(TypeError, match=r"shape \[2\]; use .mask"):
        torch.tensor([1.0, 2.0]) in GuidanceInterval(1, 2)  # noqa: B015


def test_an_interval_that_no_step_falls_into_warns_with_the_schedule_s_range():
    sigmas = torch.tensor([14.6, 3.0, 0.03, 0.0])
    with pytest.warns(UserWarning, match=r"sigma 14.6 to 0.03.*\(20, 30\]"):
        assert not GuidanceInterval(20, 30).warn_if_unused(sigmas)
    with pytest.warns(UserWarning, match=r"no step of the schedule lies in .*\(20, 30\]"):
        assert not GuidanceInterval(20, 30).warn_if_unused(torch.zeros(2))


def test_an_interval_in_use_does_not_warn(recwarn):
    assert GuidanceInterval(1, 5).warn_if_unused(torch.tensor([14.6, 3.0, 0.03, 0.0]))
    assert not recwarn.list
