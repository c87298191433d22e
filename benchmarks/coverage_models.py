"""What `coverage.py` converts: every model by name, a batch for it, and a loss as a user would write it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import coverage_configs
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx  # noqa: F401  (torchvision's import may need it)

LIBRARIES = ("torchvision", "timm", "transformers")
CLASSES = 10
# Below 64 pixels most networks end in maps of one pixel, and BatchNorm over two values has no gradient worth comparing.
SIZES = (64, 70, 96, 112, 128, 160, 192, 224, 240, 256, 299, 320, 384, 448, 512)
BATCH = 2


class NotBuilt(Exception):
    """The library itself does not build the model here, or does not train it; nothing of bpfx has run."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One model to convert.

    Attributes:
        library: one of LIBRARIES.
        name: of the model in its library.
        task: what it is trained for.
        family: the library's name for the group it stands for, where it stands for one.
    """

    library: str
    name: str
    task: str
    family: str = ""

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


@dataclasses.dataclass
class Case:
    """A model in train mode with an example batch; ``loss_fn`` is ``None`` for a model that returns its loss."""

    model: nn.Module
    loss_fn: Callable[..., Tensor] | None
    batch: Any
    words: str  # size of the input, or what the configuration is


def jobs(library: str, families: dict[str, str]) -> list[Job]:
    """Every model of a library that is converted.

    Args:
        library: one of LIBRARIES.
        families: for timm, the model that stands for each family.
    """
    if library == "torchvision":
        return torchvision_jobs()
    if library == "timm":
        return [Job("timm", name, "classification", family) for family, name in sorted(families.items())]
    return [Job("transformers", kind, task) for kind, task in coverage_configs.architectures().items()]


def case_of(job: Job) -> Case:
    """The model of a job and a batch that it trains on.

    Raises:
        NotBuilt: there is none.
    """
    try:
        if job.library == "torchvision":
            return torchvision_case(job)
        return timm_case(job) if job.library == "timm" else transformers_case(job)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error


# --- losses -----------------------------------------------------------------------------------------------------------


def classification(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy of every prediction that is returned (auxiliary classifiers count as the main one)."""
    losses = [F.cross_entropy(leaf, target) for leaf in pytree.tree_leaves(output)]
    return torch.stack(losses).sum()


def regression(output: Any, target: Tensor) -> Tensor:
    """Mean square of what is returned, for models without classes; the target is a number per sample."""
    losses = [(leaf.flatten(1).mean(1) - target).square().mean() for leaf in pytree.tree_leaves(output)]
    return torch.stack(losses).sum()


def sum_of_losses(output: dict[str, Tensor], target: None) -> Tensor:
    """The losses that a detector returns; its targets are inputs."""
    return torch.stack(list(output.values())).sum()


# --- torchvision ------------------------------------------------------------------------------------------------------


def torchvision_jobs() -> list[Job]:
    from torchvision import models

    jobs = [Job("torchvision", name, "classification") for name in models.list_models(module=models)]
    jobs += [Job("torchvision", name, "segmentation") for name in models.list_models(module=models.segmentation)]
    return jobs + [Job("torchvision", name, "detection") for name in models.list_models(module=models.detection)]


def torchvision_case(job: Job) -> Case:
    from torchvision import models

    builder = models.get_model_builder(job.name)
    if job.task == "detection":
        model = builder(weights=None, weights_backbone=None, num_classes=4, **_detector_size(builder))
        boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [20.0, 16.0, 60.0, 60.0]])
        images = [torch.rand(3, 64, 64) for _ in range(BATCH)]
        targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), **_extras(job.name)} for _ in images]
        return Case(model.train(), sum_of_losses, ((images, targets), None), "64 px")
    if job.task == "segmentation":
        model = builder(weights=None, weights_backbone=None, num_classes=CLASSES)
        x = torch.randn(BATCH, 3, 64, 64)
        return Case(model.train(), classification, (x, torch.randint(0, CLASSES, (BATCH, 64, 64))), "64 px")
    known: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if "init_weights" in inspect.signature(builder).parameters or job.name in ("googlenet", "inception_v3"):
        known["init_weights"] = True
    sized = {"vit": "image_size", "maxvit": "input_size"}.get(job.name.split("_")[0])
    pair = sized == "input_size"

    def build(size: int) -> nn.Module:
        return builder(**known, **({sized: (size, size) if pair else size} if sized else {}))

    return _classifier(build)


def _detector_size(builder: Callable[..., Any]) -> dict[str, Any]:
    fixed = "ssd" in builder.__name__  # their input size is part of the network
    return {} if fixed else {"min_size": 64, "max_size": 64}


def _extras(name: str) -> dict[str, Tensor]:
    if name.startswith("mask"):
        return {"masks": torch.ones(2, 64, 64, dtype=torch.uint8)}
    if name.startswith("keypoint"):
        points = torch.tensor([20.0, 24.0, 1.0]).expand(2, 17, 3).clone()
        return {"keypoints": points}
    return {}


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_families() -> dict[str, list[str]]:
    """Model names by architecture family, which is the module that defines them; timm's own test models left out."""
    import timm

    modules: dict[str, list[str]] = {}
    for module in timm.list_modules():
        names = [n for n in timm.list_models(module=module, pretrained=False) if not n.startswith("test_")]
        if names:
            modules[module] = names
    return modules


def smallest(names: list[str]) -> str:
    """The one with the fewest parameters; nothing is allocated."""
    import timm

    counts: dict[str, int] = {}
    for name in names:
        with contextlib.suppress(Exception), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    return min(counts or {names[0]: 0}, key=lambda n: counts.get(n, 0))


def timm_case(job: Job) -> Case:
    import timm

    def build(size: int) -> nn.Module:
        known: dict[str, Any] = {"pretrained": False, "num_classes": CLASSES}
        try:
            return timm.create_model(job.name, img_size=size, **known)
        except Exception:  # not every network asks for a size, and not every one takes any
            return timm.create_model(job.name, **known)

    return _classifier(build)


def _classifier(build: Callable[[int], nn.Module]) -> Case:
    """The model at the smallest size at which it trains."""
    problem = ""
    for size in SIZES:
        try:
            model, x = build(size).train(), torch.randn(BATCH, 3, size, size)
            with torch.no_grad():
                leaves = [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if all(tuple(leaf.shape) == (BATCH, CLASSES) for leaf in leaves):
            return Case(model, classification, (x, torch.randint(0, CLASSES, (BATCH,))), f"{size} px")
        return Case(model, regression, (x, torch.randn(BATCH)), f"{size} px")
    raise NotBuilt(f"no size from {SIZES[0]} to {SIZES[-1]} px works; the last said {problem}")


# --- transformers -----------------------------------------------------------------------------------------------------


def transformers_case(job: Job) -> Case:
    problem = ""
    for model, batch in coverage_configs.build(job.name, job.task):
        count = sum(p.numel() for p in model.parameters())
        try:
            trained(model, None, batch)
        except Exception as error:
            problem = problem or f"{type(error).__name__}: {error}"
            continue
        return Case(model, None, batch, f"{count:,} parameters")
    raise NotBuilt(problem)


def trained(model: nn.Module, loss_fn: Callable[..., Tensor] | None, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """One plain step: the loss, and the gradients by name. ``.grad`` stays as it is."""
    if loss_fn is None:
        loss = model(**batch).loss
        if loss is None:
            raise NotBuilt("the model returns no loss for its labels")
    else:
        inputs, target = batch
        loss = loss_fn(model(*inputs) if isinstance(inputs, tuple) else model(inputs), target)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(named, found, strict=True) if g is not None}
