"""What the recipes have in common: arguments, weights, images, the loop, evaluation and saving.

A recipe file says which model it builds, where its blocks begin and how it is trained, all in a :class:`Recipe`;
:func:`main` runs that from the command line, :func:`fine_tune` is the training loop.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bpfx
from bpfx import data
from bpfx._files import make_folder
from bpfx.errors import BpfxError
from bpfx.models.recipes._images import Images

__all__ = [
    "METHODS",
    "PUBLISHED",
    "RANDOM",
    "Recipe",
    "checkpointed",
    "fine_tune",
    "library",
    "load_weights",
    "main",
    "precision",
    "updater",
]

METHODS = ("bp", "checkpointing", "local", "offset", "serial")
PUBLISHED, RANDOM = "torchvision", "none"  # values of --weights; anything else is a file
SMOKE = {
    "data": data.BUNDLED,
    "weights": RANDOM,
    "image_size": 64,
    "batch_size": 8,
    "epochs": 2,
    "train_images": 32,
    "test_images": 32,
}
Update = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is fine-tuned.

    Attributes:
        name: of its file.
        build: from the number of classes, the image size (pixels) and the weights ("torchvision", "none" or a path) to
            the model in training mode, adapters included.
        blocks: module names that each begin a block of bpfx's.
        units: modules that `--method checkpointing` recomputes.
        classifier: module path of the classifier in the model without adapters.
        lr: highest learning rate of the one-cycle schedule.
        new_lr: the same for the classifier and bpfx's heads, which begin at random.
        weight_decay: AdamW's, on weights of two dimensions and more.
        epochs: passes over the training images.
        batch_size: images in a step.
    """

    name: str
    build: Callable[[int, int, str], nn.Module]
    blocks: Sequence[str]
    units: Sequence[str]
    classifier: str
    lr: float
    new_lr: float
    weight_decay: float
    epochs: int
    batch_size: int


# --- model ------------------------------------------------------------------------------------------------------------


def library(name: str, extra: str) -> Any:
    """Import a library that is no requirement of bpfx's own.

    Raises:
        BpfxError: it is not installed.

    Example:
        >>> library("json", "vision").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise BpfxError(f"This recipe needs {package}; install it with: pip install 'bpfx[{extra}]'.") from None


def load_weights(
    model: nn.Module,
    weights: str,
    published: Any,
    classifier: str,
    fit: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Load pretrained weights; a classifier for other classes is left out, with a line that says so.

    Args:
        model: takes the weights, in place.
        weights: "torchvision" for `published`, "none" to leave the model as it is, or the path of a state dict.
        published: an entry of one of torchvision's weight enumerations.
        classifier: module path of the classifier.
        fit: changes a state before it is loaded.

    Raises:
        BpfxError: the weights cannot be had, or other parts of them than the classifier do not fit.
    """
    if weights == RANDOM:
        return
    source = f"torchvision's {published}" if weights == PUBLISHED else weights
    state = fit(_published(published) if weights == PUBLISHED else _read(Path(weights)))
    own = model.state_dict()
    new = {f"{classifier}.weight", f"{classifier}.bias"}
    note = ""
    if not new & state.keys():
        note = f"{source} has no classifier; one for {own[f'{classifier}.weight'].shape[0]} classes begins at random."
        state |= {name: own[name] for name in new}
    if any(name in state and state[name].shape != own[name].shape for name in new):
        size_of = next(n for n in sorted(new) if n in state and state[n].shape != own[n].shape)
        given, wanted = (entries[size_of].shape[0] if entries[size_of].dim() else "?" for entries in (state, own))
        note = f"{source}: the classifier for {given} classes is left out; one for {wanted} classes begins at random."
        state = {name: own[name] if name in new else value for name, value in state.items()}
    # Files from before torch 0.4.1 lack the counters, which matter to BatchNorm(momentum=None) only.
    missing = sorted(n for n in own if n not in state and not n.endswith("num_batches_tracked"))
    unknown = sorted(n for n in state if n not in own)
    other = sorted(n for n in state if n in own and state[n].shape != own[n].shape)
    if missing or unknown or other:
        found = [f"lacks {name!r} and {len(missing) - 1} more" for name in missing[:1]]
        found += [f"has {name!r} and {len(unknown) - 1} more that the model has not" for name in unknown[:1]]
        found += [f"has {n!r} as {tuple(state[n].shape)} instead of {tuple(own[n].shape)}" for n in other[:1]]
        raise BpfxError(
            f"The weights {source} do not fit {type(model).__name__}: the file {'; '.join(found)}. Pass a state dict "
            "of torchvision's model, such as the model.pt of an earlier run, or --weights none."
        )
    model.load_state_dict(state, strict=False)
    if note:
        print(note)


