"""The settings of a run, and the model and data that follow from them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import torch
from torch import nn

from bpfx import data, models
from bpfx.errors import BpfxError
from bpfx.losses import Assignment
from bpfx.offset import Offset

__all__ = ["CONFIG_FILE", "METHODS", "Config", "build", "example_batch", "prepare"]

METHODS = ("bp", "local", "offset")
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; what config.json holds.

    Attributes:
        model: name for `bpfx.models.build`.
        data: name for `bpfx.data.load`.
        data_root: folder of torchvision's sets.
        download: let torchvision fetch them.
        image_size: side of the images, pixels; None: what the model needs, else what the data have.
        methods: which of "bp", "local", "offset", in this order.
        iterations: optimizer steps per method.
        batch_size: samples per step.
        lr: highest learning rate of the one-cycle schedule.
        weight_decay: of AdamW.
        seed: of weights, data order and dropout.
        blocks: "auto", a number, or module names, as for `bpfx.convert`.
        local_loss: a name from `bpfx.losses`, or one per region: "layer1=predsim,*=dgl".
        horizon: how many blocks a local loss sees; None: what the loss asks for.
        period: iterations between two refreshes of the offset, or "auto".
        offset_batch: samples of a refresh, the first ones of the training batch; None: all of it.
        micro_batches: pieces in which a refresh goes through its samples.
        alpha: scale of the local gradient, or "auto" with form "B".
        lam: scale of the offset, or "auto" for one per block from what a refresh measures.
        form, decay, clip, match: as for `bpfx.Offset`.
        compile: "eager" or "inductor".
        eval_every: iterations between two tests; None: eight tests in all.
        eval_images: test images used; None: all.
        checkpoint_seconds: seconds between two checkpoints.
        checkpoint_every: iterations between two checkpoints, in addition; None: by seconds only.
        device: "cpu" or "cuda".
    """

    model: str = models.DEFAULT
    data: str = data.BUNDLED
    data_root: str | None = None
    download: bool = False
    image_size: int | None = None
    methods: tuple[str, ...] = METHODS
    iterations: int = 480
    batch_size: int = 100
    lr: float = 4e-3
    weight_decay: float = 1e-2
    seed: int = 0
    blocks: str | int | tuple[str, ...] = "auto"
    local_loss: str = "supervised"
    horizon: int | None = None
    period: int | str = "auto"
    form: str = "A"
    decay: float = 1.0
    clip: float | None = None
    match: float = 0.0
    offset_batch: int | None = None
    micro_batches: int = 1
    alpha: float | str = 1.0
    lam: float | str = 1.0
    compile: str = "eager"
    eval_every: int | None = None
    eval_images: int | None = None
    checkpoint_seconds: float = 20.0
    checkpoint_every: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in (
            "iterations",
            "batch_size",
            "horizon",
            "offset_batch",
            "micro_batches",
            "eval_every",
            "eval_images",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BpfxError(f"{name} must be at least 1, not {value}.")
        if self.offset_batch is not None and self.offset_batch > self.batch_size:
            raise BpfxError(
                f"offset_batch must be at most the batch size, {self.batch_size}, not {self.offset_batch}; "
                "larger refreshes need bpfx.Offset(data=...) in a training loop of your own."
            )
        # Both refuse what they cannot work with, before anything is trained.
        self.offset()
        Assignment(self.local_losses())
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BpfxError(f"lr must be a positive number, not {self.lr}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise BpfxError(f"weight_decay must be a number of at least 0, not {self.weight_decay}.")
        if not (math.isfinite(self.checkpoint_seconds) and self.checkpoint_seconds >= 0):
            raise BpfxError(f"checkpoint_seconds must be a number of at least 0, not {self.checkpoint_seconds}.")
        if not 0 <= self.seed < 2**63:
            raise BpfxError(f"seed must be at least 0 and below 2**63, not {self.seed}.")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) != len(self.methods):
            given = ",".join(self.methods)
            raise BpfxError(f"methods must be some of {', '.join(METHODS)}, each once, not {given!r}.")
        if self.device != "cpu" and not (self.device.startswith("cuda") and torch.cuda.is_available()):
            raise BpfxError(f"The device {self.device!r} is not available here; use cpu.")

    @staticmethod
    def read(folder: Path) -> Config:
        """The settings of the run in `folder`."""
        try:
            stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["settings"]
            lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
            return Config(**(stored | lists))
        except (FileNotFoundError, NotADirectoryError):
            raise BpfxError(f"{folder} holds no run to resume: it has no {CONFIG_FILE}.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BpfxError(f"The settings in {folder / CONFIG_FILE} cannot be read: {error}.") from None

    def offset(self) -> Offset:
        """The offset that these settings describe."""
        return Offset(
            self.period,
            self.offset_batch,
            self.micro_batches,
            self.alpha,
            self.lam,
            form=self.form,
            decay=self.decay,
            clip=self.clip,
            match=self.match,
        )

    def local_losses(self) -> str | dict[str | int, str]:
        """`local_loss` as `bpfx.convert` takes it."""
        if "=" not in self.local_loss:
            return self.local_loss
        pairs = [part.partition("=") for part in self.local_loss.split(",")]
        return {int(k) if k.strip().isdecimal() else k.strip(): loss.strip() for k, _, loss in pairs}

    def blocks_argument(self) -> str | int | list[str]:
        """`blocks` as `bpfx.convert` takes it."""
        return list(self.blocks) if isinstance(self.blocks, tuple) else self.blocks


def prepare(config: Config) -> data.Splits:
    """Load the data in the shape the model of `config` needs."""
    needed = models.requirements(config.model)
    splits = data.load(
        config.data, config.data_root, config.image_size or needed.image_size, needed.channels, config.download
    )
    return dataclasses.replace(splits, test=splits.test.take(config.eval_images))


def build(config: Config, splits: data.Splits) -> nn.Module:
    """The model of `config`, the same weights for the same seed, in training mode."""
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    model = models.build(config.model, splits.num_classes, splits.channels, splits.image_size)
    return model.to(config.device).train()


def example_batch(config: Config, splits: data.Splits) -> tuple[torch.Tensor, torch.Tensor]:
    """The first training batch."""
    x, y = next(data.batches(splits.train, config.batch_size, config.seed))
    return x.to(config.device), y.to(config.device)
