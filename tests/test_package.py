"""The repository as a package: what an install holds, and that it needs nothing but torch and numpy."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import guidance_interval
import pytest

ROOT = Path(guidance_interval.__file__).parent
# Stands before the import of what a user may not have: hosts, the lab's extra.
WITHOUT = """
import sys
for name in ("comfy", "modules", "k_diffusion", "safetensors", "matplotlib", "scipy", "tqdm", "torchvision", "mlxtend"):
    sys.modules[name] = None
"""


def python(code, path):
    return subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    args = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *args], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_the_model_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("__init__.py", "sampler_patch.py", "cli.py", "lab/demo.py", "lab/digits.safetensors"):
        assert f"guidance_interval/{name}" in names
    assert not [n for n in names if n.startswith(("tests", "lab/", "guidance_interval/tests", "benchmarks"))]
    entry = [n for n in names if n.endswith("entry_points.txt")]
    assert "guidance-interval = guidance_interval.cli:main" in zipfile.ZipFile(wheel).read(entry[0]).decode()


def test_an_installed_wheel_works_without_hosts_and_without_the_lab(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = WITHOUT + (
        "sys.path.insert(0, '.')\n"
        "from guidance_interval import GuidanceInterval, CFGDenoiser, cli, noise_level\n"
        "import guidance_interval; print(guidance_interval.__file__)\n"
        "assert cli.main(['info']) == 0\n"
        "sys.exit(cli.main(['demo']))"
    )
    done = python(code, tmp_path)
    assert done.stdout.startswith(str(tmp_path)), done.stdout + done.stderr
    assert "sdxl" in done.stdout
    assert done.returncode == 2 and "pip install -e '.[lab]'" in done.stderr


def test_importing_the_package_imports_no_host_and_no_lab():
    code = "import sys, guidance_interval; print(sorted(m for m in sys.modules if m.partition('.')[0] in " + (
        "{'comfy', 'modules', 'k_diffusion', 'matplotlib', 'safetensors'} or m.startswith('guidance_interval.lab')))"
    )
    assert python(code, "/").stdout.strip() == "[]"


def test_the_version_is_one():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.M)[1] == guidance_interval.__version__
    assert f"## {guidance_interval.__version__}" in (ROOT / "CHANGELOG.md").read_text()
