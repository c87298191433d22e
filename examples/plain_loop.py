"""A loop of your own: three lines change, the rest stays.

    python examples/plain_loop.py

Fashion-MNIST images, bundled; a few seconds on a CPU.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import bpfx
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
example = next(bpfx.data.batches(splits.train, 64))

step = bpfx.convert(model, F.cross_entropy, example, blocks=["1", "2", "3"])  # 1. convert
optimizer = torch.optim.AdamW(step.parameters(), lr=2e-3)  # 2. step.parameters(): the heads train, too
print(step.plan)

for epoch in range(2):
    for x, y in bpfx.data.batches(splits.train, 64, seed=0, epoch=epoch, drop_last=True):
        loss = step(x, y)  # 3. instead of F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.eval()  # the model is still your own
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in bpfx.data.batches(splits.test, 500))
    model.train()
    print(f"epoch {epoch}: loss {loss.item():.2f}, test accuracy {right / len(splits.test):.1%}")

folder = Path("runs/plain_loop")
folder.mkdir(parents=True, exist_ok=True)
torch.save(model.state_dict(), folder / "model.pt")  # no heads in it, names unchanged
torch.save({"step": step.state_dict(), "optimizer": optimizer.state_dict()}, folder / "resume.pt")  # all of it
print(f"saved to {folder}")
