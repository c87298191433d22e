"""A trainer that is stopped, interrupted, short of memory, or kept on another device takes the steps it would have."""

from __future__ import annotations

import copy
import gc
import io
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import assert_same_bits, seed_all
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from twins import adamw, batches_of, convert, fresh, train_blocks

import bpfx
from bpfx import _shelf
from bpfx.memory import measure_peak

STEPS = 7
BATCHES = batches_of("convnet", 5, STEPS)  # BatchNorm, dropout, four blocks
DEFAULTS: dict[str, Any] = {"micro_batches": 2, "lr_scheduler": partial(CosineAnnealingLR, T_max=9), "clip_norm": 1.0}


def make(offset: str | None = "int8", name: str = "convnet", size: int = 5, **options: Any) -> bpfx.BlockTrainer:
    """A trainer at the start; offsets are measured at 0, 3 and 6."""
    own = bpfx.Offset(period=3, dtype=None if offset == "fp32" else "int8") if offset else None
    return bpfx.BlockTrainer(fresh(name, size, own), adamw, **DEFAULTS | options)


def state_of(trainer: bpfx.BlockTrainer) -> dict[str, Any]:
    return copy.deepcopy(trainer.state_dict())


def without_records(state: dict[str, Any]) -> dict[str, Any]:
    """A refresh that is done again compares itself with nothing; all else is the same."""
    state["step"]["_extra_state"].pop("refreshes")
    (state["step"]["_extra_state"].get("correction") or {}).pop("stability", None)
    return state


def train(trainer: bpfx.BlockTrainer, start: int, stop: int) -> list[Tensor]:
    return train_blocks(trainer, BATCHES[start:stop], seed=100 + start)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_is_the_run_that_was_not_stopped(stop: int, mode: str) -> None:
    """The checkpoint loads with weights_only; the generator is the caller's to keep."""
    seed_all(1)
    whole = make(mode=mode)
    losses, stream = [], io.BytesIO()
    for t, batch in enumerate(BATCHES):
        if t == stop:
            torch.save({"trainer": whole.state_dict(), "rng": torch.get_rng_state()}, stream)
        losses.append(whole.step(*batch))
    expected = state_of(whole)

    case = zoo.convnet(5, seed=9)  # other weights, and nothing that ran before
    step = convert(case, list(zoo.CONVNET_CUTS), bpfx.Offset(period=3, dtype="int8"))
    resumed = bpfx.BlockTrainer(step, adamw, mode=mode, **DEFAULTS)
    saved = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["trainer"])
    torch.set_rng_state(saved["rng"])
    assert_same_bits([resumed.step(*batch) for batch in BATCHES[stop:]], losses[stop:])
    assert_same_bits(state_of(resumed), expected)
    assert next(iter(resumed.schedulers.values())).last_epoch == STEPS


# --- failure ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``fail(at)``: that call of autograd finds no memory, where a block's gradient begins; until ``fail.undo()``."""
    own = {name: getattr(torch.autograd, name) for name in ("grad", "backward")}

    def begin(at: int, error: BaseException | None = None) -> None:
        calls = iter(range(1, 1000))

        def call(name: str, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                raise error or torch.OutOfMemoryError("out of memory")
            return own[name](*args, **kwargs)

        for name in own:
            monkeypatch.setattr(torch.autograd, name, partial(call, name))

    begin.undo = monkeypatch.undo  # type: ignore[attr-defined]
    return begin


@pytest.mark.parametrize(
    ("options", "before", "at"),
    [
        ({}, 1, 1),
        ({}, 1, 2),  # the second micro-batch of the first block
        ({"mode": "bp"}, 0, 1),
        ({"mode": "bp"}, 2, 2),
        ({"clip": "global"}, 1, 1),
        ({"clip": "global"}, 2, 8),  # everything was swept once, for the norm
        ({"clip": "global"}, 2, 9),
        ({"clip": "global", "mode": "bp"}, 1, 7),
        ({"offset": None}, 1, 2),
        ({}, 3, 1),  # a refresh that had not begun to store
        ({"offset": "fp32"}, 3, 15),  # after a refresh: 2 pieces, and 7 gradients for each
    ],
)
def test_a_failure_before_the_first_block_changes_nothing(
    options: dict[str, Any], before: int, at: int, fail: Any
) -> None:
    trainer = make(**options)
    train(trainer, 0, before)
    state, rng = state_of(trainer), torch.get_rng_state()
    records = len(trainer.converted.diagnostics.refreshes)
    fail(at)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(*BATCHES[before])
    fail.undo()
    assert len(trainer.converted.diagnostics.refreshes) == records
    refreshed = at == 15
    kept = without_records if refreshed else lambda s: s
    found = kept(state_of(trainer))
    if refreshed:  # the new offset is there already, and will be measured again
        found["step"]["_extra_state"].pop("offset"), state["step"]["_extra_state"].pop("offset")
    assert_same_bits(found, kept(state))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in trainer.converted.parameters()) and trainer.broken is None
    losses = train(trainer, before, STEPS)
    found = kept(state_of(trainer))
    twin = make(**options)
    assert_same_bits(losses, train(twin, 0, STEPS)[before:])
    assert_same_bits(found, kept(state_of(twin)))