def _published(weights: Any) -> dict[str, Tensor]:
    try:
        return dict(weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True))
    except (OSError, RuntimeError) as error:  # no network; a file that arrived damaged
        raise BpfxError(
            f"The pretrained weights cannot be fetched from {weights.url} ({error}). Fetch that file elsewhere and "
            "pass --weights FILE, or --weights none for random ones."
        ) from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path.expanduser(), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BpfxError(f"--weights {path}: there is no such file. Pass a file, torchvision or none.") from None
    except Exception as error:  # whatever another kind of file makes the unpickler raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BpfxError(
            f"--weights {path} cannot be read as a state dict ({reason}). Save one with "
            "torch.save(model.state_dict(), file)."
        ) from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        inner = [n for n, v in state.items() if isinstance(v, dict)] if isinstance(state, dict) else []
        advice = f"its entry {inner[0]!r} may be one: save that alone" if inner else "save model.state_dict()"
        raise BpfxError(f"--weights {path} holds no state dict, which maps names to tensors; {advice}.")
    odd = next((n for n, v in state.items() if v.is_quantized or v.layout != torch.strided), None)
    if odd is not None:
        raise BpfxError(f"--weights {path}: {odd!r} is quantized or sparse; save the weights as plain tensors.")
    prefix = str(next(iter(state))).partition(".")[0] + "."
    if prefix in ("module.", "_orig_mod.") and all(str(name).startswith(prefix) for name in state):
        raise BpfxError(
            f"--weights {path}: every name begins with {prefix!r}, a wrapper's; save wrapped.{prefix}state_dict()."
        )
    return state


def checkpointed(model: nn.Module, units: Iterable[str]) -> nn.Module:
    """Put modules under activation checkpointing, in place; returns the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> checkpointed(net, ["0"])(torch.ones(1, 2)).shape
        torch.Size([1, 1])
    """
    for name in units:
        unit = model.get_submodule(name)
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    return model


def precision(bf16: bool, device: str) -> contextlib.AbstractContextManager[Any]:
    """The context of conversion, steps and evaluation: autocast to bfloat16, or nothing.

    A step can be called under another autocast than that of its conversion; the plan's peaks, and with them
    ``blocks="auto"``, are predicted for the conversion's.
    """
    if not bf16:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


# --- training ---------------------------------------------------------------------------------------------------------


