"""docs/performance.md and its figure, from what `gpu.py` measured: `python benchmarks/gpu_report.py [JSON]`.

Runs of a few configurations, performance-*.json beside it, are told at the end.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from gpu import CFG, COMPILED, COND, EAGER, GRAPHS, JSON_FILE, NETWORKS, OURS, OVERRIDE, READ
from guidance_interval.files import aligned, atomic_path
from guidance_interval.lab.plots import GUIDED, INK
from matplotlib import pyplot as plt

FORMS = {EAGER: "at best", COMPILED: "when compiled", GRAPHS: "with CUDA graphs"}
DOCS = Path(__file__).resolve().parents[1] / "docs"


def write(content, docs=DOCS, others=()):
    """Write performance.md and images/performance.png in the folder `docs`, whole or not at all.

    others: (file name, content) of runs of a few configurations, told at the end.
    """
    figure = docs / "images" / "performance.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(content["rows"], figure)
    with atomic_path(docs / "performance.md") as tmp:
        tmp.write_text(page(content, drawn, others))
    print(f"wrote {docs / 'performance.md'}")


def done(rows):
    return [row for row in rows if "settings" in row]


def title(row):
    c = row["config"]
    name = NETWORKS[c["network"]].title + (f", latent {' x '.join(map(str, c['size']))}" if c["size"] else "")
    name += f", batch {c['batch']}, {c['sampler']}" + ("" if c["form"] == EAGER else f", {c['form']}")
    return name if c["through"] == "ComfyUI" else f"{name}, {c['through']}"


def seconds(row, name):
    setting = row["settings"].get(name)
    return f"{setting['median']:.{2 if setting['median'] >= 1 else 3}f}" if setting else ""


def times_as_fast(row):
    return statistics.median(
        a / b for a, b in zip(row["settings"][CFG]["seconds"], row["settings"][OURS]["seconds"], strict=True)
    )


def slower(row, name, than):
    """By which share the setting `name` takes longer: the median of the rounds."""
    pairs = zip(row["settings"][name]["seconds"], row["settings"][than]["seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs) - 1


def over_floor(setting):
    r = setting["over_floor"]
    return f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"


def of_machine(m):
    software = ", ".join(f"{k} {m[k]}" for k in ("comfyui", "torch", "cuda", "k_diffusion", "python") if m.get(k))
    return f"one {m['card']} (driver {m.get('driver', 'unknown')}; {software})"


def seconds_table(rows):
    packs = list(dict.fromkeys(n for r in rows for n in r["settings"] if n not in (CFG, COND, OURS, OVERRIDE, READ)))
    head = ["", "guided steps", CFG, COND, OURS, "CFG Override", *packs, "ours over the floor", f"{CFG} / {OURS}"]
    body = []
    for row in rows:
        taken = (seconds(row, n) for n in (CFG, COND, OURS, OVERRIDE, *packs))
        guided = f"{row['guided_steps']} of {row['steps']}"
        body.append([title(row), guided, *taken, over_floor(row["settings"][OURS]), f"{times_as_fast(row):.2f}"])
    return aligned(head, body)


def page(content, drawn, others=()):
    rows = done(content["rows"])
    later = [row | {"later": True} for _, other in others for row in done(other["rows"])]
    interval = f"({content['interval'][0]:g}, {content['interval'][1]:g}]"
    counted = []
    for row in rows:
        s = row["settings"]
        found = {n: s[n]["counts"] for n in (OURS, CFG) if s.get(n, {}).get("counts")}
        per = lambda name, what, found=found: (  # noqa: E731
            "" if found.get(name, {}).get(what) is None else f"{found[name][what] / found[name]['evaluations']:g}"
        )
        peak = found.get(OURS, {}).get("peak")
        counted.append([
            title(row), per(OURS, "syncs"), per(CFG, "syncs"), per(OURS, "kernels"), per(CFG, "kernels"),
            f"{row['graphs_first']}, then {row['graphs_later']}", f"{peak / 2**30:.1f}" if peak else "",
        ])  # fmt: skip
    known = [row["config"] for row in later]
    missing = [
        f"- {title(row)}: {row['error']}" for row in content["rows"] if "error" in row and row["config"] not in known
    ]
    counts_head = ["", "syncs, ours", "syncs, CFG", "kernels, ours", "kernels, CFG", "graphs", "peak GiB"]
    text = (
        "# Performance\n\n"
        f"Written by `python benchmarks/gpu_report.py` from `{JSON_FILE.name}`, which `python benchmarks/gpu.py` "
        f"measured in one run on {of_machine(content['machine'])}. Networks have "
        f"their real sizes and random weights; the interval is {interval}, and (0.1, 3.5] for the emoji model.\n\n"
        "## Seconds against the floor\n\n"
        "The *floor* is what a run would take if each evaluation cost what its rows cost: from the runs of CFG and of "
        "the conditional prediction alone in the same round. Medians of rounds in which the settings run in turn; in "
        "brackets the lowest and the highest round. *CFG Override* is the host's own node, set to weight 1 outside the "
        "same steps.\n\n"
        f"{seconds_table(rows)}\n\n"
    )  # fmt: skip
    if drawn:
        text += (
            "![Seconds of a run against the share of guided steps, with the floor drawn through]"
            "(images/performance.png)\n\n"
        )
    text += batch_one([*rows, *later])
    text += (
        "## Syncs, kernels, graphs, memory\n\n"
        "For each evaluation, of two evaluations of which one is guided: times that the host waits for the GPU, and "
        "kernels. *Graphs*: those that `torch.compile` made in the first run of all settings, and after it.\n\n"
        f"{aligned(counts_head, counted)}\n"
    )
    if read := [r for r in rows if READ in r["settings"]]:
        changes = [f"{slower(r, READ, OURS):+.1%} ({title(r)})" for r in read]
        text += (
            "\nEuler evaluates each level of its schedule once, so our node waits for no sigma; most other samplers of "
            "the host wait for numbers of their own at every step. Reading the sigmas of Euler changes a run by "
            f"{', '.join(changes)}.\n"
        )
        if told := [r for r in read if "same_bits" in r]:
            differ = [title(r) for r in told if not r["same_bits"][READ]]
            twice = [title(r) for r in told if not r["same_bits"][OURS]]
            text += (
                f"The latents with sigma read differ for {'; '.join(differ) or 'none'}; those of two equal runs for "
                f"{'; '.join(twice) or 'none'}.\n"
            )
    for name, other in others:
        text += (
            f"\n## A run of its own: `{name}`\n\nOn {of_machine(other['machine'])}.\n\n"
            f"{seconds_table(done(other['rows']))}\n"
        )
    if missing:
        text += "\n## Not measured\n\n" + "\n".join(missing) + "\n"
    return text


def waits_for_kernels(row):
    return row["settings"][CFG]["median"] < 1.5 * row["settings"][COND]["median"]


def batch_one(rows):
    """What helps a single image of a network that does not fill the GPU with one; "" if none was measured."""
    one_a_step = [r for r in rows if r["config"]["sampler"] in ("euler", "dpmpp_2m") and not r["config"]["size"]]
    one_a_step = [r for r in one_a_step if "later" not in r or r["config"]["form"] != EAGER]
    single = [r for r in one_a_step if r["config"]["batch"] == 1 and waits_for_kernels(r)]
    text = ""
    for network in dict.fromkeys(r["config"]["network"] for r in single):
        shown = [r for r in one_a_step if r["config"]["network"] == network]
        shown.sort(key=lambda r: (r["config"]["batch"], r["config"]["form"] != EAGER))
        body = []
        for row in shown:
            c, s = row["config"], row["settings"]
            taken = [f"{milliseconds(row, n):.3g}" for n in (CFG, COND, OURS)]
            twice = f"{s[CFG]['median'] / s[COND]['median']:.2f}"
            kind = [f"{c['batch']}", c["sampler"], c["through"], c["form"] + (" *" if "later" in row else "")]
            body.append([*kind, *taken, twice, f"{times_as_fast(row):.2f}"])
        head = ["batch", "sampler", "through", "form", CFG, COND, OURS, f"{CFG} / {COND}", f"{CFG} / {OURS}"]
        of_one = [r for r in shown if r["config"]["batch"] == 1]
        eager, alone, best = map(fastest, ([r for r in of_one if r["config"]["form"] == EAGER], of_one, shown))
        text += (
            f"{NETWORKS[network].title}:\n\n{aligned(head, body)}\n\n"
            f"Alone, an image takes {milliseconds(eager, OURS):.3g} ms a step in the interval, and "
            f"{milliseconds(alone, OURS):.3g} ms {FORMS[alone['config']['form']]}; in a batch of "
            f"{best['config']['batch']} it takes {milliseconds(best, OURS):.3g} ms.\n\n"
        )
    if not text:
        return ""
    return (
        "## One image at a time\n\n"
        "A fast GPU may wait for its next kernel rather than compute. Then half the rows take more than half of the "
        "time, and the interval saves less than its rows. A larger batch helps most. A single image is helped by CUDA "
        "graphs of a compiled network, which take the launches away; compiling alone does less. "
        "Milliseconds for each step of each image:"
        f"\n\n{text}"
        "In ComfyUI, *compiled* and *CUDA graphs* are the backends inductor and cudagraphs of its TorchCompileModel "
        'node; for CFGDenoiser, `torch.compile(network)` and the same with `mode="reduce-overhead"`.'
        + (" Rows with * are of the run of its own.\n\n" if any("later" in r for r in one_a_step) else "\n\n")
    )


def milliseconds(row, name):
    """For each step of each image."""
    return 1000 * row["settings"][name]["median"] / row["steps"] / row["config"]["batch"]


def fastest(rows):
    return min(rows, key=lambda row: milliseconds(row, OURS))


def draw(rows, path):
    """Seconds against the share of guided steps; returns whether there was anything to draw."""
    shown = [row for row in done(rows) if row["curve"]]
    if not shown:
        return False
    fig, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 3.8), squeeze=False, layout="constrained")
    for ax, row in zip(axes[0], shown, strict=True):
        s, steps = row["settings"], row["steps"]
        ax.plot([0, 1], [s[COND]["median"], s[CFG]["median"]], color="#999999", lw=1.2, label="floor")
        for k, runs in row["curve"].items():
            ax.scatter([int(k) / steps] * len(runs), runs, s=16, color=GUIDED, alpha=0.4, lw=0)
        medians = sorted((int(k) / steps, statistics.median(runs)) for k, runs in row["curve"].items())
        ax.plot(*zip(*medians, strict=True), "o", color=GUIDED, ms=6, label="ours, median")
        ax.set_title(title(row), fontsize=9, color=INK)
        ax.set_xlabel("share of guided steps")
        ax.set_ylim(0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds a run")
    axes[0, 0].legend(frameon=False, fontsize=8)
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", dpi=130, facecolor="white")
    plt.close(fig)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, nargs="?", default=JSON_FILE, help="what gpu.py wrote")
    path = parser.parse_args().json
    others = sorted(path.parent.glob(f"{path.stem}-*.json"))
    write(json.loads(path.read_text()), others=[(other.name, json.loads(other.read_text())) for other in others])


if __name__ == "__main__":
    main()
