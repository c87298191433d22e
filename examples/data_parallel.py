"""Two processes, each with half of every batch, train one model block by block; then the same with DDP.

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

On GPUs: init_process_group("nccl"), and model and batches on the process's own device.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import bpfx

EPOCHS = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)), nn.Linear(16, 3))


def make_loader() -> DataLoader:
    torch.manual_seed(1)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 3)).argmax(1)
    data = TensorDataset(x, y)
    return DataLoader(data, batch_size=16, sampler=DistributedSampler(data))  # 16 for each process, 32 together


def main() -> None:
    dist.init_process_group("gloo")
    loader = make_loader()
    example = next(iter(loader))

    # Block by block: a block's gradients are summed over the processes while the next block runs.
    step = bpfx.convert(make_model(), F.cross_entropy, example, blocks=4)
    adamw = partial(torch.optim.AdamW, lr=1e-2)
    trainer = bpfx.BlockTrainer(step, optimizer=adamw, clip_norm=1.0, data_parallel=True)
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            loss = trainer.step(x, y)  # of the whole batch, the same on every process
    if dist.get_rank() == 0:
        print(f"BlockTrainer: loss {loss:.3f}, {len(step.diagnostics.refreshes)} refreshes")

    # The drop-in loop: DistributedDataParallel around the step, as around any module.
    step = bpfx.convert(make_model(), F.cross_entropy, example, blocks=4)
    wrapped = DistributedDataParallel(step)
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            loss = wrapped(x, y)  # of this process's part
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"DistributedDataParallel: loss {loss:.3f}, {len(step.diagnostics.refreshes)} refreshes")
        # One state for all: it resumes on every process. The model itself, step.model, is saved as ever.
        assert step.state_dict()["_extra_state"]["iteration"] == EPOCHS * len(loader)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
