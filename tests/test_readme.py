"""The examples of the README and of docs/ run as they stand there, on the CPU."""

import re
from pathlib import Path

import guidance_interval
import pytest
import torch

ROOT = Path(guidance_interval.__file__).parent
README = (ROOT / "README.md").read_text()
K_DIFFUSION = (ROOT / "docs" / "k-diffusion.md").read_text()


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


def test_the_examples_of_k_diffusion_md_run_as_they_stand_there(capsys):
    """In their order; one that begins with its imports is complete in itself."""
    told = []
    for example in re.findall(r"```python\n(.*?)```", K_DIFFUSION, re.S):
        if example.startswith("import"):
            names = {}
        exec(example, names)
        told += zip(re.findall(r"print\(.*\)  # (\d+)", example), capsys.readouterr().out.splitlines(), strict=True)
    assert len(told) == 3
    assert all(printed.split()[0] == number for number, printed in told), told


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_unets_of_k_diffusion_md_denoise_as_diffusers_does(prediction_type):
    names = {}
    exec(re.findall(r"```python\n(.*?)```", K_DIFFUSION, re.S)[-1].replace(
        "DDPMScheduler(", f'DDPMScheduler(clip_sample=False, prediction_type="{prediction_type}", '
    ), names)  # fmt: skip
    unet, scheduler, model = (names[name] for name in ("unet", "scheduler", "model"))
    x, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    for t in (0, 100, 500, 999):
        alpha_bar, sigma = scheduler.alphas_cumprod[t], model.sigmas[t]
        with torch.inference_mode():
            noisy = x * alpha_bar.sqrt() * (1 + sigma)
            output = unet(noisy, t, encoder_hidden_states=prompt).sample
            expected = scheduler.step(output, t, noisy).pred_original_sample
            denoised = model(noisy / alpha_bar.sqrt(), sigma.repeat(2), encoder_hidden_states=prompt)
            torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4 * (1 + sigma.item()))
    unet.bfloat16()
    with torch.inference_mode():
        kwargs = dict(
            cond={"encoder_hidden_states": prompt.bfloat16()}, uncond={"encoder_hidden_states": prompt.bfloat16()}
        )
        denoised = names["denoiser"](x.bfloat16(), torch.full((2,), 2.0).bfloat16(), **kwargs, cond_scale=7.0)
    assert denoised.dtype == torch.bfloat16 and denoised.isfinite().all()


def test_every_picture_and_page_that_it_names_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).is_file(), target
