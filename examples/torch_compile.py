"""torch.compile with the backend "bpfx": a loss function is compiled, the optimizer and the loop stay.

    python examples/torch_compile.py

Fashion-MNIST images, bundled; a few seconds on a CPU.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx.backend  # for steps() below; torch.compile finds the backend by itself
import bpfx.data

torch.manual_seed(0)
splits = bpfx.data.load()


def layer(inside: int, outside: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


model = nn.Sequential(
    layer(1, 16, 2),
    layer(16, 16),
    layer(16, 32, 2),
    layer(32, 32),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
)


@torch.compile(backend="bpfx", options={"blocks": ["1", "2", "3"], "head_lr": 2e-3})
def train_loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x)
    return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # the backend trains its heads itself
for epoch in range(2):
    for x, y in bpfx.data.batches(splits.train, 64, seed=0, epoch=epoch):  # the last batch is a smaller one
        loss, right = train_loss(x, y)
        loss.backward()  # block-local gradients, corrected by the offset
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad():  # here the compiled function is the plain one
        results = [train_loss(x, y)[1] for x, y in bpfx.data.batches(splits.test, 500)]
    model.train()
    print(f"epoch {epoch}: loss {loss.item():.2f}, test accuracy {torch.stack(results).mean():.1%}")

(step,) = bpfx.backend.steps(model)
print(step.plan)
folder = Path("runs/torch_compile")
folder.mkdir(parents=True, exist_ok=True)
torch.save(model.state_dict(), folder / "model.pt")
torch.save(step.state_dict(), folder / "step.pt")  # heads, their optimizer, offsets, position in the schedule
print(f"saved after {step.iteration} steps to {folder}")
