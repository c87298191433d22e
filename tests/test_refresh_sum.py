"""Differences of several pieces make up the offset of their mean, also where some of them are not finite."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx._correction import REFRESH
from bpfx._offset_state import OffsetState
from bpfx._refresh import BlockFound, RefreshSum
from bpfx._scales import Products

NAN = float("nan")
PRODUCTS = Products(square=1.0, noise=None, behind=None, ahead=None)
BLOCK = BlockFound(
    cosine=0.5, ratio=1.0, staleness=None, spread=None, descent=None, bp=1.0, local=1.0, norm=1.0, products=PRODUCTS
)


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


# --- where a refresh takes its samples --------------------------------------------------------------------------------


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 6), torch.arange(n) % 3) for n in sizes]


def converted(offset: bpfx.Offset | None) -> bpfx.Step:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return bpfx.convert(net, F.cross_entropy, batches(4)[0], blocks=["2"], offset=offset)


@pytest.mark.parametrize(
    ("batch", "sizes", "held"), [(64, (4, 4), 8), (9, (4, 4), 8), (6, (5,), 5)], ids=["far", "one more", "in one batch"]
)
def test_a_refresh_of_more_samples_than_there_are_is_refused(batch: int, sizes: tuple[int, ...], held: int) -> None:
    step = converted(bpfx.Offset(period=1, batch=batch, data=batches(*sizes)))
    with pytest.raises(bpfx.BpfxError, match=rf"batch={batch}\) is larger than Offset\(data=…\), whose {held} samples"):
        step(*batches(4)[0]).backward()
    assert step.iteration == 0 and not dict(step.offset_state)


def test_a_refresh_may_begin_in_the_middle_of_the_data() -> None:
    """All eight samples: four that are left of the last pass, and four of the next."""
    step = converted(bpfx.Offset(period=1, batch=8, data=batches(4, 4, 4)))
    for _ in range(5):
        step(*batches(4)[0]).backward()
    assert step.iteration == 5


def test_a_smaller_last_batch_is_taken_whole() -> None:
    """Smaller than those before it, that is; B′ above all of them is a mistake."""
    whole, short = batches(6, 3)
    found = []
    for batch in (6, 5, 3, None):
        step = converted(bpfx.Offset(period=1, batch=batch))  # its example has 4 samples
        if batch is not None and batch > 3:
            with pytest.raises(bpfx.BpfxError, match=f"batch={batch}.* is larger than the current batch of 3"):
                step(*short)
        step(*whole).backward()
        again = converted(bpfx.Offset(period=1, batch=batch))
        again.load_state_dict(step.state_dict())
        again(*short).backward()
        found.append(again.diagnostics.refreshes[-1]["blocks"][0]["bp"])
    assert found[0] > 0 and found == pytest.approx([found[0]] * 4)


@pytest.mark.parametrize("sizes", [(), (0, 0)])
def test_data_without_samples_is_refused(sizes: tuple[int, ...]) -> None:
    step = converted(bpfx.Offset(period=1, batch=8, data=batches(*sizes)))
    with pytest.raises(bpfx.BpfxError, match="holds no batches|whose 0 samples"):
        step(*batches(4)[0]).backward()


def test_data_that_cannot_be_iterated_again_is_used_up() -> None:
    step = converted(bpfx.Offset(period=1, batch=8, data=iter(batches(4, 4, 4))))
    step(*batches(4)[0]).backward()
    with pytest.raises(bpfx.BpfxError, match="is used up; pass what can be iterated again"):
        step(*batches(4)[0]).backward()


def test_a_clip_goes_by_the_local_gradient_as_it_is() -> None:
    """With α = 0 the correction is all there is; a limit of zero would stop the training."""
    step = converted(bpfx.Offset(period=2, form="B", alpha=0.0, clip=2.0))
    step(*batches(4)[0]).backward()
    assert float(step.model[0].weight.grad.norm()) > 1e-3


@pytest.mark.parametrize("options", [{"period": 4}, {"bounds": (4, 8)}, {"period": 4, "lam": "auto"}], ids=str)
def test_a_step_that_fails_behind_its_refresh_is_as_if_it_had_not_been(options: dict[str, Any]) -> None:
    """The next call measures once more: the same gradients, one record, as in a run in which nothing failed."""
    found = []
    for fails in (False, True):
        step = converted(bpfx.Offset(batch=2, **options))
        torch.manual_seed(1)
        given = batches(*[4] * 12)
        for t, batch in enumerate(given):
            step.zero_grad()
            if fails and step._correction is not None and step._correction.kind(t) == REFRESH:
                with mock.patch.object(step, "_run_local", side_effect=MemoryError), pytest.raises(MemoryError):
                    step(*batch)
            step(*batch).backward()
            with torch.no_grad():
                for parameter in step.parameters():
                    parameter.sub_(0.05 * parameter.grad)
        found.append((step.state_dict(), [r["iteration"] for r in step.diagnostics.refreshes]))
    assert found[0][1] == found[1][1]
    tensors = [{n: t for n, t in state.items() if isinstance(t, Tensor)} for state, _ in found]
    torch.testing.assert_close(tensors[0], tensors[1])


def test_a_state_without_offsets_begins_with_a_refresh() -> None:
    plain, step = converted(None), converted(bpfx.Offset(bounds=(4, 16)))
    for batch in batches(*[4] * 6):
        plain(*batch).backward()
        step(*batch).backward()
    step.load_state_dict(plain.state_dict())
    assert step.iteration == 6 and not dict(step.offset_state)
    assert step._correction is not None and step._correction.kind(6) == REFRESH


def test_a_state_of_another_version_is_refused() -> None:
    step = converted(bpfx.Offset())
    state = step.state_dict()
    del state["_extra_state"]["correction"]["pace"]
    with pytest.raises(bpfx.BpfxError, match="lacks pace: another version of bpfx saved it"):
        step.load_state_dict(state)


def test_a_block_that_keeps_its_old_offset_keeps_its_age() -> None:
    """λ decays from the refresh that a block's Δ comes from, not from a later one that failed there."""
    step = converted(bpfx.Offset(period=2, decay=0.5))
    correction = step._correction
    assert correction is not None
    step(*batches(4)[0]).backward()
    step(*batches(4)[0]).backward()
    blocks = sorted(set(correction.block_of.values()) - {correction.last})
    found = correction.settle(2, dict.fromkeys(blocks[1:], BLOCK))
    assert [record["lam"] for record in found] == [1.0] * len(blocks[1:])
    assert [correction.lam(k, 2) for k in blocks] == [0.25] + [1.0] * len(blocks[1:])
    again = converted(bpfx.Offset(period=2, decay=0.5))
    assert again._correction is not None
    again._correction.load_progress(correction.progress())
    assert again._correction.lam(blocks[0], 3) == 0.125
