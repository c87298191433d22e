"""Differences of several pieces make up the offset of their mean, also where some of them are not finite."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from bpfx._offset_state import OffsetState
from bpfx._refresh import RefreshSum

NAN = float("nan")


def settled(pieces: list[dict[int, dict[str, float]]], old: dict[str, float] | None = None) -> tuple[RefreshSum, dict]:
    """Equal pieces; each gives, by block and parameter, a difference. Blocks come from the last to the first."""
    state = OffsetState()
    for name, value in (old or {}).items():
        state.put(name, torch.tensor([value]))
    blocks = {name: k for piece in pieces for k, found in sorted(piece.items(), reverse=True) for name in found}
    total = RefreshSum(state, blocks)
    for piece in pieces:
        for k in sorted(piece, reverse=True):
            deltas: dict[str, Tensor] = {n: torch.tensor([v]) for n, v in piece[k].items()}
            total.settle(k, deltas, defaultdict(float), 1 / len(pieces))
    total.finish()
    return total, {name: float(value) for name, value in state.items()}


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([{0: {"a": 1.0}, 1: {"b": 2.0}}, {0: {"a": 3.0}, 1: {"b": 4.0}}], {"a": 2.0, "b": 3.0}),
        ([{0: {"a": 1.0}, 1: {"b": 2.0}}, {0: {"a": NAN}, 1: {"b": 4.0}}], {"a": 1.0, "b": 3.0}),
        ([{0: {"t": 1.0}, 1: {"t": 2.0}}, {0: {"t": 3.0}, 1: {"t": 4.0}}], {"t": 5.0}),
        ([{0: {"t": 1.0}, 1: {"t": 2.0}}, {0: {"t": NAN}, 1: {"t": NAN}}], {"t": 3.0}),
        ([{0: {"t": NAN}, 1: {"t": 2.0}}, {0: {"t": 1.0}, 1: {"t": NAN}}], {"t": 3.0}),
    ],
    ids=["means", "without what is not finite", "tied", "tied, one piece out", "tied, other pieces out"],
)
def test_the_offset_is_the_mean_of_the_finite_pieces(
    pieces: list[dict[int, dict[str, float]]], expected: dict[str, float]
) -> None:
    _, found = settled(pieces)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_tied_parameter_without_a_mean_has_no_offset_and_says_so(bad: int) -> None:
    pieces = [{0: {"t": 1.0, "a": 1.0}, 1: {"t": 2.0, "b": 1.0}}, {0: {"t": 3.0, "a": 1.0}, 1: {"t": 4.0, "b": 1.0}}]
    pieces[1][bad]["t"] = NAN
    total, found = settled(pieces, old={"t": 7.0, "a": 0.0, "b": 0.0})
    assert found == pytest.approx({"a": 1.0, "b": 1.0})
    assert "t, in several blocks, has no offset" in str(total.complaint())
