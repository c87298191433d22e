"""Stored offsets come back as they were put in, as exactly as their dtype allows, and take the bytes they say."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from bpfx import _shelf
from bpfx._offset_state import GROUP, OffsetState

SHAPES: list[tuple[int, ...]] = [(), (1,), (127,), (128,), (129,), (1000,), (7, 37), (64, 3, 3, 3), (0,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
STORED = [None, torch.float32, torch.bfloat16, torch.float16, "int8"]


def value_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of very different size, so that a scale for all of them would show."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2)]
    number = torch.complex(*parts) if dtype.is_complex else parts[0]
    return (number * torch.logspace(-2, 1, max(1, math.prod(shape)))[: math.prod(shape)].view(shape)).to(dtype)


def real(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).double().flatten()


def bound(value: Tensor, stored: torch.dtype | str | None) -> Tensor:
    """The largest error that the documentation allows, number by number."""
    flat = real(value)
    own = value.dtype.to_real() if value.dtype.is_complex else value.dtype
    rounding = flat.abs() * torch.finfo(own).eps  # coming back in the parameter's dtype
    if stored is None:
        return torch.zeros_like(flat)
    if stored == "int8":
        padded = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % GROUP)).view(-1, GROUP)
        largest = padded.amax(1, keepdim=True) if padded.numel() else padded
        return rounding + (largest / 127 / 2 * (1 + 1e-5)).expand(-1, GROUP).flatten()[: flat.numel()]
    return rounding + flat.abs() * torch.finfo(stored).eps / 2 + torch.finfo(stored).smallest_normal


def stored_in(stored: torch.dtype | str | None, values: dict[str, Tensor]) -> OffsetState:
    state = OffsetState(stored)
    for name, value in values.items():
        state.put(name, value.clone())
    return state


def assert_within(found: Tensor, value: Tensor, *dtypes: torch.dtype | str | None) -> None:
    assert found.shape == value.shape and found.dtype == value.dtype and found.device == value.device
    allowed = sum((bound(value, dtype) for dtype in dtypes), torch.zeros_like(real(value)))
    assert ((real(found) - real(value)).abs() <= allowed).all()


# --- one offset -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_is_within_the_bound(dtype: torch.dtype, stored: torch.dtype | str | None) -> None:
    values = {str(shape): value_of(shape, dtype) for shape in SHAPES}
    state = stored_in(stored, values)
    assert list(state) == list(values) and len(state) == len(values)
    for name, value in values.items():
        assert_within(state[name], value, stored)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_foreseen(dtype: torch.dtype, stored: torch.dtype | str | None) -> None:
    values = {str(shape): value_of(shape, dtype) for shape in SHAPES}
    state = stored_in(stored, values)
    held = sum(t.nbytes for entry in state.state().values() for t in entry["parts"])
    assert state.nbytes == state.bytes_for(iter(values.values())) == held


def test_eight_bits_take_a_quarter() -> None:
    values = {"w": value_of((512, 64), torch.float32)}
    assert stored_in("int8", values).nbytes == pytest.approx(values["w"].nbytes / 4, rel=0.035)
    assert stored_in(torch.bfloat16, values).nbytes == values["w"].nbytes / 2


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_zeros_stay_zeros(stored: torch.dtype | str | None) -> None:
    mixed = torch.zeros(300)
    mixed[200] = 3.0  # in the second group of three
    state = stored_in(stored, {"all": torch.zeros(300), "some": mixed, "tiny": torch.full((5,), 1e-42)})
    assert not state["all"].any()
    assert torch.equal(state["some"] != 0, mixed != 0)
    assert state["tiny"].isfinite().all() and (state["tiny"] - 1e-42).abs().max() < 1e-37


def test_eight_bits_keep_the_largest_and_its_sign() -> None:
    values = value_of((1000,), torch.float32)
    found = stored_in("int8", {"w": values})["w"]
    for begin in range(0, 1000, GROUP):
        group, own = values[begin : begin + GROUP], found[begin : begin + GROUP]
        at = group.abs().argmax()
        assert own[at] == pytest.approx(float(group[at]), rel=1e-6)
    assert ((found == 0) | (found.sign() == values.sign())).all()


def test_one_outlier_spoils_its_own_group_only() -> None:
    values = torch.full((512,), 0.01)
    values[130] = 1e6
    found = stored_in("int8", {"w": values})["w"]
    assert not found[128:256].eq(values[128:256])[3:].any() and found[130] == pytest.approx(1e6)
    outside = torch.cat([found[:128], found[256:]])
    torch.testing.assert_close(outside, torch.full_like(outside, 0.01))


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels last"])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, "int8"], ids=str)
def test_layouts_other_than_rows(stored: torch.dtype | str | None, layout: str) -> None:
    value = {
        "transposed": value_of((9, 40), torch.float32).t(),
        "strided": value_of((40, 18), torch.float32)[::2, ::3],
        "channels last": value_of((2, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last),
    }[layout]
    state = OffsetState(stored)
    state.put("w", value)
    found = state["w"]
    rows = stored_in(stored, {"w": value.contiguous()})["w"]
    assert torch.equal(found, rows)
    assert_within(found.contiguous(), value.contiguous(), stored)


def test_a_conjugate_is_resolved() -> None:
    value = value_of((50,), torch.complex64)
    state = OffsetState()
    state.put("w", value.conj())
    assert torch.equal(state["w"], value.conj().resolve_conj())


# --- all of them ------------------------------------------------------------------------------------------------------


def test_the_last_put_counts() -> None:
    state = stored_in("int8", {"a": torch.ones(3), "b": torch.ones(200)})
    state.put("a", torch.full((5,), 2.0))
    assert torch.equal(state["a"], torch.full((5,), 2.0)) and list(state) == ["a", "b"]
    state.keep(lambda name: name == "b")
    assert list(state) == ["b"] and "a" not in state and state.nbytes == 200 + 8
    with pytest.raises(KeyError):
        state["a"]


@pytest.mark.parametrize("target", STORED, ids=str)
@pytest.mark.parametrize("source", STORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_a_state_loads_into_another_dtype(
    dtype: torch.dtype, source: torch.dtype | str | None, target: torch.dtype | str | None
) -> None:
    """Through a file; where both are stored alike nothing is rounded again."""
    values = {str(shape): value_of(shape, dtype) for shape in SHAPES if 0 not in shape}
    first = stored_in(source, values)
    stream = io.BytesIO()
    torch.save(first.state(), stream)
    second = OffsetState(target)
    second.put("old", torch.ones(3))
    second.load(torch.load(io.BytesIO(stream.getvalue()), weights_only=True), lambda name: torch.device("cpu"))
    assert list(second) == list(values)
    assert second.nbytes == second.bytes_for(iter(values.values()))
    for name, value in values.items():
        if source == target:
            assert torch.equal(second[name], first[name])
        else:
            # the second rounding is of the first's result, which may be a little larger than the value
            assert_within(second[name], value, source, target, target if target != "int8" else source)


def test_loading_copies() -> None:
    first = stored_in(None, {"w": torch.ones(4)})
    second = OffsetState()
    second.load(first.state(), lambda name: torch.device("cpu"))
    first["w"].fill_(7.0)
    assert torch.equal(second["w"], torch.ones(4))


@pytest.mark.parametrize("stored", [None, torch.bfloat16, "int8"], ids=str)
def test_kept_elsewhere_they_are_the_same(stored: torch.dtype | str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied away and back, prefetched or not, moved before or after; none stays fetched."""
    values = {"a": value_of((300,), torch.float32), "b": value_of((7, 37), torch.complex64)}
    here = stored_in(stored, values)
    monkeypatch.setattr(_shelf, "moves", lambda device, home: True)
    away, moved = OffsetState(stored, "cpu"), stored_in(stored, values)
    for name, value in values.items():
        away.put(name, value)
    moved.move(torch.device("cpu"))
    for state in (away, moved):
        assert all(part.away for s in state._stored.values() for part in s.parts)
        for name in values:
            state.prefetch(name)
            for _ in range(2):
                assert torch.equal(state[name], here[name])
        state.prefetch("unknown")
        assert state.nbytes == here.nbytes
        assert all(part.fetched is None for s in state._stored.values() for part in s.parts)
