"""Losses of parts of a batch: with the shares that were found, they and their gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import wake

from bpfx.compiler import Compiler
from bpfx.errors import BpfxError
from bpfx.passes import tail
from bpfx.passes.batch import as_call, call_model
from bpfx.passes.reduction import Reduction, find_reduction

SPLITS = [(1, 7), (3, 5), (2, 1, 5)]
CLASSES = 5
WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.1, 4.0], dtype=torch.float64)
Loss = Callable[[Any, Any], Tensor]


def reduction_of(model: nn.Module, loss_fn: Loss | None, batch: Any) -> tuple[Reduction, Compiler]:
    compiler = Compiler(model, loss_fn, batch, blocks=2)
    captured = compiler.main.captured
    targets = compiler.spec.targets if loss_fn is not None else None
    predictions = tail.find_predictions(captured.graph, captured.weights, targets)
    return find_reduction(captured, compiler.spec, predictions, compiler.example), compiler


def assert_adds_up(
    model: nn.Module, loss_fn: Loss | None, batch: Any, found: Reduction, compiler: Compiler, rounding: float = 1e-7
) -> None:
    """Loss and every gradient of the plain model, in eval mode: dropout and batch statistics are not the loss's."""
    model.eval()
    spec = compiler.spec
    tensors = spec.flatten(*as_call(batch))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(part: list[Tensor]) -> list[Tensor]:
        args, kwargs = spec.unflatten(part)
        loss, _ = call_model(model, loss_fn, args, kwargs)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            loss.detach(),
            *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)),
        ]

    whole = run(tensors)
    assert torch.isfinite(whole[0]) and whole[0] != 0
    for lengths in SPLITS:
        pieces = [spec.narrow(tensors, sum(lengths[:i]), k) for i, k in enumerate(lengths)]
        shares = found.shares(pieces)
        total = [torch.zeros_like(t) for t in whole]
        for share, piece in zip(shares, pieces, strict=True):
            if share:
                total = [t + share * v for t, v in zip(total, run(piece), strict=True)]
        for got, expected in zip(total, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()


def norms() -> nn.Module:
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))
    return nn.Sequential(*layers).double()


def convs() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)).double()


def vectors() -> Tensor:
    return torch.randn(8, 6, dtype=torch.float64)


def labels(*shape: int, ignored: int | None = -100) -> Tensor:
    """Labels, unevenly ignored; the first sample is ignored altogether."""
    y = torch.randint(CLASSES, (8, *shape))
    if ignored is not None:
        y[torch.rand(y.shape) < 0.3] = ignored
        y[4 if shape else 1] = y[4 if shape else 1].clamp_min(0)
        y[0] = ignored
    return y


def reals() -> Tensor:
    return torch.randn(8, CLASSES, dtype=torch.float64)


def ratio(o: Tensor, t: Tensor) -> Tensor:
    """A masked mean by hand."""
    mask = (t > 0).double()
    return ((o - t) ** 2 * mask).sum() / mask.sum().clamp(min=1)


def penalised(loss_fn: Loss) -> Loss:
    decay = torch.ones(3, dtype=torch.float64)
    return lambda o, t: 0.5 * loss_fn(o, t) + 1e-2 * o.pow(2).mean() + 1e-1 * decay.pow(2).sum()


def hard(o: Tensor, t: Tensor) -> Tensor:
    """Ignored labels counted by hand."""
    loss = F.cross_entropy(o, t, reduction="none", ignore_index=-100)
    return loss.sum() / (t != -100).sum()