@pytest.mark.parametrize("at", range(2, 15))
def test_a_failure_inside_a_refresh_drops_the_offsets(at: int, fail: Any) -> None:
    """Half of the blocks may have had the new one. No step uses such a mixture: the next one measures again."""
    trainer = make()
    train(trainer, 0, 3)
    old, model = dict(trainer.converted.offset_state), copy.deepcopy(trainer.converted.model.state_dict())
    records = len(trainer.converted.diagnostics.refreshes)
    assert old
    fail(at, RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.step(*BATCHES[3])
    fail.undo()
    left = trainer.converted.offset_state
    assert not left or all(torch.equal(left[n], old[n]) for n in old)
    assert not left or at < 4, "a block was measured before the failure"
    assert_same_bits(trainer.converted.model.state_dict(), model)
    assert trainer.converted.iteration == 3 and trainer.broken is None
    assert len(trainer.converted.diagnostics.refreshes) == records
    losses = train(trainer, 3, STEPS)
    found = without_records(state_of(trainer))
    twin = make()
    assert_same_bits(losses, train(twin, 0, STEPS)[3:])
    assert_same_bits(found, without_records(state_of(twin)))


@pytest.mark.parametrize(("mode", "one_by_one"), [("local", False), ("bp", False), ("bp", True)])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_failure_after_a_block_was_stepped_breaks_the_trainer(
    blocks: int, mode: str, one_by_one: bool, fail: Any
) -> None:
    pieces = 1 if mode == "local" else 2  # with more, blocks of a local step may be stepped in groups
    trainer = make(mode=mode, micro_batches=pieces)
    trainer._one_by_one = one_by_one
    train(trainer, 0, 2)
    state = state_of(trainer)
    fail(4 + blocks + 1 if one_by_one else pieces * blocks + 1)  # of one by one, the second steps the blocks
    with pytest.raises(bpfx.BpfxError, match=rf"after {blocks} of 4 blocks.*out of memory.*load_state_dict") as refusal:
        trainer.step(*BATCHES[2])
    fail.undo()
    assert isinstance(refusal.value.__cause__, torch.OutOfMemoryError)
    assert trainer.broken is not None and len(str(refusal.value)) < 400
    assert all(p.grad is None for p in trainer.converted.parameters())
    for _ in range(2):
        with pytest.raises(bpfx.BpfxError, match=rf"{blocks} of 4.*load_state_dict"):
            trainer.step(*BATCHES[2])
    trainer.load_state_dict(state)
    assert trainer.broken is None
    losses = train(trainer, 2, STEPS)
    found = state_of(trainer)
    twin = make(mode=mode, micro_batches=pieces)
    twin._one_by_one = one_by_one
    assert_same_bits(losses, train(twin, 0, STEPS)[2:])
    assert_same_bits(found, state_of(twin))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(""), RuntimeError("first\nsecond")])
