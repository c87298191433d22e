"""Small adapters for libraries whose Python no tracer passes. Each is named, and tested in ``test_hard_capture``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint_module
from torch import Tensor, fx, nn


@contextmanager
def lycoris_without_module_dropout(model: nn.Module) -> Iterator[None]:
    """PEFT LoKr and LoHa compare ``torch.rand(1)`` with a module dropout even where it is 0: skip that comparison.

    Only wrappers whose dropout rates are all 0 are touched, and only their own training flag: the layers inside
    them stay in train mode, so nothing that is computed changes. The number is still drawn, so every later draw
    (dropout elsewhere) is that of the plain model.
    """
    lycoris = sys.modules.get("peft.tuners.lycoris_utils")
    touched: list[tuple[nn.Module, bool]] = []
    handles = []
    if lycoris is not None:
        for module in model.modules():
            if isinstance(module, lycoris.LycorisLayer):
                rates = [*getattr(module, "rank_dropout", {}).values(), *getattr(module, "module_dropout", {}).values()]
                if not any(rates):
                    touched.append((module, module.training))
                    module.training = False
                    handles.append(module.register_forward_pre_hook(_draw))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in touched:
            module.training = flag


def _draw(module: Any, args: Any) -> None:
    for adapter in module.active_adapters:
        if adapter in module.module_dropout:
            torch.rand(1)


@contextmanager
def non_reentrant_checkpoint() -> Iterator[None]:
    """Run ``torch.utils.checkpoint(use_reentrant=True)`` as the non-reentrant kind.

    The reentrant kind refuses ``torch.autograd.grad``, which every block program calls; gradients and random
    draws of both kinds are equal.
    """
    reentrant = checkpoint_module.CheckpointFunction

    class _NonReentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return checkpoint_module.checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )

    checkpoint_module.CheckpointFunction = _NonReentrant  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        checkpoint_module.CheckpointFunction = reentrant  # type: ignore[misc]


def without_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords with ``use_cache=False`` where a Hugging Face model would otherwise return a key-value cache.

    A cache serves generation only; a training step neither needs nor may keep it, and it is no tensor.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if not getattr(config, "use_cache", False) or "use_cache" in kwargs:
        return kwargs
    parameters = inspect.signature(base.forward).parameters
    return {**kwargs, "use_cache": False} if "use_cache" in parameters else kwargs


def rewritten_weights(model: nn.Module) -> list[str]:
    """Frozen weights that PEFT's LoRA on ``nn.MultiheadAttention`` adds to and subtracts from in its forward.

    The rounding of that stays behind after every forward, so a run that must leave no trace puts them back.
    """
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None:
        return []
    paths = [path for path, m in model.named_modules() if isinstance(m, layers.MultiheadAttention)]
    suffixes = ("base_layer.in_proj_weight", "base_layer.out_proj.base_layer.weight")
    return [f"{path}.{suffix}" if path else suffix for path in paths for suffix in suffixes]


def guard_group_norms(graph: fx.Graph) -> None:
    """Put :func:`contiguous_group_norm` where a group norm on the CPU reads channels-last memory."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.group_norm.default):
        value = node.args[0].meta.get("val")
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() == 4 and not value.is_contiguous():
            node.target = contiguous_group_norm


def contiguous_group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``aten.group_norm``; its backward ends the process (CPU, torch 2.13) where ``x`` is in channels-last memory and
    needs no gradient, though weight or bias does. In the local step what crosses a boundary needs none."""
    group_norm = torch.ops.aten.group_norm.default
    if x.requires_grad or not x.is_contiguous(memory_format=torch.channels_last):
        return group_norm(x, *args, **kwargs)
    # The same memory format as ever behind it: masks of dropout are drawn in the order of the memory.
    return group_norm(x.contiguous(), *args, **kwargs).contiguous(memory_format=torch.channels_last)
