"""LoCo, Greedy InfoMax, Forward-Forward: values and gradients against the formulas written out, rows, and training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx.losses import Boundary, Feature, Given, Head, LocalLoss
from bpfx.losses.forward_forward import ForwardForward, LengthNorm
from bpfx.losses.gim import GIM
from bpfx.losses.loco import LoCo

# --- the formulas, one loop at a time --------------------------------------------------------------------------------


def by_position(x: Tensor) -> Tensor:
    """(samples, positions along, positions across, channels) of images, sequences and tokens."""
    if x.dim() == 4:
        return x.permute(0, 2, 3, 1)
    return x.unsqueeze(2)


def mlp(head: Head, x: Tensor) -> Tensor:
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    for i, m in enumerate(linears):
        x = m.weight @ x + m.bias
        x = x if i == len(linears) - 1 else x.clamp(min=0)
    return x


def pooled(x: Tensor, sample: int) -> Tensor:
    if x.dim() == 2:
        return x[sample]
    return x[sample].mean((1, 2)) if x.dim() == 4 else x[sample].mean(0)


def loco(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    z = [mlp(head, pooled(x, i)) for i in range(len(x))]
    total = x.new_zeros(())
    for i in range(len(z)):
        partner = i + 1 if i % 2 == 0 else i - 1
        similar = {k: z[i] @ z[k] / (z[i].norm() * z[k].norm()) for k in range(len(z)) if k != i}
        denominator = sum(torch.exp(s / 0.2) for s in similar.values())
        total = total - torch.log(torch.exp(similar[partner] / 0.2) / denominator)
    return total / len(z)


def loco_supervised(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        if x.dim() == 3:  # the prediction head normalises tokens before it pools them
            centred = x[i] - x[i].mean(1, keepdim=True)
            norm = next(m for m in head.modules() if isinstance(m, nn.LayerNorm))
            normal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
            rows.append(mlp(head, normal.mean(0)))
        else:
            rows.append(mlp(head, pooled(x, i)))
    return sum(-torch.log(torch.softmax(r, 0)[y]) for r, y in zip(rows, labels, strict=True)) / len(x)  # type: ignore


def gim(head: Head, x: Tensor, labels: Tensor, normalise: bool = True) -> Tensor:
    z = by_position(x)
    n, length, across, width = z.shape
    if normalise:
        z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weights = [m.weight for m in head.modules() if isinstance(m, nn.Linear)]
    means = []
    for k, weight in enumerate(weights, 1):
        drawn = torch.randint(0, n * length * across, (n, 3))
        terms = []
        for i in range(n):
            for t in range(length - k):
                for s in range(across):
                    scale = math.sqrt(width) if normalise else 1.0
                    context = weight @ z[i, t, s] / scale
                    f = torch.exp(z[i, t + k, s] @ context)
                    others = [torch.exp(z.reshape(-1, width)[j] @ context) for j in drawn[i]]
                    terms.append(-torch.log(f / (f + sum(others))))
        means.append(torch.stack(terms).mean())
    return torch.stack(means).mean()


def goodness(x: Tensor, sample: int) -> Tensor:
    return x[sample].square().sum() / x[sample].numel()


def forward_forward(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    total = x.new_zeros(())
    for i in range(len(x) // 3):
        right, wrong = goodness(x, 3 * i), goodness(x, 3 * i + 1)
        total = total + torch.log(1 + torch.exp(0.7 - right)) + torch.log(1 + torch.exp(wrong - 0.7))
    return total / (len(x) // 3)


def symba(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    gaps = [goodness(x, 3 * i) - goodness(x, 3 * i + 1) for i in range(len(x) // 3)]
    return sum(torch.log(1 + torch.exp(-4.0 * gap)) for gap in gaps) / len(gaps)  # type: ignore


def channels(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    # Seven channels in three classes: 3, 2 and 2.
    groups, total, count = [(0, 3), (3, 5), (5, 7)], x.new_zeros(()), 0
    for i in range(len(x)):
        rows = x[i].flatten(1) if x.dim() == 4 else x[i].reshape(-1, 7).t()
        g = torch.stack([rows[a:b].square().mean() for a, b in groups])
        if labels[i] != -100:
            total, count = total - torch.log(torch.softmax(g, 0)[labels[i]]), count + 1
    return total / max(count, 1)


Formula = Callable[[Head, Tensor, Tensor], Tensor]
FORMULAS: dict[str, tuple[Callable[[], LocalLoss], Formula]] = {
    "loco": (lambda: LoCo(temperature=0.2, hidden=6, out=4, layers=3), loco),
    "loco, supervised": (lambda: LoCo(supervised=True, hidden=6, layers=3), loco_supervised),
    "gim": (lambda: GIM(steps=2, negatives=3), gim),
    "gim, as published": (lambda: GIM(2, 3, normalise=False), functools.partial(gim, normalise=False)),
    "goodness": (lambda: ForwardForward(theta=0.7, classes=3), forward_forward),
    "symba": (lambda: ForwardForward("symba", classes=3), symba),
    "channels": (lambda: ForwardForward("channels"), channels),
}
SHAPES = {"image": (6, 7, 4, 3), "tokens": (6, 5, 7), "vector": (6, 7)}
LABELS = torch.tensor([0, 2, 1, -100, 2, 0])


def task(prediction: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(prediction, labels)


def boundary_of(x: Tensor, labels: Tensor | None = None) -> Boundary:
    return Boundary.of(x, classes=3, inputs=[torch.zeros(len(x), 2)] if labels is None else [x, labels], labels=1)


def given_of(x: Tensor, labels: Tensor) -> Given:
    return Given.of(x, inputs=[x.detach(), labels], task=lambda p: task(p, labels))


# A vector has one position, and nothing to predict from it: that is refused, see below.
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in FORMULAS for k in SHAPES if not (n.startswith("gim") and k == "vector")]
)
def test_values_and_gradients(name: str, kind: str) -> None:
    make, formula = FORMULAS[name]
    x = (torch.randn(SHAPES[kind], dtype=torch.float64) * 0.8).requires_grad_()
    labels = LABELS if name == "channels" else LABELS.clamp(min=0)
    head = make().head(boundary_of(x, labels))
    before, results = x.detach().clone(), []
    for compute in (lambda: head(given_of(x, labels)), lambda: formula(head, x, labels)):
        torch.manual_seed(3)
        loss = compute()
        results.append([loss, *torch.autograd.grad(loss, [x, *head.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert torch.equal(x, before)
    assert head.description and results[0][0].dim() == 0
    assert results[0][1].abs().max() > 1e-8, "the features get a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# The published position loss overflows on large features; `normalise=True`, the default, is there for them.
@pytest.mark.parametrize(
    ("name", "fill"),
    [(n, f) for n in FORMULAS for f in ("zeros", "equal", "large") if (n, f) != ("gim, as published", "large")],
)
def test_finite_in_degenerate_cases(name: str, fill: str, dtype: torch.dtype) -> None:
    shape = (6, 7, 3, 3)
    x = {"zeros": torch.zeros, "equal": torch.ones, "large": lambda s: torch.randn(s) * 1e3}[fill](shape).to(dtype)
    x.requires_grad_()
    labels = torch.full((6,), -100) if name == "channels" else torch.zeros(6, dtype=torch.long)
    head = FORMULAS[name][0]().head(boundary_of(x, labels))
    assert all(p.dtype == dtype for p in head.parameters())
    loss = head(Given.of(x, inputs=[x, labels], task=lambda p: task(p.float(), labels)))
    for tensor in (loss, *torch.autograd.grad(loss, [x, *head.parameters()])):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_loco_without_negatives(rows: int) -> None:
    x = torch.randn(rows, 5, 2, 2, requires_grad=True)
    loss = LoCo().head(Boundary.of(x))(Given.of(x))
    (grad,) = torch.autograd.grad(loss, x)
    assert bool(torch.isfinite(grad).all())
    if rows < 3:
        assert float(loss.detach()) == 0 and float(grad.abs().max()) == 0


@pytest.mark.parametrize("name", FORMULAS)
def test_other_batch_sizes_compiled_and_functional(name: str) -> None:
    """What the steps do with a head beside calling it: other sizes, other weights for a while, one compiled graph."""
    x = torch.randn(12, 7, 4, 4)
    labels = LABELS.clamp(min=0).repeat(2)
    head = FORMULAS[name][0]().head(boundary_of(x[:6], labels[:6]))
    given = given_of(x, labels)

    def seeded(f: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(1)
        return f()

    plain = seeded(lambda: head(given))
    swapped = {n: p.detach() * 0 for n, p in head.named_parameters()}
    other = seeded(lambda: torch.func.functional_call(head, swapped, (given,)))
    assert not swapped or not torch.equal(other, plain)
    graph = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(seeded(lambda: graph(given)), plain)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_few_steps_lower_the_loss(name: str) -> None:
    """The heads' parameters and the features together, as a block would move them."""
    x = torch.randn(12, 7, 4, 4).requires_grad_()
    labels = LABELS.clamp(min=0).repeat(2)
    head = FORMULAS[name][0]().head(boundary_of(x, labels))
    optimizer = torch.optim.SGD([x, *head.parameters()], lr=1.0 if name in ("goodness", "symba", "channels") else 0.05)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = head(given_of(x, labels))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


