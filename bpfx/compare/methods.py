"""Ways of training that a row can stand for: each makes one whole training step from one batch."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import bpfx
from bpfx import _measure, data
from bpfx._config import Config, build, example_batch
from bpfx.errors import BpfxError
from bpfx.train import Trainee

__all__ = ["Alternating", "Case", "Method", "Micro", "Part", "Serial", "checkpointed", "converted", "plain"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a method is made for.

    Attributes:
        config: model, data and training, with the seed of this run.
        splits: the data.
        period: K, iterations from one refresh, or one BP step, to the next.
        micro_batches: pieces of a batch where a method splits it.
        iterations: length of the one-cycle schedule.
    """

    config: Config
    splits: data.Splits
    period: int
    micro_batches: int
    iterations: int

    @property
    def quarter(self) -> int:
        """Samples in a quarter of a batch, at least 1."""
        return max(1, min(self.config.batch_size, len(self.splits.train)) // 4)


class OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """One cycle as in `bpfx train`, which stays at its end: what is measured after training steps on."""

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 < self.total_steps:
            super().step(epoch)


def _cycle(case: Case) -> partial[OneCycle]:
    # OneCycleLR divides by the length of its phases, which a run of one or two iterations would make zero.
    steps = max(case.iterations, 4)
    return partial(OneCycle, max_lr=case.config.lr, total_steps=steps, cycle_momentum=False)


def _adamw(case: Case) -> partial[torch.optim.AdamW]:
    return partial(torch.optim.AdamW, lr=case.config.lr, weight_decay=case.config.weight_decay)


class Method:
    """A model in training: BP, or what the converted step gives.

    Args:
        trainee: model and, where it is converted, step.
        case: settings.
        cycle: steps in which every kind of step comes once; None where the method itself decides.

    Attributes:
        iteration: training steps made.
    """

    def __init__(self, trainee: Trainee, case: Case, cycle: int | None = 1) -> None:
        self.trainee, self.case, self.cycle, self.iteration = trainee, case, cycle, 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.optimizer = _adamw(self.case)(self.trainee.module.parameters())
        self.schedule = _cycle(self.case)(self.optimizer)

    @property
    def refreshes(self) -> int:
        """Refreshes so far."""
        return 0 if self.trainee.step is None else self.trainee.step.diagnostics.measured

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Leave this batch's gradients in `.grad`; the loss, a scalar."""
        loss = self.trainee(x, y)
        loss.backward()
        return loss.detach()

    def advance(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step, optimizer and schedule included; the loss at the weights before it."""
        assert self.optimizer is not None
        loss = self.gradients(x, y)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.iteration += 1
        return float(loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run continues from."""
        assert self.optimizer is not None
        return {
            "iteration": self.iteration,
            "module": self.trainee.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        assert self.optimizer is not None
        self.iteration = state["iteration"]
        self.trainee.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


class Micro(Method):
    """BP with gradient accumulation: a batch in pieces, sizes as equal as can be, each weighted by its samples."""

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=x.device)
        pieces = min(self.case.micro_batches, len(x))
        for part, labels in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
            loss = F.cross_entropy(self.trainee.model(part), labels) * (len(part) / len(x))
            loss.backward()
            total += loss.detach()
        return total


class Part(Method):
    """BP on the first quarter of every batch."""

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        count = max(1, len(x) // 4)
        return super().gradients(x[:count], y[:count])


class Alternating(Method):
    """Every K-th gradient is BP's, the others are local. Heads have no BP gradient and rest in such a step."""

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        step = self.trainee.step
        assert step is not None
        if self.iteration % self.case.period:
            return super().gradients(x, y)
        result = step.run_bp(x, y)
        for name, grad in result.grads.items():
            step._compiler.weights[name].grad = grad
        return result.loss.detach()


class Serial(Method):
    """`bpfx.BlockTrainer`: block by block, optimizer included, each batch in pieces.

    Args:
        trainee: with its step.
        case: settings.
        mode: of the trainer.
        cycle: as in `Method`.
    """

    def __init__(self, trainee: Trainee, case: Case, mode: str, cycle: int | None = 1) -> None:
        self.mode = mode
        super().__init__(trainee, case, cycle)

    def _prepare(self) -> None:
        assert self.trainee.step is not None
        self.trainer = bpfx.BlockTrainer(
            self.trainee.step,
            optimizer=_adamw(self.case),
            micro_batches=self.case.micro_batches,
            lr_scheduler=_cycle(self.case),
            mode=self.mode,
        )

    def advance(self, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = self.trainer.step(x, y)
        self.iteration += 1
        return float(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "trainer": self.trainer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.trainer.load_state_dict(state["trainer"])


def plain(case: Case) -> Trainee:
    """The model by itself."""
    return Trainee.make(case.config, case.splits, "bp")


def converted(case: Case, offset: bpfx.Offset | None) -> Trainee:
    """The model converted with this offset.

    Raises:
        BpfxError: the model, the local loss or the offset do not go together.
    """
    config = case.config
    model = build(config, case.splits)
    step = bpfx.convert(
        model,
        F.cross_entropy,
        example_batch(config, case.splits),
        blocks=config.blocks_argument(),
        local_loss=config.local_losses(),
        horizon=config.horizon,
        offset=offset,
    )
    return Trainee(step, model, step)


def checkpointed(case: Case) -> Trainee:
    """The model with activation checkpointing of its repeated parts.

    Raises:
        BpfxError: it has none.
    """
    trainee = plain(case)
    if not _measure.checkpoint_parts(trainee.model):
        raise BpfxError(
            f"{case.config.model} has no nn.Sequential or nn.ModuleList of parts, so there is nothing to checkpoint"
        )
    return trainee
