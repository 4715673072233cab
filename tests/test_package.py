"""The repository as a package: what an install holds, and that it needs nothing but torch and numpy."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import guidance_interval
import pytest
from hypothesis import settings

ROOT = Path(guidance_interval.__file__).parent
# Stands before the import of what a user may not have: hosts, the lab's extra.
WITHOUT = """
import sys
for name in ("comfy", "modules", "k_diffusion", "safetensors", "matplotlib", "scipy", "tqdm", "torchvision", "mlxtend"):
    sys.modules[name] = None
"""


def python(code, path, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=path, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    args = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *args], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The root of an unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import os, sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as packed:
        packed.extractall(folder, filter="data")
    (root,) = (path for path in folder.iterdir() if path.is_dir())
    return root


NOTICES = ("LICENSE", "NOTICE")  # NOTICE names whose drawings the models were trained on.


def test_the_wheel_and_the_sdist_carry_the_licence_and_the_notice(wheel, sdist):
    with zipfile.ZipFile(wheel) as packed:
        held = {Path(n).name: packed.read(n) for n in packed.namelist() if ".dist-info/licenses/" in n}
    assert held == {name: (ROOT / name).read_bytes() for name in NOTICES}
    assert all((sdist / name).read_bytes() == (ROOT / name).read_bytes() for name in NOTICES)


def test_all_that_is_imported_is_packed(wheel, sdist, tmp_path, dangling_imports):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert dangling_imports(tmp_path / "guidance_interval") == []
    assert dangling_imports(sdist) == []
    page = Path("tune", "report", "page")
    assert {p.name for p in (sdist / page).iterdir()} == {p.name for p in (ROOT / page).iterdir()}


def test_an_import_that_leads_nowhere_is_found(tmp_path, dangling_imports):
    (tmp_path / "room").mkdir()
    (tmp_path / "__init__.py").write_text("name = 1\n")
    (tmp_path / "room" / "__init__.py").write_text("from .. import name, gone\nfrom ..lost.room import x\n")
    assert dangling_imports(tmp_path) == ["room/__init__.py: gone", "room/__init__.py: lost/room"]


def test_the_wheel_holds_the_package_the_model_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("__init__.py", "sampler_patch.py", "cli.py", "lab/demo.py", "toy/digits.safetensors"):
        assert f"guidance_interval/{name}" in names
    page = "tune/report/page"
    assert {f"guidance_interval/{page}/{p.name}" for p in (ROOT / page).iterdir()} < set(names)
    assert not [n for n in names if n.startswith(("tests", "lab/", "guidance_interval/tests", "benchmarks"))]
    entry = [n for n in names if n.endswith("entry_points.txt")]
    assert "guidance-interval = guidance_interval.cli:main" in zipfile.ZipFile(wheel).read(entry[0]).decode()


PUBLIC = ("sampler_patch", "noise_level", "presets", "interval_text", "measure/metrics")


def untyped(tree):
    """The public functions and methods without a type for each argument, but for those that overloads declare."""
    scopes = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
    for function in (n for body in scopes for n in body if isinstance(n, ast.FunctionDef)):
        arguments = [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")]
        is_public = not function.name.startswith("_") or function.name == "__init__"
        if is_public and not (function.returns and all(a.annotation for a in arguments)):
            yield function.name


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_interface_is_typed(wheel, module):
    names = zipfile.ZipFile(wheel).namelist()
    assert "guidance_interval/py.typed" in names
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    overloaded = set(re.findall(r"@overload\ndef (\w+)", source))
    assert set(untyped(ast.parse(source))) <= overloaded


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


def test_the_models_of_the_experiments_stay_in_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert not list(tmp_path.glob("guidance_interval/lab/**/*.safetensors"))
    code = "import sys; sys.path.insert(0, '.'); from guidance_interval import cli; sys.exit(cli.main(sys.argv[1:]))"
    for command in (["results", "--quick"], ["sweep", "--model", "clips"]):
        done = python(code, tmp_path, *command)
        assert done.returncode == 2 and not (tmp_path / "out").exists()
        assert "is not in the installed package; run this in a clone of the repository" in done.stderr


def test_the_old_name_of_the_models_still_works():
    from guidance_interval.lab import model as old
    from guidance_interval.toy import model

    assert old is model


def test_importing_the_package_imports_no_host_and_no_lab():
    done = python("import sys, guidance_interval; print(*sys.modules)", "/")
    loaded = {m for m in done.stdout.split() if m.startswith("guidance_interval.")}
    assert loaded == {f"guidance_interval.{m}" for m in ("errors", "files", "noise_level", "presets", "sampler_patch")}
    others = {"comfy", "modules", "k_diffusion", "matplotlib", "safetensors"}
    assert not others & {m.partition(".")[0] for m in done.stdout.split()}


# What the rooms may need beyond torch and numpy. Hosts bring what nodes/, a1111/ and scripts/ import of theirs.
EXTRAS = {"": [], "toy": ["lab"], "lab": ["lab", "cluster", "train"], "measure": ["measure"], "tune": ["tune"],
          "benchmarks": ["measure", "dev", "comfy-test"], "tests": ["measure", "dev", "comfy-test"]}  # fmt: skip
OTHERS = {"comfy", "comfy_api", "comfy_extras", "comfyui_version", "nodes", "folder_paths", "backend", "gradio", "ldm",
          "ldm_patched", "modules", "modules_forge", "webui", "fastapi", "omegaconf", "open_clip"}  # fmt: skip


def requirements(extras):
    """Names of the distributions that a list of extras asks for."""
    tomllib = pytest.importorskip("tomllib")  # Of Python 3.11.
    names, project = set(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in (project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)):
        for requirement in group:
            name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
            names |= (
                requirements(inner.split(",")) if name == project["name"] else {re.sub(r"[-_.]+", "-", name).lower()}
            )
    return names


def imported(path):
    """The top-level packages that a file imports, anywhere in it, but for our own and the standard library's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


