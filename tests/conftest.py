"""Shared by all tests: the model that ships, loaded once."""

import pytest
import torch


@pytest.fixture(scope="session")
def lab():
    from guidance_interval.lab import model

    return model.load()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
