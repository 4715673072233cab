"""What CFGDenoiser itself costs per evaluation, against a hand-written CFG closure, in one run.

The denoiser is an identity, so that nothing but the wrapper is timed. `python benchmarks/overhead.py`
"""

import argparse
import statistics
import time

import torch
from guidance_interval import CFGDenoiser, GuidanceInterval

INTERVAL = GuidanceInterval(0.28, 5.42)


def identity(x, sigma, context):
    return x


def closure(x, sigma, cond, uncond, cond_scale):
    """Classifier-free guidance, by hand."""
    context = torch.cat([cond["context"], uncond["context"]])
    c, u = identity(torch.cat([x, x]), torch.cat([sigma, sigma]), context=context).chunk(2)
    return u + (c - u) * cond_scale


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=500, help="per round")
    parser.add_argument("--rounds", type=int, default=30, help="the median round counts")
    args = parser.parse_args()

    device, b = torch.device(args.device), args.batch
    x = torch.randn(b, 4, 64, 64, device=device)
    cond, uncond = ({"context": torch.randn(b, 77, 64, device=device)} for _ in range(2))
    inside, outside = torch.full([b], 1.0, device=device), torch.full([b], 10.0, device=device)
    ours = CFGDenoiser(identity, INTERVAL)
    cases = {
        "CFG by hand": (closure, inside),
        "CFGDenoiser, guided": (ours, inside),
        "cond by hand": (lambda x, sigma, cond, uncond, cond_scale: identity(x, sigma, **cond), outside),
        "CFGDenoiser, not guided": (ours, outside),
    }

    def measure(fn, sigma):
        begin = time.perf_counter()
        for _ in range(args.evaluations):
            fn(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / args.evaluations * 1e6

    times = {name: [] for name in cases}
    with torch.inference_mode():
        for _ in range(args.rounds):  # Interleaved: whatever else the machine does hits all of them.
            for name, (fn, sigma) in cases.items():
                times[name].append(measure(fn, sigma))
    median = {name: statistics.median(t) for name, t in times.items()}

    print(f"{device}, batch {b}, torch {torch.__version__}; median of {args.rounds} rounds")
    print("| per evaluation | us | more than by hand, us | ratio |\n| --- | ---: | ---: | ---: |")
    for name, us in median.items():
        base = median["cond by hand" if "not" in name or name == "cond by hand" else "CFG by hand"]
        print(f"| {name} | {us:.1f} | {us - base:+.1f} | {us / base:.2f} |")


if __name__ == "__main__":
    main()
