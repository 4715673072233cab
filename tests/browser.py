"""The browser that tests drive."""

import os
import shutil

import pytest


def chromium():
    """The path of a Chromium: CHROMIUM_PATH, or the first on PATH; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium: install one, or set CHROMIUM_PATH")
    return path