# --- positions that a head reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "matrices"), [((4, 6, 9, 9), 5), ((4, 6, 4, 9), 3), ((4, 6, 1, 3), 2), ((4, 8, 6), 5), ((4, 2, 6), 1)]
)
def test_gim_steps_fit_the_boundary(shape: tuple[int, ...], matrices: int) -> None:
    x = torch.randn(shape)
    head = GIM().head(Boundary.of(x))
    assert sum(isinstance(m, nn.Linear) for m in head.modules()) == matrices
    assert head.random and math.isfinite(head(Given.of(x)).item())


def test_gim_looks_down_the_column() -> None:
    """Features that depend on the column alone are predicted from above, and those of the row are not."""
    code = torch.eye(8)[torch.randperm(8)] * 3
    column = code.t()[None, :, None, :].expand(4, 8, 8, 8)
    found = {}
    for name, x in {"column": column, "row": column.transpose(2, 3)}.items():
        head = GIM(steps=1, negatives=64).head(Boundary.of(x))
        with torch.no_grad():
            next(head.parameters()).copy_(torch.eye(8) * 5)
        found[name] = head(Given.of(x)).item()
    assert found["column"] < found["row"] - 1


def test_gim_on_smaller_and_larger_images() -> None:
    head = GIM(steps=3).head(Boundary.of(torch.randn(4, 6, 5, 5)))
    for side in (7, 5, 3, 2, 1):
        x = torch.randn(2, 6, side, side, requires_grad=True)
        loss = head(Given.of(x))
        (grad,) = torch.autograd.grad(loss, x)
        assert bool(torch.isfinite(grad).all()) and math.isfinite(loss.item())
        assert (side > 1) == (loss.item() > 0)


