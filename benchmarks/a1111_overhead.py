"""What our callback adds to one denoiser call of Automatic1111, guided and not, in a stand-in of its denoiser.

The network is an identity, so that nothing but the patch is timed: the callback, the rows that it takes and puts
back, and the weight. What an unguided call saves is not counted. `python benchmarks/a1111_overhead.py`
"""

import argparse
import statistics
import time
import types

import torch
from guidance_interval import GuidanceInterval
from guidance_interval.a1111 import patch
from guidance_interval.a1111.settings import Settings

INTERVAL = GuidanceInterval(0.28, 5.42)


class Network(torch.nn.Module):
    """Stands for the host's CompVisDenoiser (with `sigmas`) or, for the timestep samplers, its model."""

    def __init__(self, timesteps):
        super().__init__()
        alphas = torch.linspace(0.9999, 0.0047, 1000, dtype=torch.float64)
        if timesteps:
            self.inner_model = types.SimpleNamespace(alphas_cumprod=alphas)
        else:
            self.sigmas = ((1 - alphas) / alphas).sqrt()

    def forward(self, x, sigma, cond):
        return x


def combine_denoised(x_out, conds_list, uncond, cond_scale):
    """Automatic1111's (modules/sd_samplers_cfg_denoiser.py)."""
    denoised_uncond = x_out[-uncond.shape[0] :]
    denoised = torch.clone(denoised_uncond)
    for i, conds in enumerate(conds_list):
        for cond_index, weight in conds:
            denoised[i] += (x_out[cond_index] - denoised_uncond[i]) * (weight * cond_scale)
    return denoised


def call_of(batch, timesteps, sigma, ours):
    """One denoiser call, as the host makes it, with our callback or without it."""
    network = Network(timesteps)
    prompts = types.SimpleNamespace(batch=[[types.SimpleNamespace(weight=1.0)] for _ in range(batch)])
    denoiser = types.SimpleNamespace(
        inner_model=network,
        combine_denoised=combine_denoised,
        sampler=types.SimpleNamespace(sampler_extra_args={"cond": prompts}),
        p=types.SimpleNamespace(guidance_interval=patch.Generation(Settings(INTERVAL)), is_hr_pass=False),
    )
    x, text = torch.randn(2 * batch, 4, 64, 64), torch.randn(batch, 77, 768)
    params = types.SimpleNamespace(
        denoiser=denoiser, x=x, sigma=torch.full([2 * batch], sigma), text_cond=text, text_uncond=text
    )
    cond = {"c_crossattn": [torch.cat([text, text])], "c_concat": [torch.zeros(2 * batch, 5, 1, 1)]}
    conds = [[(i, 1.0)] for i in range(batch)]

    def call():
        if ours:
            patch.on_cfg_denoiser(params)
        denoiser.combine_denoised(network(params.x, params.sigma, cond=cond), conds, text, 7.0)

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=200, help="per round")
    parser.add_argument("--rounds", type=int, default=30, help="the median round counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        ("Euler, guided", "host"): call_of(args.batch, False, 1.0, False),
        ("Euler, guided", "ours"): call_of(args.batch, False, 1.0, True),
        ("Euler, not guided", "host"): call_of(args.batch, False, 10.0, False),
        ("Euler, not guided", "ours"): call_of(args.batch, False, 10.0, True),
        ("DDIM, guided", "host"): call_of(args.batch, True, 400.5, False),
        ("DDIM, guided", "ours"): call_of(args.batch, True, 400.5, True),
        ("DDIM, not guided", "host"): call_of(args.batch, True, 990.5, False),
        ("DDIM, not guided", "ours"): call_of(args.batch, True, 990.5, True),
    }
    times = {key: [] for key in cases}
    with torch.inference_mode():
        for _ in range(args.rounds):  # Interleaved: whatever else the machine does hits all of them.
            for key, call in cases.items():
                begin = time.perf_counter()
                for _ in range(args.calls):
                    call()
                times[key].append((time.perf_counter() - begin) / args.calls * 1e6)
    median = {key: statistics.median(t) for key, t in times.items()}
    print(
        f"Automatic1111's denoiser call, batch {args.batch}, torch {torch.__version__}; median of {args.rounds} rounds"
    )
    print("| per call | host, us | with ours, us | more, us |\n| --- | ---: | ---: | ---: |")
    for name in dict.fromkeys(name for name, _ in cases):
        host, ours = median[name, "host"], median[name, "ours"]
        print(f"| {name} | {host:.1f} | {ours:.1f} | {ours - host:+.1f} |")


if __name__ == "__main__":
    main()