def test_an_optimizer_that_is_interrupted_breaks_the_trainer(error: BaseException) -> None:
    """Ctrl-C is passed on as it is; the model is half-way all the same."""
    trainer = make()
    trainer.step(*BATCHES[0])
    state = state_of(trainer)

    def interrupt(*_: Any) -> None:
        raise error

    hook = trainer.optimizers[0].register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else bpfx.BpfxError):
        trainer.step(*BATCHES[1])
    hook.remove()
    assert trainer.broken is not None and "1 of 4" in trainer.broken and "\n" not in trainer.broken
    with pytest.raises(bpfx.BpfxError, match=type(error).__name__):
        trainer.step(*BATCHES[1])
    trainer.load_state_dict(state)
    trainer.step(*BATCHES[1])


def test_a_scheduler_that_ends_too_early_breaks_the_trainer() -> None:
    """All blocks are stepped by then, and the schedule does not know."""
    trainer = make(lr_scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=2))
    train(trainer, 0, 1)
    with pytest.raises(bpfx.BpfxError, match=r"4 of 4 blocks.*2"):
        train(trainer, 1, 3)
    assert trainer.broken is not None and trainer.converted.iteration < 3


def test_an_error_that_is_kept_has_no_later_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that was left half-way is over when the error arrives, not when somebody lets go of it."""
    trainer = make(mode="bp")
    trainer.step(*BATCHES[0])
    rng = torch.get_rng_state()

    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", no_memory)
    with pytest.raises(torch.OutOfMemoryError) as kept:
        trainer.step(*BATCHES[1])
    assert torch.equal(torch.get_rng_state(), rng)
    del kept
    gc.collect()
    assert torch.equal(torch.get_rng_state(), rng)


# --- leaks ------------------------------------------------------------------------------------------------------------


def live() -> tuple[int, int]:
    """Number of live tensors, and bytes of their storages."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    plain = [t for t in tensors if type(t) in (torch.Tensor, nn.Parameter) and t.layout is torch.strided]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in plain)}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize(
    ("mode", "sizes", "steps"), [("local", (6, 4, 7), 2000), ("local", (6,), 400), ("bp", (6, 5), 400)]
)
def test_nothing_is_left_behind(mode: str, sizes: tuple[int, ...], steps: int) -> None:
    """Two thousand steps hold what a hundred hold, other batch sizes and refreshes in between."""
    trainer = make(name="mlp", size=6, mode=mode, lr_scheduler=None)
    batches = [zoo.mlp(size).batch for size in sizes]
    held = []
    for t in range(1, steps + 1):
        trainer.step(*batches[t % len(batches)])
        if t in (100, steps):
            held.append(live())
    assert len(held) == 2 and held[0] == held[1]


# --- away from the device ---------------------------------------------------------------------------------------------

AWAY: list[dict[str, Any]] = [
    {"state_device": "cpu"},
    {"parameter_device": "cpu"},
    {"boundary_device": "cpu"},
    {"state_device": "cpu", "parameter_device": "cpu", "boundary_device": "cpu"},
]


