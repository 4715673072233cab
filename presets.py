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
    weight: the guidance weight (cfg) chosen with the interval, or None where the source names none.
    weight_everywhere: the best weight without an interval, likewise.
    metric: what they were chosen by, if the source says. source: where it is published, and for what sampling.
    """

    name: str
    model: str
    sigma_lo: float
    sigma_hi: float
    sigma_data: float
    weight: float | None
    weight_everywhere: float | None
    metric: str | None
    source: str

    def interval(self, sigma_data=1.0):
        """The GuidanceInterval for a model whose data has standard deviation `sigma_data` (1 for SD and SDXL)."""
        bounds = (rescale_sigma(s, self.sigma_data, sigma_data) for s in (self.sigma_lo, self.sigma_hi))
        return GuidanceInterval(*bounds)


def _edm2(name, steps, sigma_lo, sigma_hi, weight, weight_everywhere, metric):
    # The authors name the first and the last guided step of 32 from 80 to 0.002; the bounds, in this form and
    # rounded to two digits, guide those same steps.
    return Preset(
        name=name,
        model="EDM2-XXL, ImageNet-512",
        sigma_lo=sigma_lo,
        sigma_hi=sigma_hi,
        sigma_data=0.5,
        weight=weight,
        weight_everywhere=weight_everywhere,
        metric=metric,
        source=f"{PAPER}; {REPO} generate_zip.py: steps {steps} of 32",
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
            weight=16.0,  # With other samplers, schedules and fine-tunes a matter of taste again.
            weight_everywhere=None,
            metric="visual inspection",
            source=f"{PAPER}, section 4.3: 32 steps of Heun's method from sigma 14.61",
        ),
        #                           steps       interval     weight, without   chosen by
        _edm2("edm2-xxl-fid",       "[17, 22]", 0.19, 1.61,  2.0, 1.2,         "FID: 1.40, without the interval 1.81"),
        _edm2("edm2-xxl-fd-dinov2", "[13, 19]", 0.60, 5.00,  2.9, 1.7,         "FD_DINOv2"),
    )
}  # fmt: skip


def get_preset(name):
    """The preset of that name; raises ValueError, with the names there are, for another."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