def test_several_features_at_one_boundary() -> None:
    """A block may hand on more than one tensor, each with parameters of its own behind it."""
    a, b = torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, 8, 2, 2, requires_grad=True)
    for loss in (LoCo(), GIM(), ForwardForward(classes=3), ForwardForward("channels")):
        boundary = boundary_of(a, LABELS)
        boundary.features.append(Feature.of(b))
        found = loss.head(boundary)(Given((a, b), (None, LABELS)))
        assert all(g.abs().max() > 0 for g in torch.autograd.grad(found, [a, b])), loss.name


def test_channels_last_tokens_of_an_image() -> None:
    """A feature whose channels come last (Swin) is the same image."""
    x = torch.randn(6, 7, 4, 3)
    last = Feature("swin", (6, 4, 3, 7), 0, 3, torch.float32, torch.device("cpu"))
    for make, _ in FORMULAS.values():
        torch.manual_seed(0)
        ours = make().head(boundary_of(x, LABELS.clamp(min=0)))
        torch.manual_seed(0)
        boundary = boundary_of(x, LABELS.clamp(min=0))
        boundary.features[0] = last
        theirs = make().head(boundary)
        given, moved = (given_of(v, LABELS.clamp(min=0)) for v in (x, x.permute(0, 2, 3, 1)))
        torch.manual_seed(0)
        first = ours(given)
        torch.manual_seed(0)
        torch.testing.assert_close(theirs(moved), first)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_loco_rows() -> None:
    x, mask, y = torch.rand(3, 2, 4, 4), torch.arange(3), torch.tensor([4, 5, 6])
    calls = iter([10.0, 20.0, 30.0])

    def augment(images: Tensor) -> Tensor:
        return images.add_(next(calls))  # in place: the caller's batch must not change

    before = x.clone()
    images, masks, targets = LoCo(augment).expand([x, mask, y], 0, [2])
    for i in range(3):
        assert torch.equal(images[2 * i], before[i] + 10) and torch.equal(images[2 * i + 1], before[i] + 20)
        assert masks[2 * i] == masks[2 * i + 1] == i
        assert targets[2 * i] == targets[2 * i + 1] == y[i]
    (images,) = LoCo(augment, views="second").expand([x], 0, [])
    assert torch.equal(images[0::2], before) and torch.equal(images[1::2], before + 30)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(200, 2, 3, 4), (200, 1, 12), (200, 12)])
