"""DGL, PredSim and InfoPro: what they refuse, and training in converted models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_formulas_supervised import ALL, CLASSES, labels_of
from torch import Tensor, nn

import bpfx
from bpfx.losses import Boundary, LocalLoss
from bpfx.losses.dgl import DGL
from bpfx.losses.infopro import InfoPro
from bpfx.losses.predsim import PredSim
from bpfx.losses.supervised import Supervised

# --- what is refused -------------------------------------------------------------------------------------------------

MAP, TOKENS, VECTOR, LABELS = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 6), torch.randn(4, 6), labels_of(4)


def refused(loss: LocalLoss, feature: Tensor = MAP, **options: Any) -> Callable[[], object]:
    return lambda: loss.head(Boundary.of(feature, **options))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: DGL(width=0), "width=0"),
    (lambda: DGL(width=2.5), "width=2.5"),  # type: ignore[arg-type]
    (lambda: DGL(width=True), "width=True"),
    (lambda: PredSim(beta=1.5), "beta=1.5"),
    (lambda: PredSim(beta="x"), "beta='x'"),  # type: ignore[arg-type]
    (lambda: PredSim(mode="all"), "mode='all'.*'both', 'pred', 'sim'"),
    (lambda: InfoPro(reconstruction=5), "reconstruction=5.*two weights"),  # type: ignore[arg-type]
    (lambda: InfoPro(task=(0, -1)), r"task=\(0, -1\).*not negative"),
    (lambda: InfoPro(task=(0, float("nan"))), "finite"),
    (lambda: InfoPro(contrast="simclr"), "contrast='simclr'.*'ce', 'supcon'"),
    (lambda: InfoPro((0, 0), (0, 0)), "nothing is left"),
    (refused(DGL()), "no predictions.*pass a loss_fn"),
    (refused(DGL(), torch.randn(4), classes=3), r"\(4,\).*cut elsewhere"),
    (refused(DGL(), torch.zeros(4, 3, dtype=torch.complex64), classes=3), "complex64"),
    (refused(PredSim(), classes=3), "no input of the loss is one integer label per sample.*mode='pred'"),
    (refused(PredSim(mode="sim"), classes=3), "no input of the loss is one integer label per sample"),
    (refused(PredSim(mode="sim"), inputs=[LABELS], labels=0), "compares samples by their class.*none"),
    (refused(PredSim(mode="pred")), "no predictions"),
    (refused(PredSim(), torch.randn(4, 1, 1, 1, 1, 1), classes=3), "2 to 5 dimensions"),
    (refused(InfoPro(), TOKENS, classes=3, inputs=[MAP], index=1), "block 1 is tokens.*'dgl' or 'predsim'"),
    (refused(InfoPro(), VECTOR, classes=3, inputs=[MAP]), "is vector"),
    (refused(InfoPro(), torch.randn(4, 3, 8, 8, 8), classes=3, inputs=[MAP]), "of other dimensions"),
    (refused(InfoPro(), classes=3, inputs=[TOKENS]), r"the model's input is input_0 \(4, 5, 6\)"),
    (refused(InfoPro(), classes=3, inputs=[LABELS]), "no input of the model is a floating-point tensor"),
    (refused(InfoPro(), inputs=[MAP]), r"no predictions.*task=\(0, 0\)"),
    (refused(InfoPro(contrast="supcon"), classes=3, inputs=[MAP]), "one integer label per sample.*contrast='ce'"),
    (refused(InfoPro((5, 0), (0, 0)), inputs=[MAP], index=2, count=4), "both weights 0 at block 2 of 4"),
    (refused(InfoPro((5, 0), (0, 0)), inputs=[MAP], count=1), "both weights 0 at the model's output"),
    (refused(InfoPro(), classes=3, inputs=[LABELS, MAP], labels=1), "no input of the model is a floating-point"),
    (refused(Supervised(), torch.randn(4), classes=3), r"\(4,\).*cut elsewhere"),
    (refused(Supervised()), "needs predictions to make"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_arguments_and_boundaries_are_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=words):
        call()


# --- in a converted model --------------------------------------------------------------------------------------------


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class Encoder(nn.Module):
    def __init__(self, per_token: bool) -> None:
        super().__init__()
        self.per_token = per_token
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2))
        )
        self.last = nn.Linear(8, 11 if per_token else CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.layers(self.embed(tokens))
        return self.last(h if self.per_token else h.mean(1))


def trains(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, cuts: list[str], loss: Any) -> None:
    step = bpfx.convert(model, loss_fn, (x, y), blocks=cuts, local_loss=loss)
    assert len(step.plan.blocks) == 3
    assert bpfx.audit(step, x, y).ok
    assert not bpfx.audit(step, x, y, cut=False).ok
    optimizer = torch.optim.SGD(step.parameters(), lr=0.05)
    for size in (len(x), len(x), len(x) - 1, 1):  # the last batches of an epoch are smaller
        optimizer.zero_grad()
        found = step(x[:size], y[:size])
        found.backward()
        assert found.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in step.parameters())
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()


@pytest.mark.parametrize("loss", ALL)
def test_trains_a_convnet(loss: str) -> None:
    trains(convnet(), F.cross_entropy, torch.randn(6, 3, 12, 12), labels_of(6), ["2", "4"], ALL[loss]())


@pytest.mark.parametrize("loss", ["dgl", "predsim"])
def test_trains_a_transformer(loss: str) -> None:
    model, x = Encoder(per_token=False), torch.randint(11, (4, 5))
    trains(model, F.cross_entropy, x, labels_of(4), ["layers.0", "layers.1"], ALL[loss]())


def test_trains_a_language_model() -> None:
    def loss_fn(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), y.flatten())

    x = torch.randint(11, (4, 5))
    trains(Encoder(per_token=True), loss_fn, x, x, ["layers.0", "layers.1"], DGL())
