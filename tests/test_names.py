"""What a model calls its parts changes nothing, also where it uses the words that the compiler uses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import bpfx

ORDINARY = "layers"


class Named(nn.Module):
    """Four linear layers, in a submodule of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)), nn.Linear(6, 3))
        self.part = name
        self.add_module(name, layers)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.part)(x)


def trained(name: str, block_serial: bool) -> list[Tensor]:
    """Parameters of the model and the heads after three steps, refreshes among them."""
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 6, generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(3)]
    torch.manual_seed(2)
    step = bpfx.convert(
        Named(name),
        nn.functional.cross_entropy,
        batches[0],
        blocks=[f"{name}.1", f"{name}.3"],
        offset=bpfx.Offset(period=2, alpha=0.5),
    )
    assert bpfx.audit(step, *batches[0]).ok
    sgd = partial(torch.optim.SGD, lr=0.1)
    if block_serial:
        trainer = bpfx.BlockTrainer(step, sgd, micro_batches=2, clip_norm=0.5)
        for batch in batches:
            trainer.step(*batch)
    else:
        optimizer = sgd(step.parameters())
        for batch in batches:
            optimizer.zero_grad()
            step(*batch).backward()
            optimizer.step()
    return [p.detach() for p in step.parameters()]


@pytest.mark.parametrize("block_serial", [False, True], ids=["drop-in", "block-serial"])
@pytest.mark.parametrize("name", ["heads", "loss_fn", "outside_loss", "model", "values_0", "loss"])
def test_names_of_parts_change_nothing(name: str, block_serial: bool) -> None:
    for found, expected in zip(trained(name, block_serial), trained(ORDINARY, block_serial), strict=True):
        assert torch.equal(found, expected)