def test_forward_forward_rows(shape: tuple[int, ...]) -> None:
    x, other, y = torch.randn(shape), torch.arange(200.0)[:, None], torch.randint(0, 5, (200,))
    before, labels = x.clone(), y.clone()
    images, others, targets = ForwardForward(classes=5).expand([x, other, y], 0, [2])
    assert torch.equal(x, before) and torch.equal(y, labels)
    drawn = set()
    for i in range(200):
        right, wrong, plain = (images[3 * i + j].reshape(shape[1] if len(shape) > 2 else 1, -1) for j in range(3))
        flat = x[i].reshape(right.shape)
        assert torch.equal(plain, flat)
        assert targets[3 * i : 3 * i + 3].tolist() == [-100, -100, int(y[i])]
        assert others[3 * i : 3 * i + 3, 0].tolist() == [i] * 3
        code = torch.zeros(5)
        code[y[i]] = x[i].max()
        for channel in range(len(right)):
            assert torch.equal(right[channel, :5], code)
            assert torch.equal(right[channel, 5:], flat[channel, 5:])
            assert torch.equal(wrong[channel, 5:], flat[channel, 5:])
            assert torch.equal(wrong[channel, :5], wrong[0, :5])
        found = int(wrong[0, :5].abs().argmax())
        assert found != y[i] and wrong[0, found] == x[i].max() and int((wrong[0, :5] != 0).sum()) == 1
        drawn.add((int(y[i]), found))
    assert len(drawn) == 20, "every wrong label of every class is drawn"


def test_length_norm() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    y = LengthNorm(eps=1e-12)(x)
    for i in range(4):
        torch.testing.assert_close(y[i], x[i] / x[i].square().mean().sqrt())
    (grad,) = torch.autograd.grad(LengthNorm()(x * 0).sum(), x)
    assert bool(torch.isfinite(grad).all())
    assert not list(LengthNorm().parameters())


# --- what is refused --------------------------------------------------------------------------------------------------

