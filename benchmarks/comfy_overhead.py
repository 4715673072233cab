"""What the patch costs in ComfyUI: CFG everywhere, our node, and the floor, in one process with a tiny model.

    python benchmarks/comfy_overhead.py [--steps 20] [--batch 2] [--size 16] [--repeats 15]

The ComfyUI is the one that COMFYUI_PATH names, or else the one that `make test` installs. The floor is what the
same run would take if each evaluation cost what its rows cost: the time of an evaluation of B rows (conditional
alone) and of 2B rows (CFG), both measured in whole runs, times how many of each the interval makes. On a GPU the
host syncs that the patch makes are counted too.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "nodes"))

import comfy_harness as harness

INTERVAL = (0.28, 5.42)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=16, help="of the latent")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        host = harness.start_comfyui(harness.find_comfyui(scratch), cpu=not torch.cuda.is_available())
        with torch.inference_mode():
            run(host, args)


def run(host, args):
    import comfy.model_management
    import comfy.samplers

    patch = harness.our_module(host, "model_patch")
    device = comfy.model_management.get_torch_device()
    plain = harness.tiny_model("sd15", device=device)
    ours = patch.patch_model(plain, patch.in_edm_units(patch.GuidanceInterval(*INTERVAL)))
    sigmas = comfy.samplers.calculate_sigmas(plain.get_model_object("model_sampling"), "karras", args.steps)
    guided = int(patch.model_interval(ours).mask(sigmas[:-1]).sum())
    latent = harness.empty_latent("sd15", args.batch, args.size)

    def sample(model, cfg):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(harness.conditioning(1), harness.conditioning(2))
        guider.set_cfg(cfg)
        with harness.counted_rows(model) as rows:
            start = time.perf_counter()
            final = harness.sample(guider, comfy.samplers.sampler_object("euler"), sigmas, latent)
            final.sum().item()
            return time.perf_counter() - start, rows[0]

    settings = {"CFG at every step": (plain, 7.0), "conditional only": (plain, 1.0), "our node": (ours, 7.0)}
    settings["our node, no step guided"] = (patch.patch_model(plain, patch.nowhere), 7.0)
    seconds, rows = {name: [] for name in settings}, {}
    for setting in settings.values():
        sample(*setting)
    for _ in range(args.repeats):  # In turn, so that a slow moment of the machine falls on all.
        for name, setting in settings.items():
            taken, rows[name] = sample(*setting)
            seconds[name].append(taken)
    cfg, cond, node, unguided = medians = [statistics.median(seconds[name]) for name in settings]
    floor = (guided * cfg + (args.steps - guided) * cond) / args.steps
    floor_rows = args.batch * (args.steps + guided)

    print(f"ComfyUI {host.version}, torch {torch.__version__}, {device}, euler, {args.steps} karras steps, ", end="")
    print(f"batch {args.batch}, {guided} steps guided, median of {args.repeats} runs")
    print("| setting | rows | seconds |\n| --- | --- | --- |")
    for name, taken in zip(settings, medians, strict=True):
        print(f"| {name} | {rows[name]} | {taken:.4f} |")
    print(f"| floor | {floor_rows} | {floor:.4f} |")
    print(f"our node against the floor: {node / floor - 1:+.1%} in time, {rows['our node'] - floor_rows:+d} rows")
    print(f"the patch's decision, per evaluation: {1e6 * cost_of_patch(patch, ours, device):.1f} microseconds")
    print(f"an evaluation outside against the host's at cfg 1: {unguided / cond - 1:+.1%} in time")
    if device.type == "cuda":
        print(f"host syncs of the patch, per evaluation: {syncs_of_patch(patch, ours, device)}")


def call_patch(patch, model, device):
    """A function that makes the patch decide on one evaluation, with nothing behind it to evaluate."""
    import comfy.samplers
    from comfy.patcher_extension import WrapperExecutor, WrappersMP

    (wrapper,) = model.get_wrappers(WrappersMP.PREDICT_NOISE, patch.host.KEY)
    guider = comfy.samplers.CFGGuider(model)
    guider.conds, guider.cfg = {"positive": [], "negative": []}, 7.0
    setattr(guider, patch.host.KEY, patch.SamplingRun(patch.model_interval(model)))
    executor = WrapperExecutor.new_class_executor(lambda x, *args: x, guider, [wrapper])
    x, sigma = torch.zeros(4, 4, 8, 8, device=device), torch.full((4,), 1.0, device=device)
    return lambda: executor.execute(x, sigma, {}, 0)


def cost_of_patch(patch, model, device, calls=2000):
    call = call_patch(patch, model, device)
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def syncs_of_patch(patch, model, device):
    call = call_patch(patch, model, device)
    call()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


if __name__ == "__main__":
    main()
