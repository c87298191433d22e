"""Autocast around the step; with float16 a GradScaler as well.

    python examples/mixed_precision.py
    python examples/mixed_precision.py float16

Fashion-MNIST images, bundled; a few seconds on a CPU. bfloat16 without an argument.
"""

import contextlib
import sys

import torch
import torch.nn.functional as F
from torch import nn

import bpfx
import bpfx.data

HALF = "float16" in sys.argv[1:]


def amp() -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.float16 if HALF else torch.bfloat16)


torch.manual_seed(0)
splits = bpfx.data.load()
model = nn.Sequential(
    nn.Flatten(),
    *(nn.Sequential(nn.Linear(64 if k else 784, 64), nn.LayerNorm(64), nn.GELU()) for k in range(4)),
    nn.Linear(64, 10),
)
example = next(bpfx.data.batches(splits.train, 64))

with amp():  # for the plan: its peaks are those of this precision
    step = bpfx.convert(model, F.cross_entropy, example, blocks=3)
optimizer = torch.optim.AdamW(step.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cpu", enabled=HALF)  # bfloat16 needs none

for epoch in range(3):
    for x, y in bpfx.data.batches(splits.train, 64, seed=0, epoch=epoch):
        with amp():
            loss = step(x, y)
        scaler.scale(loss).backward()  # outside autocast
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad(), amp():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in bpfx.data.batches(splits.test, 500))
    model.train()
    print(f"epoch {epoch}: loss {loss.item():.2f}, test accuracy {right / len(splits.test):.1%}")

print("parameters:", {p.dtype for p in model.parameters()}, "heads:", {p.dtype for p in step.heads.parameters()})
print("offsets:", {delta.dtype for delta in step.offset_state.values()})