X, Y = torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 2, 9])
VECTOR = Boundary.of(torch.randn(4, 7), classes=3)
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: LoCo(augment="flip"), r"augment='flip' is a str; pass a function"),  # type: ignore[arg-type]
    (lambda: LoCo(torch.sin, supervised=True), "leave one of them out"),
    (lambda: LoCo(temperature=0), "temperature=0 must be a positive number"),
    (lambda: LoCo(hidden=0), "hidden=0"),
    (lambda: LoCo(views="three"), "pass 'both' or 'second'"),
    (lambda: LoCo().expand([X, Y], 0, [1]), r"(?s)LoCo\(augment=.*Views\(first, second\)"),
    (lambda: LoCo(lambda x: x[:, :, 1:]).expand([X, Y], 0, [1]), r"\(4, 1, 4, 5\).*\(4, 1, 5, 5\).*keep all three"),
    (lambda: LoCo(lambda x: x.double()).expand([X], 0, []), "float64.*float32"),
    (lambda: LoCo(lambda x: (x, x)).expand([X], 0, []), "returned a tuple"),  # type: ignore[arg-type, return-value]
    (lambda: LoCo(torch.sin).expand([Y, X], 1, [1]), "only the target"),
    (lambda: LoCo(supervised=True).head(Boundary.of(X)), "needs a task loss; pass targets"),
    (lambda: GIM(steps=0), "steps=0 must be a whole number"),
    (lambda: GIM(negatives=1.5), "negatives=1.5"),  # type: ignore[arg-type]
    (lambda: GIM().head(VECTOR), r"one position only \(feature \(4, 7\)\); end the block before the pooling"),
    (lambda: GIM().head(Boundary.of(torch.randn(4, 7, 1, 1))), "one position"),
    (lambda: GIM().head(Boundary.of(torch.randn(4, 1, 7))), "one position"),
    (lambda: ForwardForward("hinton"), "variant='hinton'.*goodness, symba, channels"),
    (lambda: ForwardForward(theta=-1), "theta=-1"),
    (lambda: ForwardForward(alpha=math.inf), "alpha=inf"),
    (lambda: ForwardForward(classes=1), "classes=1 must be"),
    (lambda: ForwardForward(classes=5).expand([X, Y], 0, [1]), r"but one is 9; pass .*the task has, 10 or more"),
    (lambda: ForwardForward().expand([X, Y - 9], 0, [1]), "but one is -9"),
    (lambda: ForwardForward().expand([X, Y], 0, []), "found targets: none"),
    (lambda: ForwardForward().expand([X, X], 0, [1]), r"one integer label per sample; found targets: \(4, 1, 5, 5\)"),
    (lambda: ForwardForward().expand([X, Y, Y], 0, [1, 2]), "one integer label per sample"),
    (lambda: ForwardForward().expand([X, Y.to(torch.uint8)], 0, [1]), "uint8"),
    (lambda: ForwardForward(classes=26).expand([X, Y], 0, [1]), "have 25 in a channel; pass larger images"),
    (lambda: ForwardForward().expand([X[:, 0, 0, :], Y], 0, [1]), "have 5 in a channel"),
    (lambda: ForwardForward().expand([X[:, 0, 0, 0], Y], 0, [1]), "have 1 in a channel"),
    (lambda: ForwardForward().head(VECTOR), r"the model predicts 3; pass .*ForwardForward\(classes=3\)"),
    (lambda: ForwardForward(classes=3).head(VECTOR)(Given.of(torch.randn(4, 7))), "three rows .* but got 4"),
    (lambda: ForwardForward("channels").head(VECTOR), "one integer label per sample"),
    (lambda: ForwardForward("channels", classes=8).head(boundary_of(torch.randn(4, 7), Y)), "channel counts that the"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(number: int) -> None:
    make, words = REFUSED[number]
    with pytest.raises(bpfx.BpfxError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
