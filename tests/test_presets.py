"""The published intervals."""

import pytest
from guidance_interval import PRESETS, get_preset, noise_level
from k_diffusion.sampling import get_sigmas_karras


def test_every_preset_has_a_source_and_a_valid_interval():
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert "arXiv 2404.07724" in preset.source
        assert preset.interval().sigma_lo < preset.interval().sigma_hi
        assert preset.weight is None or preset.weight > (preset.weight_everywhere or 1) >= 1


def guided(interval, schedule):
    return interval.mask(schedule[:-1]).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("name", "first", "last"), [("edm2-xxl-fid", 17, 22), ("edm2-xxl-fd-dinov2", 13, 19)])
def test_edm2_intervals_guide_the_authors_steps(name, first, last):
    schedule = noise_level.schedule("karras", 32, 0.002, 80.0)
    interval = get_preset(name).interval(sigma_data=0.5)
    assert guided(interval, schedule) == list(range(first, last + 1))
    exact = noise_level.steps_to_interval(schedule, first, last)
    assert (interval.sigma_lo, interval.sigma_hi) == pytest.approx((exact.sigma_lo, exact.sigma_hi), abs=0.005)


def test_the_sdxl_interval_is_half_of_the_paper_s_steps():
    """Section 4.3: guidance at 50 % of 32 steps, (0.28, 5.42], weight 16; appendix A: rho 3, from 14.61 to 0.03."""
    preset, schedule = get_preset("sdxl"), get_sigmas_karras(32, 0.03, 14.61, rho=3.0)
    assert (preset.weight, preset.weight_everywhere, preset.metric) == (16, None, "visual inspection")
    assert "section 4.3" in preset.source
    first, *_, last = guided(preset.interval(), schedule)
    half = noise_level.steps_to_interval(schedule, first, first + 15)
    assert (round(half.sigma_lo, 2), round(half.sigma_hi, 2)) == (preset.sigma_lo, preset.sigma_hi)
    assert last == first + 16  # Rounding 0.2809 down to 0.28 lets the next step in.


def test_units_follow_the_scale_of_the_data():
    fid = get_preset("edm2-xxl-fid")
    assert (fid.sigma_lo, fid.sigma_hi) == (0.19, 1.61)
    assert fid.interval().sigma_hi == pytest.approx(2 * fid.sigma_hi)
    assert get_preset("sdxl").interval().sigma_hi == 5.42


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown preset 'sd9'; there are sdxl, edm2"):
        get_preset("sd9")
