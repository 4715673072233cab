"""What ComfyUI's registry packs, `.comfyignore` applied, is all that the nodes need, and little more."""

import subprocess
import sys
from pathlib import Path

import comfy_harness as harness
import pytest

ROOT = harness.ROOT
LOAD = """
import sys, types
import comfy_harness as harness
harness.ROOT = harness.Path(sys.argv[2])
host = harness.start_comfyui(sys.argv[1])
model, vae, latent = harness.run_node(host, "GuidanceIntervalDemoModel")[:3]
print(type(model).__name__, sum(name.startswith("GuidanceInterval") for name in host.nodes))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with the tracked files that `.comfyignore`, in git's own syntax, leaves."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: what is tracked is not known")
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = [
        set(subprocess.run([*git, *more], check=True, capture_output=True, text=True).stdout.split("\0")) - {""}
        for more in ([], ["-c", "-i", f"--exclude-from={ROOT / '.comfyignore'}"])
    ]
    folder = tmp_path_factory.mktemp("registry") / "guidance_interval_nodes"
    for name in listed[0] - listed[1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_the_package_is_small_and_has_no_tests_and_no_other_models(packed):
    names = {str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()}
    assert {"__init__.py", "toy/emoji.safetensors", "README.md", "workflows/01_try_it.json"} <= names
    assert {"LICENSE", "NOTICE"} <= names
    assert [n for n in names if n.endswith(".safetensors")] == ["toy/emoji.safetensors"]
    assert not [n for n in names if n.startswith(("tests/", "docs/", "benchmarks/", "scripts/"))]
    assert sum(p.stat().st_size for p in packed.rglob("*") if p.is_file()) < 12 * 2**20


def test_all_that_is_imported_is_packed(packed, dangling_imports):
    assert dangling_imports(packed) == []


def test_comfyui_loads_it_and_the_demo_model_with_it(host, packed):
    command = [sys.executable, "-c", LOAD, str(host.path), str(packed)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kind, nodes = done.stdout.split()[-2:]
    assert kind.endswith("ModelPatcher") and int(nodes) >= 9
