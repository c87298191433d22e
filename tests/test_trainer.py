"""Block-serial training takes the steps of the loop it replaces, bit for bit where sums have the same order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import assert_same_bits, run, seed_all
from torch import Tensor, nn
from torch.optim import lr_scheduler
from twins import (
    adamw,
    assert_close,
    batches_of,
    case_of,
    convert,
    cuts_of,
    fresh,
    pieces_of,
    samples,
    sgd,
    snapshot,
    train_blocks,
    train_drop_in,
    train_plain,
)
from zoo import Case

import bpfx

# With dropout, BatchNorm, tied and frozen weights, opaque modules and skips.
ON_THE_ZOO = [
    "convnet",
    "unet",
    "in_place",
    "vit_attention_lora",
    "gpt2",
    "lstm",
    "custom_function",
    "tuple_input",
]
OFFSETS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "fp32": lambda: bpfx.Offset(period=3),
    "bf16": lambda: bpfx.Offset(period=3, dtype=torch.bfloat16),
    "int8": lambda: bpfx.Offset(period=3, dtype="int8"),
    "scaled": lambda: bpfx.Offset(period=2, alpha=0.5, lam=lambda t: 0.9**t),
}


def of_training(step: bpfx.Step) -> dict[str, Any]:
    """What a step's state holds beside the schedule: the loop with accumulation calls the step once per piece."""
    state = snapshot(step)
    state.pop("_extra_state")
    return state


# --- mode="local" -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", ["mlp", "convnet", "vit_attention_lora"])
def test_local_training_is_the_drop_in_loop(name: str, offset: str) -> None:
    batches = batches_of(name, 4, 5)
    step = fresh(name, offset=OFFSETS[offset]())
    losses = train_blocks(bpfx.BlockTrainer(step, adamw), batches)
    found = snapshot(step)
    twin = fresh(name, offset=OFFSETS[offset]())
    assert_same_bits(losses, train_drop_in(twin, batches))
    assert_same_bits(found, snapshot(twin))
    assert len(step.offset_state) > 0 or offset == "none"


@pytest.mark.parametrize("name", ON_THE_ZOO)
def test_local_training_is_the_drop_in_loop_on_the_zoo(name: str) -> None:
    batches = batches_of(name, 4, 2)
    step = fresh(name)
    losses = train_blocks(bpfx.BlockTrainer(step, adamw), batches)
    found = snapshot(step)
    twin = fresh(name)
    assert_same_bits(losses, train_drop_in(twin, batches))
    assert_same_bits(found, snapshot(twin))


@pytest.mark.parametrize("name", ["mlp", "convnet", "lstm", "tuple_input", "llama_no_mask"])
def test_micro_batches_are_the_accumulation_loop(name: str) -> None:
    """Ten samples in four pieces of 2, 3, 2 and 3; running statistics pass through the pieces in the same order."""
    # In one dtype: a model in double whose loss is in single would have its shares rounded by the loop.
    batches = batches_of(name, 10, 3, torch.float32)
    assert [samples(piece) for piece, _ in pieces_of(batches[0], 10, 4)] == [2, 3, 2, 3]
    step = fresh(name, 10, quiet=True, dtype=torch.float32)
    losses = train_blocks(bpfx.BlockTrainer(step, adamw, micro_batches=4), batches)
    found = of_training(step)
    twin = fresh(name, 10, quiet=True, dtype=torch.float32)
    assert_same_bits(losses, train_drop_in(twin, batches, micro_batches=4))
    assert_same_bits(found, of_training(twin))


def test_micro_batches_with_tied_weights_are_the_accumulation_loop_to_rounding() -> None:
    """What two blocks contribute to one gradient is summed block by block here, and piece by piece in the loop."""
    batches = batches_of("gpt2_no_mask", 10, 3)
    step = fresh("gpt2_no_mask", 10, quiet=True)
    train_blocks(bpfx.BlockTrainer(step, sgd, micro_batches=4), batches)
    found = copy.deepcopy(step.model)
    twin = fresh("gpt2_no_mask", 10, quiet=True)
    train_drop_in(twin, batches, sgd, micro_batches=4)
    assert_close(found, twin.model, rtol=1e-7)


def test_horizon_of_two_is_the_drop_in_loop() -> None:
    batches = batches_of("convnet", 4, 3)
    step = fresh("convnet", offset=OFFSETS["fp32"](), horizon=2)
    train_blocks(bpfx.BlockTrainer(step, adamw), batches)
    found = snapshot(step)
    twin = fresh("convnet", offset=OFFSETS["fp32"](), horizon=2)
    train_drop_in(twin, batches)
    assert_same_bits(found, snapshot(twin))