KNOWN: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[[], Tensor], Callable[[], Tensor], str]] = {
    "cross entropy": (dense, F.cross_entropy, vectors, lambda: labels(ignored=None), "counted"),
    "ignored": (dense, F.cross_entropy, vectors, labels, "counted"),
    "ignored 255": (
        dense,
        lambda o, t: F.cross_entropy(o, t, ignore_index=255),
        vectors,
        lambda: labels(ignored=255),
        "counted",
    ),
    "ignored by hand": (dense, hard, vectors, labels, "counted"),
    "batch norm and dropout": (norms, nn.CrossEntropyLoss(), vectors, labels, "counted"),
    "class weights": (dense, nn.CrossEntropyLoss(WEIGHT), vectors, labels, "counted"),
    "label smoothing": (
        dense,
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
        vectors,
        labels,
        "counted",
    ),
    "class weights and label smoothing": (
        dense,
        lambda o, t: F.cross_entropy(o, t, WEIGHT, label_smoothing=0.2),
        vectors,
        labels,
        "counted",
    ),
    "segmentation": (
        convs,
        lambda o, t: 2 * F.cross_entropy(o, t, WEIGHT),
        lambda: torch.randn(8, 3, 4, 5, dtype=torch.float64),
        lambda: labels(4, 5),
        "counted",
    ),
    "nll": (dense, lambda o, t: F.nll_loss(o.log_softmax(-1), t), vectors, labels, "counted"),
    "masked mean": (dense, ratio, vectors, reals, "counted"),
    "cross entropy, summed": (dense, nn.CrossEntropyLoss(WEIGHT, reduction="sum"), vectors, labels, "sum"),
    "class probabilities": (dense, nn.CrossEntropyLoss(WEIGHT), vectors, lambda: reals().softmax(-1), "mean"),
    "mse": (dense, F.mse_loss, vectors, reals, "mean"),
    "mse, summed": (dense, nn.MSELoss(reduction="sum"), vectors, reals, "sum"),
    "bce": (dense, nn.BCEWithLogitsLoss(), vectors, lambda: reals().gt(0).double(), "mean"),
    "bce of probabilities": (
        lambda: nn.Sequential(dense(), nn.Sigmoid()),
        F.binary_cross_entropy,
        vectors,
        lambda: reals().gt(0).double(),
        "mean",
    ),
    "mean of sums": (dense, lambda o, t: ((o - t) ** 2).sum(1).mean(), vectors, reals, "mean"),
    "sum of means": (dense, lambda o, t: ((o - t) ** 2).mean(1).sum(), vectors, reals, "sum"),
    "division by the batch": (dense, lambda o, t: ((o - t) ** 2).sum() / o.shape[0], vectors, reals, "mean"),
    "two addends": (dense, lambda o, t: F.mse_loss(o, t) + 0.1 * F.l1_loss(o, t), vectors, reals, "mean"),
    "penalty": (dense, penalised(F.mse_loss), vectors, reals, "mean"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_shares_give_the_whole_loss_and_gradient(name: str) -> None:
    build, loss_fn, inputs, targets, kind = KNOWN[name]
    model, batch = wake(build()), (inputs(), targets())
    found, compiler = reduction_of(model, loss_fn, batch)
    assert found.kind == kind, found.reason
    assert_adds_up(model, loss_fn, batch, found, compiler)


def similarity(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(o, dim=1) @ F.normalize(t, dim=1).T, torch.arange(o.shape[0]))


def boolean(o: Tensor, t: Tensor) -> Tensor:
    mask = t != 0
    per = ((o - t) ** 2).mean(1)
    return (per * mask.any(1)).sum() * (1 / mask.any(1).sum())


UNKNOWN: dict[str, tuple[Loss, Callable[[], Tensor], str]] = {
    "divided by a number in the graph": (
        lambda o, t: F.mse_loss(o, t, reduction="sum") / len(o),
        reals,
        "one batch size",
    ),
    "contrastive": (similarity, reals, "with shares"),
    "root of a mean": (lambda o, t: F.mse_loss(o, t).sqrt(), reals, "have the mean"),
    "variance over the batch": (lambda o, t: F.mse_loss(o, t) - 0.1 * o.var(0).mean(), reals, "have the mean"),
    "mean plus sum": (lambda o, t: F.mse_loss(o, t) + F.l1_loss(o, t, reduction="sum"), reals, "shares"),
    "counted plus mean": (
        lambda o, t: F.cross_entropy(o, t) + o.pow(2).mean(),
        labels,
        "different shares",
    ),
    "cross entropy in an operation": (lambda o, t: F.cross_entropy(o, t).exp(), labels, "not a sum"),
    "noise in the loss": (lambda o, t: F.mse_loss(o + torch.rand_like(o), t), reals, "random"),
    "count that the example hides": (boolean, reals, "entries of y set to 0"),
    "zero": (lambda o, t: (o - o).sum() + (t * 0).sum(), reals, "0"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_shares_where_there_are_none(name: str) -> None:
    loss_fn, targets, words = UNKNOWN[name]
    found, compiler = reduction_of(wake(dense()), loss_fn, (vectors(), targets()))
    assert found.kind == "unknown", found
    assert words in found.reason
    with pytest.raises(BpfxError):
        found.shares([compiler.example])


def test_penalty_on_weights_is_no_sample() -> None:
    """Nothing of the batch reaches it: any shares that add up to 1 are right."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dense()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), y) + 1e-2 * sum(p.pow(2).sum() for p in self.parameters())

    model, batch = wake(Penalised()), {"x": vectors(), "y": labels()}
    found, compiler = reduction_of(model, None, batch)
    assert found.kind == "counted", found.reason
    assert_adds_up(model, None, batch, found, compiler)


def test_everything_ignored_falls_back_to_samples() -> None:
    found, compiler = reduction_of(dense(), F.cross_entropy, (vectors(), labels()))
    nothing = [vectors(), torch.full((8,), -100)]
    pieces = [compiler.spec.narrow(nothing, 0, 2), compiler.spec.narrow(nothing, 2, 6)]
    assert found.shares(pieces) == [0.25, 0.75]
    some = [vectors(), torch.tensor([-100] * 6 + [1, 2])]
    assert found.shares([compiler.spec.narrow(some, 0, 2), compiler.spec.narrow(some, 2, 6)]) == [0.0, 1.0]


def test_addends_that_part_on_later_data_are_an_error() -> None:
    """Equal while no label is ignored, so the example cannot settle it."""
    loss_fn = lambda o, t: F.cross_entropy(o, t) + 0.1 * o.pow(2).mean()  # noqa: E731
    found, compiler = reduction_of(dense(), loss_fn, (vectors(), labels(ignored=None)))
    assert found.kind == "counted", found.reason
    later = [vectors(), labels()]
    with pytest.raises(BpfxError, match="different shares"):
        found.shares([compiler.spec.narrow(later, 0, 3), compiler.spec.narrow(later, 3, 5)])


def test_finding_out_leaves_no_trace() -> None:
    model = wake(norms())
    found, compiler = reduction_of(model, F.cross_entropy, (vectors(), labels()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    captured = compiler.main.captured
    predictions = tail.find_predictions(captured.graph, captured.weights, compiler.spec.targets)
    assert find_reduction(captured, compiler.spec, predictions, compiler.example).kind == found.kind
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=53, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, num_key_value_heads=2, max_position_embeddings=16, **sizes))


@pytest.mark.parametrize("build", [gpt2, llama])
def test_padded_language_models_count_their_labels(build: Callable[[], nn.Module]) -> None:
    """Labels are shifted inside the model, and -100 where the text has ended."""
    ids = torch.randint(0, 53, (8, 9))
    mask = (torch.arange(9) < torch.tensor([9, 3, 5, 1, 2, 8, 7, 4])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = wake(build()).double()
    found, compiler = reduction_of(model, None, batch)
    assert found.kind == "counted", found.reason
    assert_adds_up(model, None, batch, found, compiler, 1e-5)  # they compute their loss in fp32


def test_opaque_model_with_a_plain_loss() -> None:
    """One batch size only: the loss must say by itself how it adds up."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x * 3

    model = nn.Sequential(nn.Linear(6, 16), Branch(), nn.Linear(16, CLASSES)).double()
    batch = (vectors(), labels())
    found, compiler = reduction_of(model, F.cross_entropy, batch)
    assert not compiler.main.captured.graph.dynamic and found.kind == "counted", found.reason
    total = found.shares([compiler.spec.narrow(list(batch), 0, 3), compiler.spec.narrow(list(batch), 3, 5)])
    kept = batch[1] != -100
    assert total == pytest.approx([float(kept[:3].sum() / kept.sum()), float(kept[3:].sum() / kept.sum())])
    found, _ = reduction_of(model, lambda o, t: F.mse_loss(o, t, reduction="sum") / len(o), (vectors(), reals()))
    assert found.kind == "unknown" and "one batch size" in found.reason  # the 8 it divides by is a plain number there
