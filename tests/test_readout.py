"""The model's own last layers as heads, against the layers called by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_gradients
from torch import Tensor, nn

import bpfx


class Words(nn.Module):
    """A small language model: what reads its last hidden states is a norm and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(11, width), nn.LayerNorm(width), nn.Linear(width, 11)
        make = lambda: nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True, norm_first=True)  # noqa: E731
        self.layers = nn.ModuleList(make() for _ in range(3))
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


@pytest.mark.parametrize("name", ["supervised", "tied_readout"])
def test_a_readout_is_the_models_own_norm_and_unembedding(name: str) -> None:
    """By hand: the loss of ``out(norm(h))`` at every boundary, the gradient of each layer through it alone."""
    torch.manual_seed(0)
    model = Words().double()
    ids = torch.randint(11, (4, 6))

    def task(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    step = bpfx.convert(model, task, (ids, ids), blocks=["layers.1", "layers.2"], local_loss=name, offset=None)
    result = step.run_local(ids, ids)
    h = model.embed(ids)
    for k in range(2):
        h = model.layers[k](h)
        local = task(model.out(model.norm(h)), ids)
        torch.testing.assert_close(result.local_losses[k], local.detach())
        named = dict(model.layers[k].named_parameters())
        expected = dict(zip(named, torch.autograd.grad(local, list(named.values())), strict=True))
        assert_gradients({n: result.grads[f"layers.{k}.{n}"] for n in named}, expected)
        h = h.detach()
    assert bool(list(step.heads.parameters())) == (name == "supervised"), "tied: read, without a gradient"
