"""What `offset.py` trains: the rows, the parts, and for each part its data, first weights and settings."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import accuracy
import torch
from losses import BEGIN, DEPTHS, WIDTH
from offset_report import LABELS, TITLES
from torch import nn

import bpfx
from bpfx import data
from bpfx._config import Config
from bpfx.data._splits import Normalisation, TensorSplit
from bpfx.models.resnet import SmallResNet
from bpfx.train import Trainee

BLOCKS = 8
TEST_SHARE = 2 / 7  # of the images of the adapter parts
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED = Normalisation((0.5,) * 3, (0.5,) * 3)


class Unusable(Exception):
    """What was asked for on the command line cannot be had."""


# --- rows and parts ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A way of training: ``kind`` is "bp", "small", "probe" or "blocks"; ``offset`` the arguments, None for none."""

    kind: str = "blocks"
    loss: str = "supervised"
    offset: dict[str, Any] | None = None


ROWS = {
    "bp": Row("bp"),
    "small": Row("small"),
    "probe": Row("probe"),
    "local": Row(),
    "local-predsim": Row(loss="predsim"),
    "local-auglocal": Row(loss="auglocal"),
    "offset": Row(offset={}),  # no arguments: this row is what the benchmark is about
    "offset-k4": Row(offset={"period": 4}),
    "offset-k4-matched": Row(offset={"period": 4, "match": 1.0}),
    "offset-k4-variate": Row(offset={"period": 4, "form": "B", "alpha": "auto"}),
    "offset-k4-lambda": Row(offset={"period": 4, "lam": "auto"}),
    "fresh": Row(offset={"period": 1, "batch": 25}),
    "predsim-offset": Row(loss="predsim", offset={}),
    "auglocal-offset": Row(loss="auglocal", offset={}),
}
assert list(ROWS) == list(LABELS)
SUPERVISED = tuple(name for name, row in ROWS.items() if row.kind != "probe" and row.loss == "supervised")
ADAPTERS = ("bp", "small", "probe", "local", "offset", "offset-k4", "offset-k4-matched")


@dataclasses.dataclass(frozen=True)
class Part:
    """A regime: rate, iterations and batch of all its rows."""

    rows: tuple[str, ...]
    lr: float
    iterations: int
    batch: int = 100
    side: int = 28


PARTS = {
    "scratch": Part(tuple(name for name in ROWS if name != "probe"), 4e-3, 600),
    "tuning": Part(SUPERVISED, 5e-4, 200),
    "tuning-fast": Part(SUPERVISED, 2e-3, 200),
    "lokr": Part(ADAPTERS, 1e-2, 100, 32, 128),
    "lora": Part(ADAPTERS, 1e-3, 180, 16, 126),
}
assert list(PARTS) == list(TITLES)
NEEDS_WEIGHTS = ("lokr", "lora")
PROBE_LR = 1e-2  # a lone classifier on fixed features stands, and in so few iterations needs, a high rate
PRETRAINING = {"iterations": 300, "lr": 4e-3}


# --- data and models --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def images(path: Path, seed: int, side: int, normalisation: Normalisation) -> data.Splits:
    """The images of an archive, split into training and test by the seed: the same split for every row."""
    import numpy as np  # only these parts need it

    try:
        with np.load(path) as archive:
            x, y, classes = (archive[name] for name in ("x", "y", "classes"))
    except (OSError, KeyError, ValueError) as error:
        raise Unusable(f"--images {path.name}: no archive with x, y and classes ({error})") from None
    pixels, labels = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    tests = round(TEST_SHARE * len(labels))
    halves = [TensorSplit(pixels[i], labels[i], normalisation, side, 3) for i in (order[tests:], order[:tests])]
    return data.Splits(*halves, tuple(str(name) for name in classes), 3, side, path.stem)


@functools.lru_cache(maxsize=1)
def small_images(root: str | None) -> data.Splits:
    try:
        return data.load("FashionMNIST" if root else data.BUNDLED, root)
    except bpfx.BpfxError as error:
        raise Unusable(str(error)) from None


