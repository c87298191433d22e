"""Accelerate: prepare, accumulate, clip, save and resume.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py

Fashion-MNIST images, bundled; a few seconds on a CPU.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import bpfx
import bpfx.data
from bpfx.integrations.accelerate import plain_checkpoints

set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
plain_checkpoints(accelerator)  # so that save_state writes a plain model, and heads and offsets beside it

layers = [nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)]
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), *layers, nn.Linear(128, 10)).to(accelerator.device)
splits = bpfx.data.load()
loader = DataLoader(list(zip(*next(bpfx.data.batches(splits.train, 3000)), strict=True)), batch_size=50, shuffle=True)

x, y = next(iter(loader))
step = bpfx.convert(model, F.cross_entropy, (x.to(accelerator.device), y.to(accelerator.device)), blocks=4)
optimizer = torch.optim.AdamW(step.parameters(), lr=1e-3)
step, optimizer, loader = accelerator.prepare(step, optimizer, loader)

for epoch in range(3):
    for x, y in loader:
        with accelerator.accumulate(step):
            loss = step(x, y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(step.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.2f}")
    accelerator.save_state("runs/accelerate_loop/state")  # accelerator.load_state(…) continues from here

plain = accelerator.unwrap_model(step).model.eval()
with torch.no_grad():
    right = sum((plain(x).argmax(1) == y).sum().item() for x, y in bpfx.data.batches(splits.test, 500))
accelerator.print(f"test accuracy {right / len(splits.test):.1%}")
accelerator.save_model(plain, "runs/accelerate_loop/model")  # model.safetensors, names unchanged
