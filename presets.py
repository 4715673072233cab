"""Published guidance intervals, each with its source. An interval without one does not belong here."""

from dataclasses import dataclass

from .noise_level import rescale_sigma
from .sampler_patch import GuidanceInterval

PAPER = "Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724"
REPO = "https://github.com/kynkaat/guidance-interval"


@dataclass(frozen=True)
class Preset:
    """A published interval.

    sigma_lo, sigma_hi: as published, for data of standard deviation `sigma_data`.
    weight: the guidance weight (cfg) found best with the interval, or None where the source names none.
    weight_everywhere: the best weight without an interval, likewise.
    metric: what it was chosen by. source: where it is published.
    """

    name: str
    model: str
    sigma_lo: float
    sigma_hi: float
    sigma_data: float
    weight: float | None
    weight_everywhere: float | None
    metric: str
    source: str

    def interval(self, sigma_data=1.0):
        """The GuidanceInterval for a model whose data has standard deviation `sigma_data` (1 for SD and SDXL)."""
        bounds = (rescale_sigma(s, self.sigma_data, sigma_data) for s in (self.sigma_lo, self.sigma_hi))
        return GuidanceInterval(*bounds)


def _edm_sigma(step, num_steps=32, sigma_min=0.002, sigma_max=80.0, rho=7):
    """Noise level of a step in the authors' schedule (Karras et al. 2022, eq. 5)."""
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (ends[0] + step / (num_steps - 1) * (ends[1] - ends[0])) ** rho


def _edm2(name, first, last, weight, weight_everywhere, metric):
    # The authors give the first and last guided step; the half-open interval ends at the step after.
    return Preset(
        name=name,
        model="EDM2-XXL, ImageNet-512",
        sigma_lo=_edm_sigma(last + 1),
        sigma_hi=_edm_sigma(first),
        sigma_data=0.5,
        weight=weight,
        weight_everywhere=weight_everywhere,
        metric=metric,
        source=f"{PAPER}; {REPO} generate_zip.py: steps [{first}, {last}] of 32",
    )


PRESETS = {
    p.name: p
    for p in (
        Preset(
            name="sdxl",
            model="Stable Diffusion XL",
            sigma_lo=0.28,
            sigma_hi=5.42,
            sigma_data=1.0,
            weight=None,
            weight_everywhere=None,
            metric="by eye",
            source=f"{PAPER}, Stable Diffusion XL results",
        ),
        #                             steps     weight, without       chosen by
        _edm2("edm2-xxl-fid",         17, 22,   2.0, 1.2,             "FID 1.40 (1.81 without the interval)"),
        _edm2("edm2-xxl-fd-dinov2",   13, 19,   2.9, 1.7,             "FD_DINOv2"),
    )
}  # fmt: skip


def get_preset(name):
    """The preset of that name; raises ValueError, with the names there are, for another."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