def fetched(trainer: bpfx.BlockTrainer) -> set[int]:
    """The blocks of whose optimizer state a copy is on the device."""
    idle = trainer._idle
    held = {k: {id(p) for g in o.param_groups for p in g["params"]} for k, o in trainer.optimizers.items()}
    away = [place for (place, _), parked in idle._state.items() if parked.fetched is not None]
    return {k for k, own in held.items() if own & set(away)}


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("options", AWAY, ids=lambda o: "+".join(k.split("_")[0] for k in o))
@pytest.mark.parametrize("copied", [False, True])
def test_state_that_waits_elsewhere_is_the_same_state(
    options: dict[str, Any], mode: str, copied: bool, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    """On the CPU alone home is where it is; with `copied` every tensor is really copied away and back."""
    clip: dict[str, Any] = {"clip": "global"} if "state_device" in options else {}
    twin = make(mode=mode, **clip)
    # As with what waits elsewhere: random numbers come in another order otherwise.
    twin._one_by_one &= not copied or set(options) == {"state_device"}
    losses = train(twin, 0, 5)
    expected = state_of(twin)
    x = BATCHES[0][0]
    shown = twin.converted.model.eval()(x).detach().clone()
    monkeypatch.setattr(_shelf, "moves", lambda device, home: copied)

    trainer = make(mode=mode, **clip, **options)
    trainer.converted.train()
    seen: list[set[int]] = []
    for optimizer in trainer.optimizers.values():
        optimizer.register_step_pre_hook(lambda *_: seen.append(fetched(trainer)))
        optimizer.register_step_pre_hook(lambda o, *_: check_here(trainer, o))
    found = train(trainer, 0, 2)
    state = state_of(trainer)
    trainer.load_state_dict(state)
    check_home(trainer, copied)
    fail(2)
    with pytest.raises(torch.OutOfMemoryError):
        train(trainer, 2, 3)
    fail.undo()
    monkeypatch.setattr(_shelf, "moves", lambda device, home: copied)
    check_home(trainer, copied)
    found += train(trainer, 2, 5)
    assert_same_bits(found, losses)
    check_home(trainer, copied)
    assert_same_bits(state_of(trainer), expected)
    with trainer.resident():
        assert torch.equal(trainer.converted.model.eval()(x), shown)
    trainer.converted.train()
    check_home(trainer, copied)
    if copied and "state_device" in options:
        assert max(map(len, seen)) == 1, "one block's state at a time; the next is fetched when this one is back"


def check_here(trainer: bpfx.BlockTrainer, optimizer: torch.optim.Optimizer) -> None:
    """What is stepped is on the device: a gradient that is there cannot be given to a parameter at home."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    away = {n for n, p in trainer._idle._parameters.items() if id(p) in stepped} - trainer._idle._resident
    assert not away, f"stepped at home: {sorted(away)}"


def check_home(trainer: bpfx.BlockTrainer, copied: bool) -> None:
    """Between steps only the state of the block that is stepped first may be under way."""
    idle, first = trainer._idle, next(iter(trainer._idle._order))
    if idle.state_home is not None:
        values = [(id(p), s) for o in trainer.optimizers.values() for p, own in o.state.items() for s in own.items()]
        for place, (key, value) in values:
            if value.dim():
                assert value is idle._state[place, key].home
        assert fetched(trainer) <= {first}
    if idle._home is not None:
        assert not idle._resident
        for name, parameter in idle._parameters.items():
            assert parameter.data_ptr() == idle._parked[name].home.data_ptr(), name
            assert idle._parked[name].away == copied


def test_offsets_wait_where_the_state_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shelf, "moves", lambda device, home: True)
    trainer = make(state_device="cpu")
    train(trainer, 0, 1)
    stored = trainer.converted.offset_state
    assert stored.home == torch.device("cpu") and len(stored) > 0
    assert all(part.away and part.fetched is None for s in stored._stored.values() for part in s.parts)


# --- memory -----------------------------------------------------------------------------------------------------------

PLAIN = partial(torch.optim.SGD, lr=0.01)


def stack(depth: int, width: int, samples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(width, 4)), (torch.randn(samples, width), torch.randint(0, 4, (samples,)))


def peak(depth: int, width: int, samples: int, offset: Any = None, **options: Any) -> tuple[int, int]:
    """Peak of a step above what is there before it, and the bytes of all gradients."""
    model, batch = stack(depth, width, samples)
    names = [str(k) for k in range(1, depth)]
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=names, offset=offset)
    trainer = bpfx.BlockTrainer(step, PLAIN, **options)
    found = measure_peak(lambda: trainer.step(*batch), warmup=2).peak_bytes
    return found, sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("clip", ["block", "global"])
def test_a_local_step_is_as_large_as_a_block(clip: str) -> None:
    """At any depth; and micro-batches, whose boundaries wait, need no more."""
    sizes = ((4, 1), (16, 1), (16, 4))
    shallow, deep, pieces = (peak(d, 64, 2048, micro_batches=m, clip=clip, clip_norm=1.0)[0] for d, m in sizes)
    assert deep <= 1.15 * shallow
    assert pieces <= deep


@pytest.mark.parametrize("options", [{}, {"mode": "bp"}, {"clip": "global", "clip_norm": 1.0}])
def test_a_step_never_holds_all_gradients(options: dict[str, Any]) -> None:
    found, gradients = peak(12, 256, 4, **options)
    assert found < 0.25 * gradients


def test_a_refresh_never_holds_all_gradients() -> None:
    """Both gradients of one block, what it takes to store their difference, and the old offset until then."""
    found, gradients = peak(12, 256, 4, bpfx.Offset(period=1, dtype="int8"))
    assert found < 0.6 * gradients