def adamw(recipe: Recipe, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW over the parameters that train: another rate for new layers, no decay for vectors (biases, norms)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            # In a step bpfx's heads are `heads.…`, in a BlockTrainer `bpfx.heads.…`.
            new = name.startswith(("heads.", "bpfx.heads.")) or f".{recipe.classifier}." in f".{name}"
            groups.setdefault((new, parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        {
            "params": parameters,
            "lr": recipe.new_lr if new else recipe.lr,
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (new, decays), parameters in groups.items()
    )


def one_cycle(steps: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up to each group's own rate and down to almost nothing, over so many steps."""
    rates = [group["lr"] for group in optimizer.param_groups]
    # Its phases are divided by their lengths, which a handful of steps would make zero.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(steps, 4), cycle_momentum=False)


def updater(
    recipe: Recipe, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, arguments: argparse.Namespace
) -> Update:
    """One training step as a call that returns the loss: forward, backward, optimizer, schedule.

    Args:
        recipe: says where the blocks begin.
        model: is trained.
        batch: an example: images `(B, 3, S, S)` and labels `(B,)`, on the model's device.
        steps: of the whole run, for the schedule.
        arguments: `method`, `blocks`, `period`, `bf16`, `device`.
    """
    amp = partial(precision, arguments.bf16, arguments.device)
    step: Callable[[Tensor, Tensor], Tensor]
    if arguments.method in ("bp", "checkpointing"):
        if arguments.method == "checkpointing":
            checkpointed(model, recipe.units)
        named = list(model.named_parameters())

        def step(x: Tensor, y: Tensor) -> Tensor:
            try:
                return F.cross_entropy(model(x), y)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise BpfxError(
                    f"BatchNorm cannot train on {len(x)} image of {x.shape[-1]} px; raise --batch-size or --image-size."
                ) from None
    else:
        offset = bpfx.Offset(period=arguments.period) if arguments.method == "offset" else None
        blocks = recipe.blocks if arguments.blocks is None else arguments.blocks
        with amp():
            step = converted = bpfx.convert(model, F.cross_entropy, batch, blocks=blocks, offset=offset)
        if arguments.method == "serial":
            trainer = bpfx.BlockTrainer(
                converted, partial(adamw, recipe), mode="bp", lr_scheduler=partial(one_cycle, steps)
            )

            def serial(x: Tensor, y: Tensor) -> Tensor:
                with amp():
                    return trainer.step(x, y)

            return serial
        named = list(converted.named_parameters())  # the model's and the heads'
    optimizer = adamw(recipe, named)
    schedule = one_cycle(steps, optimizer)

    def update(x: Tensor, y: Tensor) -> Tensor:
        with amp():
            loss = step(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss.detach()

    return update


def fine_tune(recipe: Recipe, images: Images, arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Train, evaluate after every epoch, and save.

    Returns:
        A record per epoch: `epoch`, `train_loss`, `test_loss`, `test_accuracy` (0 to 1), `seconds` (of training), and
        `peak_bytes` of the device (None on the CPU).

    Raises:
        BpfxError: an argument does not fit the model or the data, or the loss is not finite any more.
    """
    torch.manual_seed(arguments.seed)
    model = recipe.build(images.num_classes, images.image_size, arguments.weights).to(arguments.device)
    per_epoch = images.batches_per_epoch
    steps = arguments.epochs * per_epoch
    update = updater(recipe, model, images.example(), steps, arguments)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"{recipe.name}, {arguments.method}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters "
        f"train on {images.train_count:,} images of {images.image_size} px, {images.num_classes} classes; "
        f"{steps} steps of {images.batch_size}",
        soft_wrap=True,
    )
    make_folder(Path(arguments.out))  # now, and not when there is a model to lose
    records: list[dict[str, Any]] = []
    cuda = arguments.device.startswith("cuda")
    with _progress(console) as progress:
        task = progress.add_task("training", total=steps)
        for epoch in range(arguments.epochs):
            began, total = time.perf_counter(), torch.zeros((), device=arguments.device)
            for x, y in images.training(epoch):
                total += update(x, y)
                progress.advance(task)
            mean = total.item() / per_epoch
            seconds = time.perf_counter() - began
            if not math.isfinite(mean):
                raise BpfxError(f"The loss is {mean} in epoch {epoch + 1}; try a lower --lr, or --period 1.")
            with precision(arguments.bf16, arguments.device):
                loss, accuracy = evaluate(model, images.testing(), images.test_count)
            peak = torch.cuda.max_memory_allocated() if cuda else None
            record = {"epoch": epoch + 1, "train_loss": mean, "test_loss": loss, "test_accuracy": accuracy}
            records.append(record | {"seconds": seconds, "peak_bytes": peak})
            memory = f", peak {bpfx.memory.format_bytes(peak)}" if peak is not None else ""
            console.print(
                f"epoch {epoch + 1}/{arguments.epochs}: training loss {mean:.3f}, test loss {loss:.3f}, test accuracy "
                f"{100 * accuracy:.1f} %, {seconds / per_epoch:.3f} s a step{memory}",
                soft_wrap=True,
            )
    save(model, arguments, records)
    console.print(f"Saved in {arguments.out}", soft_wrap=True)
    return records


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[float, float]:
    """Mean loss and share of right answers (0 to 1) of the plain model over `count` images; back in training mode."""
    model.eval()
    loss, correct = 0.0, 0
    for x, y in batches:
        logits = model(x).float()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(1) == y).sum())
    model.train()
    return loss / count, correct / count


def save(model: nn.Module, arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Write the model, never the heads: `model.pt` for torchvision's plain model, `adapters/` for PEFT, `run.json`.

    `model.pt` has the adapters merged into the weights, and the classifier and running statistics with them.
    """
    folder = make_folder(Path(arguments.out))
    plain: Any = model
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapters")  # type: ignore[operator]
        plain = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    bpfx.checkpoint.save({name: value.cpu() for name, value in plain.state_dict().items()}, folder / "model.pt")
    versions = {name: importlib.metadata.version(name) for name in ("bpfx", "torch", "torchvision")}
    content = {"settings": vars(arguments), "versions": versions, "epochs": records}
    (folder / "run.json").write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


# --- the command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BpfxError(f"{message} (see --help)")


def _blocks(text: str) -> str | int:
    if text == "auto":
        return text
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of at least 1 nor auto")


def _period(text: str) -> str | int:
    if text == "auto" or (text.isdecimal() and int(text)):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of at least 1 nor auto")


def _parse(recipe: Recipe, description: str, given: Sequence[str] | None) -> argparse.Namespace:
    # No abbreviations: `--smoke` has to be seen before the others are parsed.
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="CIFAR100", help="a torchvision set, or a folder of images (default: CIFAR100)")
    add("--data-root", metavar="DIR", help="folder of torchvision's sets")
    add("--download", action="store_true", help="fetch a torchvision set into --data-root")
    add("--image-size", type=int, default=224, metavar="PX", help="side of the images (default: 224)")
    add("--no-augment", action="store_true", help="no random crops and flips")
    add("--train-images", type=int, metavar="N", help="train on so many images only")
    add("--test-images", type=int, metavar="N", help="test on so many images only")
    add("--weights", default=PUBLISHED, metavar="FILE", help="a state dict, none, or torchvision (default)")
    kinds = "bp, checkpointing, local, offset (default), or serial: exact BP block by block"
    add("--method", choices=METHODS, default="offset", metavar="NAME", help=kinds)
    add("--period", type=_period, default="auto", metavar="K", help="steps from refresh to refresh (default: auto)")
    add("--blocks", type=_blocks, metavar="N", help="a number, or auto (default: the recipe's)")
    add("--epochs", type=int, default=recipe.epochs, metavar="N", help=f"default: {recipe.epochs}")
    add("--batch-size", type=int, default=recipe.batch_size, metavar="N", help=f"default: {recipe.batch_size}")
    add("--lr", type=float, default=recipe.lr, metavar="RATE", help=f"highest learning rate (default: {recipe.lr})")
    rate = f"of classifier and heads (default: {recipe.new_lr})"
    add("--new-lr", type=float, default=recipe.new_lr, metavar="RATE", help=rate)
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    add("--workers", type=int, default=4, metavar="N", help="threads that read images (default: 4)")
    add("--seed", type=int, default=0, metavar="N", help="of new layers and of the order of the images (default: 0)")
    add("--out", metavar="DIR", help="where the result goes (default: runs/RECIPE-METHOD-TIME)")
    add("--smoke", action="store_true", help="a few steps on bundled images with random weights, in under a minute")
    if "--smoke" in (sys.argv[1:] if given is None else given):
        parser.set_defaults(**SMOKE)
    parsed = parser.parse_args(given)
    for name in ("image_size", "train_images", "test_images", "epochs", "batch_size", "workers"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            raise BpfxError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    for name in ("lr", "new_lr"):
        value = getattr(parsed, name)
        if not (math.isfinite(value) and value > 0):
            raise BpfxError(f"--{name.replace('_', '-')} must be a positive number, not {value}.")
    if not 0 <= parsed.seed < 2**63:
        raise BpfxError(f"--seed must be at least 0 and below 2**63, not {parsed.seed}.")
    if parsed.device != "cpu" and not (parsed.device.startswith("cuda") and torch.cuda.is_available()):
        raise BpfxError(f"The device {parsed.device!r} is not available here; use cpu.")
    if parsed.out is None:
        moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        parsed.out = f"runs/{recipe.name}-{parsed.method}-{moment}"
    elif (Path(parsed.out) / "model.pt").exists():
        raise BpfxError(f"--out {parsed.out} holds the result of another run; choose another folder.")
    return parsed


def main(recipe: Recipe, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run a recipe from the command line.

    Args:
        recipe: what to train.
        description: shown by `--help`.
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit status: 0, 2 after an error that the user can put right, 130 after an interrupt.
    """
    try:
        parsed = _parse(recipe, description, arguments)
        recipe = dataclasses.replace(recipe, lr=parsed.lr, new_lr=parsed.new_lr)
        fine_tune(recipe, Images.load(parsed), parsed, Console())
    except BpfxError as error:
        print(f"{recipe.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{recipe.name}: interrupted; nothing was saved.", file=sys.stderr)
        return 130
    return 0
