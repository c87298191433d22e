"""Reference models, built by name: what `bpfx train --model NAME` accepts.

| name | model |
|---|---|
| `small-resnet` | our own narrow ResNet for small images, see `bpfx.models.resnet` |
| `resnet18`, `resnet50`, `vit_b_16` | torchvision's |
| `torchvision:NAME` | any classification model of torchvision |
| `timm:NAME` | any model of timm |

All start from random weights drawn from torch's global generator: seed it first for the same weights again.

Example:
    >>> from bpfx import models
    >>> model = models.build("small-resnet", num_classes=10, in_channels=1, image_size=28)
    >>> sum(p.numel() for p in model.parameters()) < 300_000
    True
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from bpfx.errors import BpfxError
from bpfx.models.resnet import SmallResNet

__all__ = ["DEFAULT", "Requirements", "build", "names", "requirements"]

DEFAULT = "small-resnet"


@dataclass(frozen=True)
class Requirements:
    """What a model asks of the images when the user leaves it open.

    Attributes:
        image_size: side in pixels, or None for any.
        channels: number of channels, or None for any.
    """

    image_size: int | None = None
    channels: int | None = None


def names() -> list[str]:
    """The plain names `build` knows, without the `torchvision:` and `timm:` ones."""
    return list(_BUILDERS)


def build(name: str, num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: see the table at the top of this module.
        num_classes: number of logits.
        in_channels: channels of the images it will see. A torchvision model made for 3 gets another first convolution.
        image_size: side of the images it will see, pixels; transformers with learned positions need it.

    Returns:
        A module from float32 images `(B, in_channels, image_size, image_size)` to logits `(B, num_classes)`.

    Raises:
        BpfxError: the name is unknown, its library is not installed, or the model cannot be built for such images.
    """
    if name in _BUILDERS:
        return _BUILDERS[name](num_classes, in_channels, image_size)
    library, _, model = name.partition(":")
    if model and library == "torchvision":
        return _torchvision(model, num_classes, in_channels, image_size)
    if model and library == "timm":
        return _timm(model, num_classes, in_channels, image_size)
    raise BpfxError(_unknown(name))


def requirements(name: str) -> Requirements:
    """What images the model called `name` was made for, such as 224 px for `vit_b_16` with its learned positions.

    Example:
        >>> from bpfx import models
        >>> models.requirements("vit_b_16")
        Requirements(image_size=224, channels=3)
        >>> models.requirements("small-resnet")
        Requirements(image_size=None, channels=None)
    """
    library, _, model = name.rpartition(":")
    if name == DEFAULT:
        return Requirements()
    if library == "timm":
        return Requirements(_timm_image_size(model), channels=3)
    fixed_size = model.startswith(("vit_", "maxvit_"))
    return Requirements(224 if fixed_size else None, channels=3)


def _torchvision(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    try:
        from torchvision import models as zoo
    except ImportError:
        raise BpfxError(
            f"The model {name} comes from torchvision; install it with: pip install 'bpfx[vision]'."
        ) from None
    known = zoo.list_models(module=zoo)
    if name not in known:
        raise BpfxError(f"torchvision has no classification model {name!r}. {_suggest(name, known)}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers make them return a tuple in training; bpfx adds its own heads.
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model = zoo.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise BpfxError(
            f"torchvision cannot build {name} for images of {image_size} px: {_first_line(error)}."
        ) from None
    return model if in_channels == 3 else _with_channels(name, model, in_channels)


def _with_channels(name: str, model: nn.Module, in_channels: int) -> nn.Module:
    """Replace the first convolution, which is made for 3 channels, by one of the same shape for `in_channels`."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.in_channels != 3:
            break
        replacement = nn.Conv2d(
            in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
        )
        model.set_submodule(path, replacement)
        return model
    raise BpfxError(f"{name} does not start with a convolution over 3 channels; give it images of 3 channels.")


def _timm(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    timm = _import_timm(name)
    if not timm.is_model(name):
        raise BpfxError(f"timm has no model {name!r}. {_suggest(name, timm.list_models())}")
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if _timm_image_size(name) is not None:
        options["img_size"] = image_size
    failure: Exception | None = None
    for attempt in (options, {key: value for key, value in options.items() if key != "img_size"}):
        try:
            return timm.create_model(name, pretrained=False, **attempt)
        except TypeError as error:  # a model that takes no img_size although its default size is fixed
            failure = error
        except (RuntimeError, ValueError, AssertionError) as error:
            failure = error
            break
    raise BpfxError(f"timm cannot build {name} for images of {image_size} px: {_first_line(failure)}.")


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise BpfxError(f"The model {name} comes from timm; install it with: pip install 'bpfx[vision]'.") from None
    return timm


def _timm_image_size(name: str) -> int | None:
    timm = _import_timm(name)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    # Convolutional models take any size; models with positions or windows are marked in their configuration.
    return config.input_size[-1] if config is not None and config.fixed_input_size else None


def _first_line(error: Exception | None) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known ones are {', '.join(known[:8])} and others."


def _unknown(name: str) -> str:
    known = [*names(), "torchvision:NAME", "timm:NAME"]
    candidates = {candidate: candidate for candidate in names()}
    try:
        from torchvision import models as zoo

        candidates = {model: f"torchvision:{model}" for model in zoo.list_models(module=zoo)} | candidates
    except ImportError:
        pass
    near = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.5)
    hint = f" Did you mean {candidates[near[0]]}?" if near else ""
    return f"Unknown model {name!r}.{hint} Known are {', '.join(known)}."


def _small_resnet(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return SmallResNet(num_classes, in_channels)


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    DEFAULT: _small_resnet,
    **{name: partial(_torchvision, name) for name in ("resnet18", "resnet50", "vit_b_16")},
}
