"""Shared by all tests: the model that ships, loaded once; and how Hypothesis tries its examples."""

import ast
import contextlib
import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # Begun in the background: what tests start would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # The web UIs' environments need not have it.
    import hypothesis

    # One profile for all: without a deadline, which a busy machine misses.
    hypothesis.settings.register_profile("guidance-interval", deadline=None)
    hypothesis.settings.load_profile("guidance-interval")


@pytest.fixture(scope="session")
def lab():
    from guidance_interval.toy import model

    return model.load()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dangling_imports():
    """A function of a package's folder: ["file: import"] of the relative imports that lead to no file in it."""

    def find(folder):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                    of_it = [base / alias.name for alias in node.names] if node.module is None else [base]
                    for target in of_it:
                        found = target.with_suffix(".py").is_file() or (target / "__init__.py").is_file()
                        if not found and not _defines(base / "__init__.py", target.name):
                            yield f"{path.relative_to(folder)}: {target.relative_to(folder)}"

    return lambda folder: sorted(find(folder))


def _defines(module, name):
    return module.is_file() and name in module.read_text(encoding="utf-8")
