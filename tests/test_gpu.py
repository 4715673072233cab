"""What shows on a GPU alone: host syncs, and the check of a schedule given up front."""

import warnings

import pytest
import torch
from guidance_interval import CFGDenoiser, GuidanceInterval, noise_level

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: host syncs are counted there")

INTERVAL = GuidanceInterval(0.1, 2.5)
SIGMAS = noise_level.schedule("karras", 8, 0.01, 40.0).float()
HEUN = torch.cat([SIGMAS[:-1].repeat_interleave(2)[1:], SIGMAS[-1:]])  # As Heun's method evaluates them.


def evaluate(denoiser, levels):
    x, kwargs = torch.randn(4, 1, 8, 8, device="cuda"), {"a": torch.zeros(4, device="cuda")}
    for sigma in levels:
        denoiser(x, sigma, cond=kwargs, uncond=kwargs, cond_scale=3.0)


def rows(levels):
    return torch.as_tensor(levels, device="cuda")[:, None].expand(-1, 4).contiguous()


@pytest.mark.parametrize(
    ("levels", "kwargs", "syncs"),
    [
        (SIGMAS[:-1], dict(sigmas=SIGMAS), 1),
        (HEUN[:-1], dict(sigmas=HEUN), 1),
        (HEUN[:-1], dict(sigmas=SIGMAS, per_step=True), 1),
        (SIGMAS[:-1], dict(), len(SIGMAS) - 1),
    ],
    ids=["schedule", "schedule of Heun", "per step", "no schedule"],
)
def test_host_syncs_of_a_run(levels, kwargs, syncs):
    """One at the end of the run with the schedule up front; without it, one per evaluation."""
    denoiser = CFGDenoiser(lambda x, sigma, a: x * 0.5, INTERVAL, **kwargs)
    levels = rows(levels)
    evaluate(denoiser, levels)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            evaluate(denoiser, levels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing CUDA operation" in str(w.message) for w in caught) == syncs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_plan_decides_as_sigma_does(dtype):
    levels = rows(SIGMAS[:-1]).to(dtype)
    planned = CFGDenoiser(lambda x, sigma, a: x * 0.5, INTERVAL, sigmas=SIGMAS)
    unplanned = CFGDenoiser(lambda x, sigma, a: x * 0.5, INTERVAL)
    evaluate(planned, levels)
    evaluate(unplanned, levels)
    assert planned.rows == unplanned.rows == 4 * (len(levels) + int(INTERVAL.mask(SIGMAS).sum()))


def test_a_run_that_strays_from_the_schedule_raises():
    denoiser = CFGDenoiser(lambda x, sigma, a: x * 0.5, INTERVAL, sigmas=torch.tensor([8.0, 4.0, 2.0, 0.0]))
    with pytest.raises(RuntimeError, match="3 evaluations from 8 to 2"):
        evaluate(denoiser, rows([8.0, 4.0, 4.0]))
    evaluate(denoiser, rows([8.0, 4.0, 2.0]))


def test_a_mixed_batch_equals_the_cpu_s():
    sigma = torch.tensor([5.0, 1.0, 0.05, 2.5])
    x, a, b = torch.randn(4, 3), torch.rand(4, 1), torch.rand(4, 1)

    def run(device):
        denoiser = CFGDenoiser(lambda x, sigma, a: x * a + sigma[:, None], INTERVAL)
        cond, uncond = {"a": a.to(device)}, {"a": b.to(device)}
        return denoiser(x.to(device), sigma.to(device), cond=cond, uncond=uncond, cond_scale=2.0).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"))