def test_micro_batches_with_offsets_are_one_batch() -> None:
    """Without BatchNorm a refresh over micro-batches measures the offset of the batch, to rounding."""
    found = []
    for count in (1, 4):
        step = fresh("mlp", 10, offset=bpfx.Offset(period=2))
        trainer = bpfx.BlockTrainer(step, sgd, micro_batches=count)
        train_blocks(trainer, batches_of("mlp", 10, 4))
        found.append(copy.deepcopy(step.model) if count == 1 else step.model)
    assert_close(found[1], found[0], rtol=1e-5)


def test_a_refresh_has_the_pieces_of_the_step() -> None:
    """Ten samples in pieces of 2, 3, 2 and 3: not in 3, 3, 3 and a last one on which BatchNorm cannot run."""
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    batch = case_of("mlp", 10).batch
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=["3", "5"], offset=bpfx.Offset(period=2))
    trainer = bpfx.BlockTrainer(step, sgd, micro_batches=4)
    assert all(trainer.step(*batch).isfinite() for _ in range(3))


class Shared(nn.Module):
    """One layer used three times, in three blocks; the output layer tied to the embedding; one layer frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.second.requires_grad_(False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for layer in (self.first, self.second, self.third):
            x = x + torch.tanh(layer(torch.tanh(self.mix(x))))
        return self.out(x).mean(1)


def shared(size: int = 6, seed: int = 0) -> Case:
    seed_all(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Shared().double()
    ids = torch.randint(11, (size, 5), generator=draw)
    return zoo.outside(model, ids, torch.randint(11, (size,), generator=draw))


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_shared_and_tied_weights(mode: str, micro_batches: int) -> None:
    batches = [shared(10, seed).batch for seed in range(4)]
    step = convert(shared(10), ["second", "third"])
    trainer = bpfx.BlockTrainer(step, adamw, micro_batches=micro_batches, clip_norm=0.5, clip="global", mode=mode)
    losses = train_blocks(trainer, batches)
    if mode == "bp":
        twin: Any = shared(10)
        expected = train_plain(twin, batches, micro_batches=micro_batches, clip_norm=0.5)
        assert_close(step.model, twin.model)
    else:
        twin = convert(shared(10), ["second", "third"])
        expected = train_drop_in(twin, batches, micro_batches=micro_batches, clip_norm=0.5)
        assert_close(step, twin)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))


# --- mode="bp" --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "micro_batches", "clip_norm", "steps"),
    [
        ("convnet", 4, 0.5, 10),  # BatchNorm and its running statistics
        ("convnet", 1, None, 10),  # dropout: the same draws
        ("gpt2_no_mask", 4, 0.5, 5),  # tied embeddings
        ("gpt2", 1, 0.5, 5),
        ("vit_attention_lora", 1, None, 5),
        ("lstm", 4, 0.5, 5),
        ("in_place", 4, None, 5),
        ("unet", 1, 0.5, 5),
        ("unused_parameter", 1, 0.5, 5),
    ],
)
def test_bp_training_is_plain_training(name: str, micro_batches: int, clip_norm: float | None, steps: int) -> None:
    compare_with_plain_training(name, micro_batches, clip_norm, steps, one_by_one=False)


@pytest.mark.parametrize(
    ("name", "clip_norm"), [("convnet", 0.5), ("gpt2_no_mask", None), ("lstm", None), ("in_place", None)]
)
def test_one_by_one_it_is_plain_training_with_its_draws(name: str, clip_norm: float | None) -> None:
    """Dropout as well: every micro-batch draws what it would draw in a loop of forward and backward passes."""
    compare_with_plain_training(name, 4, clip_norm, 3, one_by_one=True)


def compare_with_plain_training(
    name: str, micro_batches: int, clip_norm: float | None, steps: int, one_by_one: bool
) -> None:
    quiet, dtype = micro_batches > 1 and not one_by_one, torch.float64
    batches = batches_of(name, 10, steps, dtype)
    plain = case_of(name, 10, quiet, dtype)
    case = case_of(name, 10, quiet, dtype)
    step = convert(case, cuts_of(name))
    options: dict[str, Any] = {"clip_norm": clip_norm, "clip": "global"} if clip_norm else {}
    trainer = bpfx.BlockTrainer(step, adamw, micro_batches=micro_batches, mode="bp", **options)
    trainer._one_by_one = one_by_one
    losses = train_blocks(trainer, batches)
    expected = train_plain(plain, batches, micro_batches=micro_batches, clip_norm=clip_norm)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    # AdamW divides by the gradient: rounding in one that is nearly zero becomes a step
    assert_close(step.model, plain.model, rtol=1e-5)


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_a_block_is_clipped_by_its_own_norm(mode: str, clip_norm: float) -> None:
    """Against gradients worked out without the trainer, clipped per block by hand."""
    step = fresh("mlp")
    batch = case_of("mlp").batch
    grads = (step.run_local if mode == "local" else step.run_bp)(*batch).grads
    trainer = bpfx.BlockTrainer(step, sgd, clip_norm=clip_norm, mode=mode)
    seen: dict[int, list[Tensor]] = {}
    names = {id(p): n for n, p in named(step).items()}
    expected = {}
    for k, optimizer in trainer.optimizers.items():
        own = [p for group in optimizer.param_groups for p in group["params"]]
        copies = [nn.Parameter(torch.zeros_like(p)) for p in own]
        for copied, parameter in zip(copies, own, strict=True):
            copied.grad = grads[names[id(parameter)]].clone()
        norm = nn.utils.clip_grad_norm_(copies, clip_norm)
        expected[k] = ([c.grad for c in copies], norm)
        optimizer.register_step_pre_hook(
            lambda o, *_, k=k: seen.update({k: [p.grad.clone() for g in o.param_groups for p in g["params"]]})
        )
    run(trainer.step, batch)
    assert trainer.grad_norms.keys() == expected.keys() == seen.keys()
    for k, (clipped, norm) in expected.items():
        assert trainer.grad_norms[k] == pytest.approx(float(norm))
        torch.testing.assert_close(seen[k], clipped)
        total = torch.nn.utils.get_total_norm(seen[k])
        assert total <= clip_norm * (1 + 1e-6)
        assert (total < 0.99 * norm) == (clip_norm < 1)


def named(step: bpfx.Step) -> dict[str, Tensor]:
    return dict(step.model.named_parameters()) | {f"bpfx.heads.{n}": p for n, p in step.heads.named_parameters()}


@pytest.mark.parametrize(
    ("name", "micro_batches", "offset"),
    [("mlp", 4, "none"), ("mlp", 1, "fp32"), ("convnet", 1, "none"), ("convnet", 1, "fp32"), ("lstm", 4, "none")],
)
def test_global_clipping_is_clip_grad_norm_over_all(name: str, micro_batches: int, offset: str) -> None:
    """Two sweeps, the same draws in both, running statistics updated once."""
    batches = batches_of(name, 10, 4)
    options: dict[str, Any] = {"micro_batches": micro_batches, "clip_norm": 0.3}
    quiet = micro_batches > 1
    step = fresh(name, 10, OFFSETS[offset](), quiet)
    trainer = bpfx.BlockTrainer(step, sgd, clip="global", **options)
    train_blocks(trainer, batches)
    assert sum(n * n for n in trainer.grad_norms.values()) ** 0.5 > 0.3, "nothing was clipped"
    found = copy.deepcopy(step.model), copy.deepcopy(step.heads)
    twin = fresh(name, 10, OFFSETS[offset](), quiet)
    train_drop_in(twin, batches, sgd, **options)
    for own, expected in zip(found, (twin.model, twin.heads), strict=True):
        assert_close(own, expected, rtol=1e-5)


# --- schedulers and optimizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize(
    "scheduler",
    [
        partial(lr_scheduler.CosineAnnealingLR, T_max=6),
        partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=8),
        partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.3),
    ],
    ids=lambda s: s.func.__name__,
)
def test_a_scheduler_per_block_is_one_scheduler(scheduler: Callable[..., Any], mode: str) -> None:
    batches = batches_of("mlp", 4, 8)
    step = fresh("mlp")
    trainer = bpfx.BlockTrainer(step, adamw, lr_scheduler=scheduler, mode=mode)
    losses = train_blocks(trainer, batches)
    rates = {group["lr"] for o in trainer.optimizers.values() for group in o.param_groups}
    assert len(rates) == 1 and rates != {1e-2}
    if mode == "local":
        found = snapshot(step)
        twin = fresh("mlp")
        assert_same_bits(losses, train_drop_in(twin, batches, scheduler=scheduler))
        assert_same_bits(found, snapshot(twin))
    else:
        plain = case_of("mlp")
        expected = train_plain(plain, batches, scheduler=scheduler)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected))


def test_weight_decay_groups_by_name() -> None:
    def grouped(pairs: Any) -> torch.optim.Optimizer:
        pairs = list(pairs)
        plain = [p for n, p in pairs if n.endswith("bias")]
        rest = [p for n, p in pairs if not n.endswith("bias")]
        groups = [{"params": rest, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2)

    batches = batches_of("convnet", 4, 3)
    step = fresh("convnet")
    train_blocks(bpfx.BlockTrainer(step, grouped), batches)
    found = snapshot(step)
    twin = fresh("convnet")
    train_drop_in(twin, batches, lambda _: grouped(named(twin).items()))
    assert_same_bits(found, snapshot(twin))


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("name", ["gpt2", "unused_parameter", "vit_attention_lora", "shared", "unet"])
def test_every_parameter_is_stepped_once(name: str, mode: str) -> None:
    step = convert(shared(), ["second", "third"]) if name == "shared" else fresh(name)
    batch = shared().batch if name == "shared" else case_of(name, 4).batch
    trainer = bpfx.BlockTrainer(step, adamw, mode=mode, micro_batches=2)
    held = [p for o in trainer.optimizers.values() for g in o.param_groups for p in g["params"]]
    wanted = step.parameters() if mode == "local" else step.model.parameters()
    expected = {id(p) for p in wanted if p.requires_grad}
    assert len(held) == len(expected) and {id(p) for p in held} == expected
    counts = dict.fromkeys(trainer.optimizers, 0)
    for k, optimizer in trainer.optimizers.items():
        optimizer.register_step_pre_hook(lambda *_, k=k: counts.update({k: counts[k] + 1}))
    for seed in range(3):
        run(trainer.step, batch, seed)
    assert set(counts.values()) == {3}
    assert all(p.grad is None for p in step.parameters())
    dead = [n for n, _ in step.model.named_parameters() if n.startswith("unused")]
    names = {id(p): n for n, p in step.model.named_parameters()}
    for optimizer in trainer.optimizers.values():
        for parameter in [p for g in optimizer.param_groups for p in g["params"]]:
            steps = optimizer.state[parameter]["step"] if parameter in optimizer.state else 0
            assert steps == (0 if names.get(id(parameter)) in dead else 3), names.get(id(parameter))


# --- how a batch is divided -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("size", [1, 3, 10, 11])
def test_batches_that_micro_batches_do_not_divide(size: int, mode: str) -> None:
    """Smaller than the number of pieces as well: the step is the one over the whole batch."""
    batch = case_of("mlp", size, dtype=torch.float64).batch
    states = []
    for count in (1, 4):
        case = case_of("mlp", 10, dtype=torch.float64)
        step = convert(case, list(zoo.MLP_CUTS))
        loss = bpfx.BlockTrainer(step, sgd, micro_batches=count, mode=mode).step(*batch)
        states.append((step.model, loss))
    assert_close(states[1][0], states[0][0], rtol=1e-9)
    torch.testing.assert_close(states[1][1], states[0][1])


def ignoring(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, ignore_index=2)


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("loss", ["sum", "ignore_index", "padded LM"])
def test_pieces_count_by_their_share_of_the_loss(loss: str, mode: str) -> None:
    """A sum is no mean, and a mean over the labels that count gives a piece with more of them more weight."""
    name = "gpt2" if loss == "padded LM" else "mlp"
    case, other = (case_of(name, 10, quiet=True, dtype=torch.float64) for _ in range(2))
    if name == "mlp":
        fn = partial(F.cross_entropy, reduction="sum") if loss == "sum" else ignoring
        case.loss_fn = other.loss_fn = fn
        y = torch.tensor([2, 2, 1, 0, 4, 2, 3, 1, 2, 0])
        case.batch = other.batch = (case.batch[0], y)
    batches = [case.batch] * 3
    step = convert(case, cuts_of(name))
    losses = train_blocks(bpfx.BlockTrainer(step, sgd, micro_batches=4, mode=mode), batches)
    if mode == "bp":
        expected = train_plain(other, batches, sgd)
        assert_close(step.model, other.model)
    else:
        twin = convert(other, cuts_of(name))
        expected = train_drop_in(twin, batches, sgd)
        assert_close(step.model, twin.model)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
