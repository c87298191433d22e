"""The front door: ``bpfx.convert`` and ``bpfx.plan``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bpfx.compiler import Compiler, LocalLosses
from bpfx.errors import BpfxError
from bpfx.offset import Offset
from bpfx.passes.batch import as_call
from bpfx.passes.partition import Blocks
from bpfx.plan import Plan
from bpfx.step import Step
from bpfx.trainer import check_micro_batches

LossFn = Callable[..., Tensor]
_DEFAULT_OFFSET = Offset()
DEFAULT_MICRO_BATCHES = 4


def convert(
    model: nn.Module,
    loss_fn: LossFn | str | None,
    batch: Any,
    *,
    blocks: Blocks = "auto",
    memory_budget: int | str | None = None,
    local_loss: LocalLosses = "supervised",
    horizon: int | None = None,
    offset: Offset | None = _DEFAULT_OFFSET,
    compile: str = "eager",
) -> Step:
    """Cut a model into blocks and return the step that trains it.

    Args:
        model: any module, in any device and dtype; it is never changed. A model whose root is in eval mode is captured
            in train mode.
        loss_fn: ``loss_fn(output, target) -> scalar``; ``None`` for a model that returns its loss, an object with
            ``.loss``, or a mapping with ``"loss"``; ``"local"`` to train without targets: a label-free local loss then
            judges the model's output as well.
        batch: an example batch: ``(inputs, targets)`` with a ``loss_fn`` (inputs a tensor, a tuple or a dict),
            otherwise what the model is called with. The step takes batches of any size with the same structure.
        blocks: ``"auto"`` (the fewest blocks whose local step stays below 24.5 % of plain BP's predicted peak, at most
            16), a count, a list of module names that each begin a new block, or a policy that chooses among
            :class:`bpfx.passes.partition.CutPoint`.
        memory_budget: bytes or ``"2GiB"`` above the state (weights, optimizer state, offsets): the fewest blocks, and
            for those the fewest micro-batches, with which both steps of :class:`bpfx.BlockTrainer` are predicted to
            fit. The trainer takes the micro-batches from the plan; the drop-in loop runs whole batches, and warns
            where it needs more than the budget. Excludes ``blocks``.
        local_loss: name or instance from :mod:`bpfx.losses`, a pair ``(loss, weight)``, or a mapping from module names
            (the blocks that end in the module), block numbers and ``"*"`` (all others) to those.
        horizon: how many blocks a local loss sees before its head; 1 is greedy, the number of blocks is BP. ``None``
            for what the local loss asks for, which is 1 but for ``loco`` (2).
        offset: :class:`bpfx.Offset`, by default ``Offset()``; ``None`` for plain local training.
        compile: ``"eager"`` (the default: nothing to wait for) or ``"inductor"``.

    Raises:
        BpfxError: anything the caller can put right, in plain words.

    Example:
        >>> import torch, bpfx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> step = bpfx.convert(net, torch.nn.functional.cross_entropy, (x, y), blocks=2)
        >>> optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
        >>> loss = step(x, y); loss.backward(); optimizer.step()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """
    _check_offset(offset)
    compiler = Compiler(model, loss_fn, batch, blocks, memory_budget, local_loss, horizon, compile)
    return Step(compiler, Offset() if offset is _DEFAULT_OFFSET else offset)  # settings that no other step shares


def plan(
    model: nn.Module,
    loss_fn: LossFn | str | None,
    batch: Any,
    *,
    blocks: Blocks = "auto",
    memory_budget: int | str | None = None,
    local_loss: LocalLosses = "supervised",
    horizon: int | None = None,
    offset: Offset | None = _DEFAULT_OFFSET,
    micro_batches: int | None = None,
) -> Plan:
    """What :func:`convert` would do and cost, as a printable table; nothing is trained. Arguments as there.

    Beside our steps stand the recipes that a user would otherwise run: BP, activation checkpointing (in the segments
    that are estimated to need the least), with the optimizer in the backward pass, and with micro-batches.

    Args:
        micro_batches: for the rows with micro-batches; ``None`` for what a budget chose, otherwise 4.

    Example:
        >>> import torch, bpfx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pair = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> len(bpfx.plan(net, torch.nn.functional.cross_entropy, pair, blocks=2).blocks)
        2
    """
    _check_offset(offset)
    if micro_batches is not None:
        check_micro_batches(micro_batches)
    compiler = Compiler(model, loss_fn, batch, blocks, memory_budget, local_loss, horizon)
    with torch.random.fork_rng():
        made, tensors = compiler.plan, compiler.spec.flatten(*as_call(batch))
    # Without a budget, what a user would try first.
    usual = made.micro_batches if memory_budget is not None else DEFAULT_MICRO_BATCHES
    count = micro_batches if micro_batches is not None else usual
    try:
        made.schedules = compiler.schedules(tensors, count, offset)
    except BpfxError as error:
        made.notes.append(str(error))
    len(made.predicted)  # asking may add a note, and a plan is there to be asked
    return made


def _check_offset(offset: object) -> None:
    if offset is not None and not isinstance(offset, Offset):
        raise BpfxError(f"offset={offset!r}: pass bpfx.Offset(…), or None for plain local training")