@functools.lru_cache(maxsize=1)
def loader(path: Path) -> Any:
    """The module that a file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise Unusable(f"--weights-module {path.name}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ground:
    """What the rows of a part have in common: data, first weights, cuts, settings."""

    def __init__(self, name: str, parsed: argparse.Namespace) -> None:
        self.name, self.parsed, self.part = name, parsed, PARTS[name]
        self.network = {"lokr": parsed.lokr_model, "lora": "dinov2_vits14"}.get(name, "SmallResNet")
        splits = self.splits(0)
        self.blocks: int | list[str] = BLOCKS
        if name not in NEEDS_WEIGHTS:
            self.blocks = [f"stages.{m}" for m in BEGIN[BLOCKS].split()]
        self.iterations = parsed.iterations or self.part.iterations
        if name == "scratch" and not parsed.data_root and not parsed.iterations:
            self.iterations //= 2  # as many epochs would be more than ten times those of the whole set
        self.settings: dict[str, Any] = {
            "model": self.network,
            "data": splits.name,
            "train_images": len(splits.train),
            "test_images": len(splits.test),
            "image_size": splits.image_size,
            "iterations": self.iterations,
            "batch_size": min(self.part.batch, len(splits.train)),
            "optimizer": "AdamW with a one-cycle rate",
            "lr": self.part.lr,
            "weight_decay": Config.weight_decay,
            "augmentation": "none",
            "blocks": BLOCKS,
            "try_out": any((parsed.iterations, parsed.train_size, parsed.test_size)),
        }
        if name.startswith("tuning"):
            before = PRETRAINING | ({"iterations": parsed.iterations} if parsed.iterations else {})
            self.settings["pretraining"] = before | {"classes": splits.num_classes // 2}
        if name in NEEDS_WEIGHTS:
            self.settings |= {"adapters": ADAPTED[name], "probe_lr": PROBE_LR}

    def splits(self, seed: int) -> data.Splits:
        if self.name in NEEDS_WEIGHTS:
            norm = CENTRED if self.network == "efficientnet_lite0" else IMAGENET
            found = images(self.parsed.images, seed, self.part.side, norm)
        else:
            found = small_images(self.parsed.data_root)
        sizes = self.parsed.train_size, self.parsed.test_size
        train_split, test = (s.take(n) for s, n in zip((found.train, found.test), sizes, strict=True))
        return dataclasses.replace(found, train=train_split, test=test)

    def config(self, seed: int) -> Config:
        """For `accuracy`'s order of batches and its training."""
        keys = ("iterations", "batch_size", "lr", "weight_decay")
        return Config(seed=seed, **{key: self.settings[key] for key in keys})

    def model(self, seed: int, cache: Path, bare: bool = False, fresh: bool = False) -> nn.Module:
        """The first weights of every row; ``bare``: no adapters, frozen backbone; ``fresh``: not pretrained here."""
        splits = self.splits(seed)
        if self.name in NEEDS_WEIGHTS:
            torch.manual_seed(seed)
            return adapted(self.name, self.network, splits, loader(self.parsed.weights_module), bare)
        config = self.config(seed)
        torch.manual_seed(seed)
        model = SmallResNet(splits.num_classes, splits.channels, WIDTH, DEPTHS).train()
        if fresh or self.name == "scratch":
            return model
        before = self.settings["pretraining"]
        facts = [splits.name, len(splits.train), config.batch_size, before["iterations"], before["lr"], seed]
        kept = cache / ("-".join(str(fact) for fact in facts) + ".pt")
        with contextlib.suppress(FileNotFoundError):  # it may go while we look: the other process has finished
            model.load_state_dict(torch.load(kept, weights_only=True))
            return model
        labels = torch.cat([y for _, y in data.batches(splits.train, 1000)])
        half = accuracy.Some(splits.train, torch.arange(len(labels))[labels < before["classes"]])
        config = dataclasses.replace(config, iterations=before["iterations"], lr=before["lr"])
        accuracy.fit(Trainee(model, model), config, accuracy.endless(half, config))
        cache.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), beside)
        beside.replace(kept)
        return model


ADAPTED = {
    "lokr": "PEFT LoKr, rank 8, on every convolution but the stem's and the depthwise ones; new classifier",
    "lora": "PEFT LoRA, rank 8, on both linear layers of every MLP; new classifier",
}


def adapted(part: str, network: str, splits: data.Splits, weights: Any, bare: bool) -> nn.Module:
    """A pretrained model with a new classifier, and adapters unless it is to be ``bare``."""
    import peft

    build = getattr(weights, network, None)
    if build is None:
        raise Unusable(f"the weights module has no function {network}()")
    try:
        model = build(img_size=splits.image_size) if part == "lora" else build()
    except (ImportError, FileNotFoundError) as error:
        raise Unusable(f"the weights of {network} cannot be had: {error}") from None
    classifier = "head" if part == "lora" else "classifier"
    if hasattr(model, "reset_classifier"):  # timm's
        model.reset_classifier(splits.num_classes)
    else:
        model.classifier = nn.Linear(model.classifier[-1].in_features, splits.num_classes)
    if bare:
        model.requires_grad_(False).get_submodule(classifier).requires_grad_(True)
        return model.eval()  # a linear probe sees fixed features, so BatchNorm's statistics stay
    if part == "lora":
        config: Any = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r".*mlp\.fc[12]", modules_to_save=[classifier])
    else:
        convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        config = peft.LoKrConfig(r=8, alpha=8, target_modules=convolutions[1:], modules_to_save=[classifier])
    return peft.get_peft_model(model, config).train()
