"""DGL, PredSim and InfoPro against their formulas, written out here in plain PyTorch; and what they refuse.

The transcriptions read a head's parameters in the order of the layers, and share no code with the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfx.losses import Boundary, Feature, Given, Head, LocalLoss, Target
from bpfx.losses.dgl import DGL
from bpfx.losses.infopro import InfoPro, supcon
from bpfx.losses.predsim import PredSim

CLASSES = 3


def labels_of(samples: int) -> Tensor:
    return torch.arange(samples) % CLASSES


class Alone:
    """A loss on one feature, without a model: its head, what the head is given, and the leaves of its gradients."""

    def __init__(
        self,
        loss: LocalLoss,
        feature: Tensor,
        labels: Tensor | None = None,
        index: int = 0,
        count: int = 4,
        channels: int = 3,
    ) -> None:
        torch.manual_seed(3)
        self.labels = labels_of(len(feature)) if labels is None else labels
        self.image = torch.randn(len(feature), channels, 10, 8, dtype=feature.dtype)
        self.feature = feature.clone().requires_grad_()
        inputs = [self.image, self.labels]
        boundary = Boundary.of(feature, classes=CLASSES, inputs=inputs, labels=1, index=index, count=count)
        self.head: Head = loss.head(boundary)
        with torch.no_grad():  # away from zero, and from the unit norms
            for p in self.head.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        self.given = Given.of(self.feature, inputs, task=self.task)

    def task(self, scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, self.labels)

    def leaves(self) -> list[Tensor]:
        return [self.feature, *self.head.parameters()]

    def loss(self) -> Tensor:
        return self.head(self.given)

    def check(self, transcription: Callable[[Iterator[Tensor]], Tensor]) -> None:
        """Value and all gradients are those of the transcription, which reads the head's parameters one by one."""
        expected = transcription(iter(self.head.parameters()))
        found = self.loss()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert found.shape == ()
        ours = torch.autograd.grad(found, self.leaves(), allow_unused=True)
        theirs = torch.autograd.grad(expected, self.leaves(), allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            assert one is not None and other is not None
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def randn(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64)


# --- transcriptions --------------------------------------------------------------------------------------------------


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over samples and positions, the biased variance, one feature at a time."""
    result = []
    for c in range(x.shape[1]):
        values = x[:, c]
        variance = ((values - values.mean()) ** 2).mean()
        result.append((values - values.mean()) / (variance + 1e-5) ** 0.5 * weight[c] + bias[c])
    return torch.stack(result, 1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5) ** 0.5 * weight + bias


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    rows = [torch.log(torch.exp(s).sum()) - s[y] for s, y in zip(scores, labels, strict=True)]
    return torch.stack(rows).mean()


def linear_norm_relu(x: Tensor, p: Iterator[Tensor], norm: Callable[..., Tensor]) -> Tensor:
    for _ in range(3):
        x = norm(x @ next(p).T + next(p), next(p), next(p)).clamp_min(0)
    return x


def dgl(case: Alone) -> Callable[[Iterator[Tensor]], Tensor]:
    def run(p: Iterator[Tensor]) -> Tensor:
        h = case.feature
        norm: Callable[..., Tensor] = layer_norm
        if h.dim() == 4:
            norm = batch_norm
            h = F.adaptive_avg_pool2d(h, (math.ceil(h.shape[2] / 4), math.ceil(h.shape[3] / 4)))
            for _ in range(3):
                mixed = torch.einsum("oc,nchw->nohw", next(p).squeeze(-1), h) + next(p)[:, None, None]
                h = batch_norm(mixed, next(p), next(p)).clamp_min(0)
            h = F.adaptive_avg_pool2d(h, 2).flatten(1)
        elif h.dim() == 3:
            h = linear_norm_relu(h, p, layer_norm).mean(1)
        h = linear_norm_relu(h, p, norm)
        return cross_entropy(h @ next(p).T + next(p), case.labels)

    return run


def similarities(rows: list[Tensor]) -> list[list[Tensor]]:
    def cosine(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / ((a * a).sum() ** 0.5 * (b * b).sum() ** 0.5)

    return [[cosine(a, b) for b in rows] for a in rows]


def predsim(case: Alone, beta: float, mode: str, sides: tuple[int, ...]) -> Callable[[Iterator[Tensor]], Tensor]:
    def run(p: Iterator[Tensor]) -> Tensor:
        h = case.feature
        pred = torch.zeros((), dtype=h.dtype)
        if mode != "sim":
            image = h.transpose(1, 2) if h.dim() == 3 else h
            if h.dim() == 4:
                image = F.adaptive_avg_pool2d(image, sides)
            if h.dim() == 3:
                image = F.adaptive_avg_pool1d(image, sides)
            pred = cross_entropy(image.flatten(1) @ next(p).T + next(p), case.labels)
        if mode == "pred":
            return pred
        weight = next(p)
        mapped = F.conv2d(h, weight, padding=1).flatten(2) if h.dim() == 4 else h @ weight.T
        if h.dim() == 3:
            mapped = mapped.transpose(1, 2)
        rows = []
        for sample in mapped:
            if sample.dim() == 1 or sample.shape[1] == 1:
                rows.append(sample.flatten())
                continue
            centred = sample - sample.mean(1, keepdim=True)
            rows.append(((centred**2).sum(1) / (sample.shape[1] - 1)) ** 0.5)
        kept = [i for i, y in enumerate(case.labels) if y >= 0]
        mine = similarities([rows[i] for i in kept])
        onehots = [torch.eye(CLASSES, dtype=h.dtype)[case.labels[i]] for i in kept]
        wanted = similarities(onehots)
        sim = sum((a - b) ** 2 for x, y in zip(mine, wanted, strict=True) for a, b in zip(x, y, strict=True))
        sim = sim / len(kept) ** 2
        return sim if mode == "sim" else (1 - beta) * pred + beta * sim

    return run


def contrastive(z: Tensor, labels: Tensor) -> Tensor:
    terms = []
    kept = [i for i, y in enumerate(labels) if y >= 0]
    for i in kept:
        positives = [j for j in kept if j != i and labels[j] == labels[i]]
        if positives:
            below = torch.stack([torch.exp(z[i] @ z[a] / 0.07) for a in kept if a != i]).sum()
            logs = [torch.log(torch.exp(z[i] @ z[j] / 0.07) / below) for j in positives]
            terms.append(-sum(logs) / len(positives))
    return torch.stack(terms).mean()


def infopro(case: Alone, weights: tuple[float, float], contrast: str) -> Callable[[Iterator[Tensor]], Tensor]:
    def run(p: Iterator[Tensor]) -> Tensor:
        h, total = case.feature, torch.zeros((), dtype=case.feature.dtype)
        if weights[0]:
            x = F.interpolate(h, case.image.shape[2:], mode="bilinear", align_corners=False)
            x = batch_norm(F.conv2d(x, next(p), next(p), padding=1), next(p), next(p)).clamp_min(0)
            x = 1 / (1 + torch.exp(-F.conv2d(x, next(p), next(p), padding=1)))
            t = torch.stack([(i - i.min()) / (i.max() - i.min()) for i in case.image])
            total = total + weights[0] * -(t * torch.log(x) + (1 - t) * torch.log(1 - x)).mean()
        if weights[1]:
            for stride in (2, 2, 1):
                h = F.conv2d(h, next(p), next(p), stride=stride, padding=1)
                h = batch_norm(h, next(p), next(p)).clamp_min(0)
            z = h.mean((2, 3)) @ next(p).T + next(p)
            if contrast == "ce":
                scores = z.clamp_min(0) @ next(p).T + next(p)
                total = total + weights[1] * cross_entropy(scores, case.labels)
            else:
                z = z / (z**2).sum(1, keepdim=True) ** 0.5
                total = total + weights[1] * contrastive(z, case.labels)
        return total

    return run


# --- values and gradients --------------------------------------------------------------------------------------------

SHAPES = [(6, 4, 9, 7), (6, 5, 1, 1), (6, 4, 4, 4), (2, 4, 5, 5), (6, 7, 8), (6, 1, 8), (6, 10), (2, 10)]
IMAGES = [s for s in SHAPES if len(s) == 4]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgl_is_its_formula(shape: tuple[int, ...]) -> None:
    case = Alone(DGL(), randn(*shape))
    case.check(dgl(case))


def test_dgl_width_caps_every_hidden_layer() -> None:
    case = Alone(DGL(width=3), randn(6, 8, 9, 9))
    case.check(dgl(case))
    assert max(m.out_features for m in case.head.modules() if isinstance(m, nn.Linear)) == 3
    assert max(m.out_channels for m in case.head.modules() if isinstance(m, nn.Conv1d)) == 3
    paper = Alone(DGL(), randn(6, 8, 9, 9)).head
    assert [m.out_features for m in paper.modules() if isinstance(m, nn.Linear)] == [32, 32, 32, CLASSES]


@pytest.mark.parametrize("mode", ["both", "pred", "sim"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predsim_is_its_formula(shape: tuple[int, ...], mode: str) -> None:
    case = Alone(PredSim(beta=0.7, mode=mode), randn(*shape))
    sides = shape[2:] if len(shape) == 4 else shape[1:2]
    case.check(predsim(case, 0.7, mode, sides))


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((3, 32, 16, 16), (8, 8)), ((3, 33, 16, 16), (4, 8)), ((3, 300, 9, 3), (2, 3)), ((3, 70, 100), (18,))],
    ids=str,
)
def test_predsim_pools_to_2048_features(shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
    if len(shape) == 3:
        sides = (18,)  # 70 → 35 → 18: 1800 features
    case = Alone(PredSim(mode="pred"), randn(*shape))
    case.check(predsim(case, 0.0, "pred", sides))
    width = next(case.head.parameters()).shape[1]
    assert width == math.prod(sides) * (shape[2] if len(shape) == 3 else shape[1]) <= 2048


def test_predsim_predicts_zero_at_first() -> None:
    feature = randn(4, 5, 6, 6)
    head = PredSim().head(Boundary.of(feature, classes=CLASSES, inputs=[labels_of(4)], labels=0))
    assert not head.predict(feature).any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["both", "sim"])
def test_predsim_leaves_ignored_labels_out_of_the_similarities(mode: str) -> None:
    labels = torch.tensor([0, -100, 2, 1, -100, 2])
    case = Alone(PredSim(beta=1.0, mode=mode), randn(6, 4, 5, 5), labels)
    transcription = predsim(case, 1.0, "sim", (5, 5))
    if mode == "sim":
        case.check(transcription)
    else:
        similar = case.head.similar.parameters()  # type: ignore[union-attr, operator]
        torch.testing.assert_close(case.loss(), transcription(similar))
    nobody = Alone(PredSim(mode="sim"), randn(6, 4, 5, 5), torch.full((6,), -100))
    assert nobody.loss() == 0


@pytest.mark.parametrize("contrast", ["ce", "supcon"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_infopro_is_its_formula(shape: tuple[int, ...], contrast: str) -> None:
    labels = torch.tensor([0, 1, 0, 2, 2, 0])[: shape[0]] if shape[0] > 2 else torch.tensor([1, 1])
    case = Alone(InfoPro(contrast=contrast), randn(*shape), labels)
    case.check(infopro(case, (5.0, 0.5), contrast))


@pytest.mark.parametrize(
    ("index", "count", "weights"),
    [(0, 2, (5, 0.5)), (0, 4, (5, 0.5)), (1, 4, (2.5, 0.75)), (2, 4, (0, 1)), (1, 3, (0, 1)), (3, 4, (0, 1))],
)
def test_infopro_weights_are_linear_in_the_block(index: int, count: int, weights: tuple[float, float]) -> None:
    case = Alone(InfoPro(), randn(6, 4, 5, 5), index=index, count=count)
    case.check(infopro(case, weights, "ce"))
    assert (case.head.inputs == (0,)) == (weights[0] > 0)


def test_infopro_rebuilds_images_of_any_channels() -> None:
    case = Alone(InfoPro(), randn(6, 4, 5, 5), channels=1)
    case.check(infopro(case, (5, 0.5), "ce"))


def test_infopro_without_labels() -> None:
    loss = InfoPro(task=(0, 0))
    assert loss.label_free and not InfoPro().label_free and not InfoPro.label_free
    feature = randn(4, 5, 6, 6)
    head = InfoPro(reconstruction=(1, 1), task=(0, 0)).head(Boundary.of(feature, inputs=[randn(4, 3, 8, 8)]))
    assert not head.uses_task and head.inputs == (0,)
    assert sum(p.numel() for p in head.parameters()) == 5 * 12 * 9 + 12 + 24 + 12 * 3 * 9 + 3
    assert head(Given.of(feature, [randn(4, 3, 8, 8)])).isfinite()


def test_supcon_leaves_ignored_labels_out() -> None:
    z = F.normalize(randn(7, 5), dim=1)
    labels = torch.tensor([0, -100, 0, 1, 2, -100, 1])
    torch.testing.assert_close(supcon(z, labels), contrastive(z, labels))


# --- predictions of every form ---------------------------------------------------------------------------------------


def boundary_of(feature: Feature, *targets: Target, **options: Any) -> Boundary:
    return Boundary([feature], list(targets), **options)


PREDICTIONS = {
    "per token": ((4, 6, 8), 2, Target((4, 6, 11), 0), (3, 6, 11)),
    "per token, flat": ((4, 6, 8), 2, Target((24, 11), None), (18, 11)),
    "of tokens": ((4, 6, 8), 2, Target((4, 11), 0), (3, 11)),
    "per pixel": ((4, 8, 9, 9), 1, Target((4, 2, 12, 10), 0), (3, 2, 12, 10)),
    "of maps, features last": ((4, 9, 9, 8), 3, Target((4, 11), 0), (3, 11)),
    "of sequences, features second": ((4, 8, 9), 1, Target((4, 11), 0), (3, 11)),
    "of volumes": ((4, 8, 5, 5, 5), 1, Target((4, 11), 0), (3, 11)),
    "of vectors, several numbers": ((4, 8), 1, Target((4, 2, 3), 0), (3, 2, 3)),
}
PREDICTORS: dict[str, Callable[[], LocalLoss]] = {"dgl": DGL, "predsim": lambda: PredSim(mode="pred")}


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("loss", PREDICTORS)
def test_predictions_have_the_models_shape_at_any_batch_size(loss: str, name: str) -> None:
    shape, channel, target, expected = PREDICTIONS[name]
    feature = Feature("h", shape, 0, channel, torch.float32, torch.device("cpu"))
    head = PREDICTORS[loss]().head(boundary_of(feature, target))
    assert head.predict(torch.randn(3, *shape[1:])).shape == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", PREDICTORS)
def test_a_prediction_per_token_sees_no_other_token(loss: str) -> None:
    value = torch.randn(2, 6, 8, requires_grad=True)
    head = PREDICTORS[loss]().head(boundary_of(Feature.of(value), Target((2, 6, 11), 0)))
    for p in head.parameters():
        nn.init.normal_(p)
    (found,) = torch.autograd.grad(head.predict(value)[:, 2].sum(), [value])  # type: ignore[attr-defined]
    assert found[:, 2].any() and not found[:, [0, 1, 3, 4, 5]].any()


# Positions of features that lie elsewhere, and several values that cross.
def test_features_last_give_the_same_loss_as_features_second() -> None:
    for loss in (DGL(), PredSim(), InfoPro()):
        first = Alone(loss, randn(6, 4, 5, 5))
        last = Feature("h", (6, 5, 5, 4), 0, 3, torch.float64, torch.device("cpu"))
        inputs = [Feature.of(first.image), Feature.of(first.labels)]
        head = loss.head(boundary_of(last, Target((6, CLASSES), 0), count=4, inputs=inputs, labels=1))
        head.load_state_dict(first.head.state_dict())
        given = Given.of(first.feature.movedim(1, -1), first.given.inputs, task=first.task)
        torch.testing.assert_close(head(given), first.loss())


@pytest.mark.parametrize("loss", [DGL(), PredSim(), InfoPro()], ids=lambda loss: loss.name)
def test_several_values_that_cross_are_all_read(loss: LocalLoss) -> None:
    one, two = torch.randn(4, 6, 8, 8, requires_grad=True), torch.randn(4, 3, 4, 4, requires_grad=True)
    image, labels = torch.randn(4, 3, 16, 16), labels_of(4)
    boundary = Boundary.of(one, classes=CLASSES, inputs=[image, labels], labels=1)
    boundary.features.append(Feature.of(two.detach(), "two"))
    head = loss.head(boundary)
    given = Given((one, two), (image, labels), task=lambda scores: F.cross_entropy(scores, labels))
    found = torch.autograd.grad(head(given), [one, two])
    assert all(g.any() and g.isfinite().all() for g in found)


# --- degenerate inputs -----------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[], LocalLoss]] = {
    "dgl": DGL,
    "predsim": PredSim,
    "predsim, sim": lambda: PredSim(mode="sim"),
    "infopro": InfoPro,
    "infopro, supcon": lambda: InfoPro(contrast="supcon"),
}
DEGENERATE: dict[str, tuple[Tensor, Tensor | None]] = {
    "zeros": (torch.zeros(6, 4, 5, 5), None),
    "constant": (torch.full((6, 4, 5, 5), 3.7), None),
    "constant in each channel": (torch.randn(6, 4, 1, 1).expand(6, 4, 5, 5).clone(), None),
    "one dead sample": (torch.randn(6, 4, 5, 5) * torch.tensor([1, 0, 1, 1, 1, 1.0])[:, None, None, None], None),
    "large": (torch.randn(6, 4, 5, 5) * 1e6, None),
    "tiny": (torch.randn(6, 4, 5, 5) * 1e-12, None),
    "one class": (torch.randn(6, 4, 5, 5), torch.ones(6, dtype=torch.long)),
    "one position": (torch.randn(6, 4, 1, 1), None),
    "two samples": (torch.randn(2, 4, 5, 5), None),
    "one sample": (torch.randn(1, 4, 5, 5), None),
    "one sample, one position": (torch.randn(1, 4, 1, 1), None),
    "one channel": (torch.randn(6, 1, 5, 5), None),
    "one sample of zeros": (torch.zeros(1, 4, 5, 5), None),
    "constant vectors": (torch.full((6, 4), 0.1), None),
    "constant tokens": (torch.full((6, 3, 4), 0.1), None),
    "one token of one sample": (torch.randn(1, 1, 4), None),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("loss", ALL)
def test_loss_and_gradients_are_finite(loss: str, name: str) -> None:
    feature, labels = DEGENERATE[name]
    if loss.startswith("infopro") and feature.dim() != 4:
        return
    case = Alone(ALL[loss](), feature, labels)
    if name == "zeros":
        case.image.zero_()
    found = case.loss()
    grads = torch.autograd.grad(found, case.leaves(), allow_unused=True, materialize_grads=True)
    assert found.isfinite() and found.dtype == torch.float32
    assert all(g.isfinite().all() for g in grads)
    if loss.startswith("predsim") and ("constant" in name or name == "zeros"):
        # Rounding noise must not be taken for a direction and blown up.
        assert grads[0].abs().max() < 1e3


def test_a_single_sample_is_normalised_by_the_running_statistics() -> None:
    head = Alone(DGL(), randn(8, 4, 5, 5)).head
    for _ in range(3):
        head.predict(torch.randn(8, 4, 5, 5).double())  # type: ignore[attr-defined]
    # A map of one position, so that every norm of the head sees one value per feature.
    one = torch.randn(1, 4, 1, 1).double()
    before = {n: b.clone() for n, b in head.named_buffers()}
    trained = head.predict(one)  # type: ignore[attr-defined]
    assert all(torch.equal(b, before[n]) for n, b in head.named_buffers())
    torch.testing.assert_close(trained, head.eval().predict(one))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loss", ALL)
def test_other_dtypes(loss: str, dtype: torch.dtype) -> None:
    case = Alone(ALL[loss](), torch.randn(6, 4, 5, 5).to(dtype))
    assert {t.dtype for t in case.head.parameters()} == {dtype}
    found = case.loss()
    assert found.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, case.leaves()))


@pytest.mark.parametrize("loss", ALL)
def test_a_few_steps_lower_the_loss(loss: str) -> None:
    case = Alone(ALL[loss](), torch.randn(12, 4, 6, 6))
    before = case.feature.detach().clone()
    optimizer = torch.optim.SGD(case.leaves(), lr=0.05)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        value = case.loss()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.97 * values[0]
    assert not torch.equal(before, case.feature)


@pytest.mark.parametrize("loss", ALL)
def test_heads_are_functional_and_change_no_input(loss: str) -> None:
    case = Alone(ALL[loss](), torch.randn(6, 4, 5, 5))
    before = [t.clone() for t in (case.feature, case.image)]
    expected = case.loss()
    swapped = {n: t.detach().clone() for n, t in (*case.head.named_parameters(), *case.head.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(case.head, swapped, (case.given,)), expected)
    assert torch.equal(before[0], case.feature) and torch.equal(before[1], case.image)
    assert case.head.description
    plain = [k for m in case.head.modules() for k, v in vars(m).items() if isinstance(v, Tensor)]
    assert not plain


@pytest.mark.parametrize("loss", ALL)
def test_heads_are_traced_as_one_graph(loss: str) -> None:
    case = Alone(ALL[loss](), torch.randn(6, 4, 5, 5))
    compiled = torch.compile(case.head, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(case.given), case.loss())
