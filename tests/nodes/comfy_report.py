"""docs/compatibility.md: what the matrix measured, one section per version of ComfyUI."""

import re
from collections import Counter
from dataclasses import dataclass

from comfy_harness import DIFFERENT, EXACT, ROOT, ROUNDING

DOC = ROOT / "docs" / "compatibility.md"
SEMANTIC = "documented semantic"
RANK = {EXACT: 0, ROUNDING: 1, SEMANTIC: 2}  # From best to worst.
HEAD = """\
# What was tested in ComfyUI, cell by cell

Written by the tests: `python -m pytest tests/nodes --write-compatibility`, with `COMFYUI_PATH` naming the ComfyUI to
test (without it, the one that `make test` installs) and `ANIMATEDIFF_PATH` a clone of AnimateDiff-Evolved. Each cell
samples with tiny random-weight models in the real ComfyUI and compares every single evaluation, from the same x, with
references that do not know our node:

- inside the interval, with the same chain of nodes without ours;
- outside, with the conditional prediction evaluated alone (`conditional only`), or with all other patches acting on
  it at weight 1 (`keep other patches`);
- the rows that the network evaluated, with the least possible: those references' own.

Node packs that evaluate in a way of their own are compared, outside, with what they give themselves at weight 1.

`exact` is equality bit for bit and in rows. `exact up to rounding` is equality in rows, and in values up to the given
relative figure, the reference having evaluated other batch sizes. The rest is a documented semantic, with its reason.
"""


@dataclass
class Cell:
    group: str
    name: str
    outside: str
    verdict: str
    note: str


class Report:
    def __init__(self, version, writing):
        self.version = version
        self.cells = []
        self.written = {} if writing else _read().get(version, {})

    def add(self, group, name, outside, verdict, reason=None, stated=False):
        """Keep a harness.Verdict and assert that it is exact, or different for the reason that the test gives.

        stated: the reference itself embodies the reason, and the cell must be exact against it.
        """
        kind, note = verdict.kind, ""
        if kind == ROUNDING:
            note = f"{verdict.error:.0e}"
        if reason is not None and stated == (kind != DIFFERENT):
            kind, note = SEMANTIC, reason
        self.cells.append(Cell(group, name, outside, kind, note))
        assert kind in RANK, verdict
        said = self.written.get((group, name, outside), kind)
        assert RANK[kind] <= RANK[said], f"{DOC.name} says {said!r}, but it is {kind!r}"

    def section(self):
        counts = Counter(cell.verdict for cell in self.cells)
        lines = [f"## ComfyUI {self.version}", ""]
        lines.append(", ".join(f"{counts[k]} {k}" for k in (EXACT, ROUNDING, SEMANTIC)) + f": {len(self.cells)} cells.")
        for group in dict.fromkeys(cell.group for cell in self.cells):
            cells = [cell for cell in self.cells if cell.group == group]
            names = dict.fromkeys(cell.name for cell in cells)
            columns = dict.fromkeys(cell.outside for cell in cells)
            table = {(cell.name, cell.outside): cell for cell in cells}
            lines += ["", f"### {group}", "", f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
            for name in names:
                texts = []
                for column in columns:
                    cell = table.get((name, column))
                    texts.append("" if cell is None else cell.verdict + (f": {cell.note}" if cell.note else ""))
                lines.append(f"| {name} | {' | '.join(texts)} |")
        return "\n".join(lines) + "\n"

    def write(self):
        sections = _sections()
        sections[self.version] = self.section()
        ordered = sorted(sections.items(), key=lambda item: [int(n) for n in item[0].split(".")])
        DOC.parent.mkdir(exist_ok=True)
        DOC.write_text(HEAD + "\n" + "\n".join(text.strip() + "\n" for _, text in ordered), encoding="utf-8")


def _sections():
    """{version: its text} of the document as it is."""
    old = DOC.read_text(encoding="utf-8") if DOC.exists() else ""
    return {m[1]: m[0] for m in re.finditer(r"^## ComfyUI (\S+)\n.*?(?=^## |\Z)", old, re.M | re.S)}


def _read():
    """{version: {(group, name, outside): verdict}} of the document as it is."""
    versions = {}
    for version, text in _sections().items():
        cells = versions[version] = {}
        group = columns = None
        for line in text.splitlines():
            if line.startswith("### "):
                group = line[4:]
            elif line.startswith("| | "):
                columns = [c.strip() for c in line.strip("|").split("|")[1:]]
            elif line.startswith("| ") and "---" not in line:
                name, *verdicts = (c.strip() for c in line.strip("|").split("|"))
                for column, verdict in zip(columns, verdicts, strict=True):
                    cells[group, name, column] = verdict.split(": ")[0]
    return versions
