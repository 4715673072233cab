"""The rooms of the house and the arrows between them, as CONTRIBUTING.md names them and as the code has them."""

import ast
import re
from pathlib import Path

import guidance_interval

ROOT = Path(guidance_interval.__file__).parent
FOLDERS = ("a1111", "benchmarks", "lab", "measure", "nodes", "scripts", "toy", "tune")


def room_of(path):
    """The folder at the root that holds a file, or the file itself."""
    return path.parts[0] if path.parts[0] in FOLDERS else str(path)


def imported(path, root):
    """The files of ours that a file imports, anywhere in it, relative to `root`."""
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "guidance_interval":
            base = Path(*node.module.split(".")[1:])
        else:
            continue
        for name in (alias.name for alias in node.names):
            places = (base / f"{name}.py", base / name / "__init__.py", Path(f"{base}.py"), base / "__init__.py")
            yield next(place for place in places if (root / place).is_file())


def arrows(root):
    """`{room: rooms that it imports}` of the package's own code."""
    files = [path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    files += [path.relative_to(root) for path in root.glob("*.py")]
    found = {room_of(path): set() for path in files}
    for path in files:
        found[room_of(path)] |= {room_of(other) for other in imported(path, root)} - {room_of(path)}
    return found


def named():
    """The same, from the table in CONTRIBUTING.md."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| .+ \| (.+) \|$", page, flags=re.MULTILINE)
    return {
        room.strip("/"): {other.strip("/") for other in re.findall(r"`(.+?)`", others)}
        for rooms, others in rows
        for room in re.findall(r"`(.+?)`", rooms)
    }


def test_contributing_names_every_arrow_and_no_other():
    code = {room: others for room, others in arrows(ROOT).items()}
    table = {room: others for room, others in named().items() if room in code}
    assert table == code


def test_no_arrow_leads_upwards():
    """In the table's order, each room imports rooms that stand above it there."""
    order = list(named())
    for room, others in named().items():
        assert all(order.index(other) < order.index(room) for other in others), room


def test_every_arrow_of_a_package_is_seen(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "errors.py").touch()
    (tmp_path / "files.py").write_text("def f():\n    from .toy import x\n    from . import errors\n")
    (tmp_path / "toy" / "model.py").write_text("from ..errors import UserError\nfrom guidance_interval import files\n")
    assert arrows(tmp_path) == {"errors.py": set(), "files.py": {"toy", "errors.py"}, "toy": {"errors.py", "files.py"}}
