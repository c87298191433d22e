"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import warnings

import pytest

import bpfx
import bpfx.models
import bpfx.passes

# bpfx.passes and bpfx.models lie in other folders, so walking bpfx alone does not find them.
MODULES = sorted(
    {
        module.name
        for package in (bpfx, bpfx.passes, bpfx.models)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not module.name.endswith("__main__")
    }
    | {"bpfx", "bpfx.models", "bpfx.passes"}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, f"{failed} examples of {name} fail; see the captured output"
