"""What every test file needs: no network, one thread per worker, and bpfx before anything imports torchvision."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import bpfx  # noqa: F401  (declares torchvision's operators where its own library does not load)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """No test depends on the random draws of the test before it, nor looks through the objects of imported libraries.

    Measuring memory walks over all objects that the collector knows, which takes half a second with a few large
    libraries and next to nothing without what was there before.
    """
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()
