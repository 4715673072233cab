"""What shows on a GPU alone: host syncs as CUDA counts them, and that its results are the CPU's."""

import warnings

import pytest
import torch
from guidance_interval import CFGDenoiser, GuidanceInterval, noise_level

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: host syncs are counted there")

INTERVAL = GuidanceInterval(0.1, 2.5)
SIGMAS = noise_level.schedule("karras", 8, 0.01, 40.0).float()
HEUN = SIGMAS[:-1].repeat_interleave(2)[1:]  # As Heun's method evaluates them.


def evaluate(denoiser, levels, cond_scale=3.0):
    x, kwargs = torch.randn(4, 1, 8, 8, device="cuda"), {"a": torch.zeros(4, device="cuda")}
    for sigma in levels:
        denoiser(x, sigma, cond=kwargs, uncond=kwargs, cond_scale=cond_scale)


def rows(levels):
    return torch.as_tensor(levels, device="cuda")[:, None].expand(-1, 4).contiguous()


@pytest.mark.parametrize(
    ("levels", "kwargs", "cond_scale", "syncs"),
    [
        (SIGMAS[:-1], dict(), 3.0, len(SIGMAS) - 1),
        (SIGMAS[:-1], dict(), [3.0, 1.0, 2.0, 2.0], len(SIGMAS) - 1),
        (SIGMAS[:-1], dict(), torch.tensor([3.0, 1.0, 2.0, 2.0]), 2 * (len(SIGMAS) - 1)),
        (HEUN, dict(sigmas=SIGMAS, per_step=True), 3.0, len(HEUN)),
    ],
    ids=["a number", "weights on the host", "weights on the GPU", "per step"],
)
def test_host_syncs_of_a_run(levels, kwargs, cond_scale, syncs):
    """One per evaluation, and one more where the weights have to be read too."""
    if isinstance(cond_scale, torch.Tensor):
        cond_scale = cond_scale.cuda()
    denoiser = CFGDenoiser(lambda x, sigma, a: x * 0.5, INTERVAL, **kwargs)
    levels = rows(levels)
    evaluate(denoiser, levels, cond_scale)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            evaluate(denoiser, levels, cond_scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing CUDA operation" in str(w.message) for w in caught) == syncs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mask_rows_and_membership_agree_at_the_bounds(dtype):
    bounds = torch.tensor([0.1, 2.5], dtype=dtype)
    sigma = torch.cat([bounds, bounds.nextafter(torch.zeros(2, dtype=dtype)), bounds.nextafter(bounds * 2)]).cuda()
    mask = INTERVAL.mask(sigma)
    assert mask.tolist() == INTERVAL.guided_rows(sigma) == [s in INTERVAL for s in sigma]
    assert mask.tolist() == [False, True, False, True, True, False]


def test_a_mixed_batch_equals_the_cpu_s():
    sigma = torch.tensor([5.0, 1.0, 0.05, 2.5])
    x, a, b = torch.randn(4, 3), torch.rand(4, 1), torch.rand(4, 1)

    def run(device, cond_scale):
        denoiser = CFGDenoiser(lambda x, sigma, a: x * a + sigma[:, None], INTERVAL)
        cond, uncond = {"a": a.to(device)}, {"a": b.to(device)}
        return denoiser(x.to(device), sigma.to(device), cond=cond, uncond=uncond, cond_scale=cond_scale).cpu()

    for cond_scale in (2.0, [2.0, 3.0, 1.0, 4.0]):
        torch.testing.assert_close(run("cuda", cond_scale), run("cpu", cond_scale))