LAZY = {"filelock", "tomlkit", "rich"}  # Of presets.py and files.py, for the commands alone.


def test_what_the_commands_alone_import_is_of_their_extra():
    assert requirements(["tune"]) >= LAZY


@pytest.mark.parametrize("room", EXTRAS)
def test_every_room_s_extra_declares_what_it_imports(room):
    distributions = metadata.packages_distributions()
    files = [*ROOT.glob("*.py"), *(ROOT / "nodes").glob("*.py"), *(ROOT / "a1111").glob("*.py")]
    files = files if not room else list((ROOT / room).rglob("*.py"))
    local = {"guidance_interval", *(p.stem for p in (ROOT / "tests").rglob("*.py")), *sys.stdlib_module_names}
    local |= OTHERS | (
        {"PIL", "aiohttp", *LAZY} if not room else set()
    )  # Every host has Pillow; ComfyUI's server is aiohttp.
    local |= {p.stem for p in files}  # Scripts that import each other.
    declared = requirements(EXTRAS[room])
    missing = {
        f"{name} ({path.name})"
        for path in files
        for name in set(imported(path)) - local
        if not {re.sub(r"[-_.]+", "-", d).lower() for d in distributions.get(name, [name])} & declared
    }
    assert files and not missing


def test_hypothesis_sets_no_deadline():
    assert settings().deadline is None  # A busy machine would miss it.


def test_the_version_is_one():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.M)[1] == guidance_interval.__version__
    assert f"## {guidance_interval.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_place_names_the_same_version():
    found = {
        "pyproject.toml": r'^version = "(.+)"',
        "__init__.py": r'^__version__ = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "CHANGELOG.md": r"^## (\d.+)",
    }
    versions = {name: re.search(form, (ROOT / name).read_text(), re.M)[1] for name, form in found.items()}
    assert set(versions.values()) == {guidance_interval.__version__}, versions
