"""Bytes that an operator allocates and releases inside itself, which no tracker on top of the operators can see.

The rules were read off the CPU allocator's events around single operators (torch 2.13, oneDNN 3.12, AVX-512, fp32); see
``docs/memory.md``. What matters is oneDNN's convolution: it computes on a blocked layout (channels in groups of 16), so
tensors in torch's plain layout are copied there and back. Terms below about 1 % of an activation are left out.

On CUDA the rules are empty: cuDNN picks an algorithm at run time whose workspace is bounded but not known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Sequence[Any], Sequence[Tensor]], int]  # (operator's arguments, its new tensors) -> bytes

_RULES: dict[str, Rule] = {}


def operator_workspace(func: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Bytes one operator call needs at its peak beyond its inputs and outputs; 0 for operators without a rule.

    Args:
        func: the ATen overload, for example ``torch.ops.aten.convolution.default``.
        args: its positional arguments, real or fake tensors.
        outputs: the tensors it returned.

    Example:
        >>> x, w = torch.empty(32, 64, 56, 56, device="meta"), torch.empty(64, 64, 3, 3, device="meta")
        >>> conv = torch.ops.aten.convolution.default
        >>> arguments = (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        >>> operator_workspace(conv, arguments, [conv(*arguments)]) > x.nbytes
        True
    """
    rule = _RULES.get(func.overloadpacket.__name__)
    if rule is None or not outputs or outputs[0].device.type not in ("cpu", "meta"):
        return 0
    return rule(args, outputs)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy(tensor: Tensor | None) -> int:
    """Bytes of the dense copy that kernels make of a tensor they cannot walk as it lies."""
    return 0 if tensor is None or tensor.is_contiguous() else _bytes(tensor)


def _blocked(tensor: Tensor, block: int = 16) -> int:
    """Bytes of an activation (batch, channels, …) with its channels padded to whole blocks."""
    channels = tensor.shape[1]
    return _bytes(tensor) // channels * _ceil(channels, block) if channels else 0


def _ceil(value: int, block: int) -> int:
    return -(-value // block) * block


# --- convolution ----------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """oneDNN works on channels-last tensors in place if the activation or the filter lies that way."""
    return any(
        t.dim() in (4, 5) and not t.is_contiguous() and t.is_contiguous(memory_format=_FORMATS[t.dim()])
        for t in (x, weight)
    )


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_onednn(x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether ATen hands the convolution to oneDNN (tiny ones go to im2col kernels): ConvParams::use_mkldnn."""
    if x.dtype is not torch.float32:
        return x.dtype in (torch.bfloat16, torch.float16)
    if not torch.backends.mkldnn.is_available():
        return False
    kernel = weight.shape[2:]
    # On one thread a plain matrix product beats oneDNN at 1x1, and needs no buffers.
    special = _strided(stride) or _strided(dilation) or x.shape[0] >= 16 or _larger_kernel(weight)
    if not special and torch.get_num_threads() == 1:
        return False
    large_kernel = len(kernel) > 1 and min(kernel) > 3
    return groups > 1 or large_kernel or x.shape[0] > 1 or x.numel() > 20480


def _filter_bytes(weight: Tensor, groups: int) -> int:
    """The filter in blocked layout: input and output channels padded; a depthwise filter is padded over its groups."""
    out, inner, *kernel = weight.shape
    per_group = out // groups
    if per_group == inner == 1:
        return _ceil(groups, 16) * prod(kernel) * weight.element_size()
    if groups > 1:
        return _bytes(weight)
    return _ceil(out, 16) * _ceil(inner, 16 if inner >= 16 else 1) * prod(kernel) * weight.element_size()


@_rule("convolution")
def _convolution(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    x, weight, _, stride, _, dilation, transposed, _, groups = args[:9]
    y = outputs[0]
    if not _is_onednn(x, weight, stride, dilation, groups):
        columns = prod(weight.shape[1:]) * prod(y.shape[2:]) * x.element_size() if _larger_kernel(weight) else 0
        return _copy(x) + columns * x.shape[0]
    filters = _filter_bytes(weight, groups)
    if _channels_last(x, weight):
        copies = sum(_bytes(t) for t in (x, weight) if not _is_last(t))
        return copies + (filters if groups == 1 else 0)
    if transposed and _strided(stride) and groups == 1:
        # computed as the gradient of a strided convolution: see _data_gradient
        return _copy(x) + max(_blocked(x) + filters, 2 * _bytes(y))
    # Few input channels (the stem) are read from the plain layout.
    source = _blocked(x) if x.shape[1] >= 16 or groups > 1 else 0
    # Strided 1x1: each thread gathers the pixels it needs into a dense image.
    gathered = 0
    if _strided(stride) and not _larger_kernel(weight):
        gathered = torch.get_num_threads() * _bytes(y) // (y.shape[0] * y.shape[1]) * x.shape[1]
    # First all blocked buffers, y's among them; then only y's blocked and plain forms, while it is copied out.
    return _copy(x) + max(source + filters + gathered + _blocked(y) - _bytes(y), _blocked(y))


@_rule("convolution_backward")
def _convolution_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    grad, x, weight, _, stride, _, dilation, transposed, _, groups, mask = args[:11]
    results = sum(_bytes(t) for t in outputs)
    if not _is_onednn(x, weight, stride, dilation, groups):
        columns = prod(weight.shape[1:]) * prod(grad.shape[2:]) * x.element_size() if _larger_kernel(weight) else 0
        return _copy(x) + _copy(grad) + columns
    filters = _filter_bytes(weight, groups)
    dx = _bytes(x) if mask[0] else 0
    depthwise = groups > 1 and weight.shape[1] == 1
    if _channels_last(x, weight):
        copies = sum(0 if _is_last(t) else _bytes(t) for t in (grad, x)) + (0 if _is_last(weight) else _bytes(weight))
        if depthwise:
            # The gradient of large depthwise filters is reduced from 256 partial ones, whatever the number of threads.
            scratch = 256 * _bytes(weight) if weight.shape[-1] > 3 else 0
            data = copies + dx + filters
            return max(data, copies + dx + scratch + 2 * _bytes(weight)) - results if scratch else data + filters - dx
        return copies + dx + 3 * filters - results
    copies = _copy(x) + _copy(grad)
    data = _data_gradient(x, weight, grad, stride, groups, filters) if mask[0] else 0
    # Gradient of the filter: the output gradient and the input once more in blocked layout, while dx already exists.
    small = groups > 1 and (weight.shape[1] < 8) and not (depthwise and weight.shape[-1] <= 3)
    if small:
        blocked = 0  # plain layouts are read as they are
    else:
        source = _blocked(x) if x.shape[1] >= 16 or groups > 1 else (_blocked(x, 8) if x.shape[1] > 3 else 0)
        blocked = source + _blocked(grad)
        if transposed:
            blocked = _blocked(x) + _blocked(grad)
    if weight.element_size() == 2:
        blocked += 2 * filters  # half precision accumulates the filter's gradient in fp32
    # Patch embeddings: the filter's gradient is accumulated with its three input channels padded to 16, and transposed.
    patches = 1.6 * _blocked(weight) if groups == 1 and x.shape[1] < 16 and weight.shape[-1] > 14 else 0
    # Last, that gradient in its blocked and its plain layout.
    of_filter = dx + filters + max(blocked, _bytes(weight), int(patches)) if mask[1] else 0
    total = max(data, of_filter)
    return max(0, copies + total - results)


def _data_gradient(x: Tensor, weight: Tensor, grad: Tensor, stride: Sequence[int], groups: int, filters: int) -> int:
    """Peak bytes while dx is computed, dx in its final layout included."""
    if groups == 1 and _strided(stride):
        # The strided kernel writes channels-last, from where dx reaches the plain layout over one more buffer.
        return max(_blocked(grad) + filters + _bytes(x), 3 * _bytes(x))
    return _blocked(x) + max(_blocked(grad) + filters, _bytes(x))


def _strided(stride: Sequence[int]) -> bool:
    return any(step > 1 for step in stride)


def _larger_kernel(weight: Tensor) -> bool:
    return prod(weight.shape[2:]) > 1


def _is_last(tensor: Tensor) -> bool:
    return tensor.dim() in _FORMATS and tensor.is_contiguous(memory_format=_FORMATS[tensor.dim()])


# --- everything else ------------------------------------------------------------------------------------------------


@_rule("native_batch_norm_backward")
def _batch_norm_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    # A product of gradient and input; a broadcast gradient takes another path without it.
    return 0 if 0 in args[0].stride() else _bytes(args[1])


@_rule("native_layer_norm")
def _first_operand(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    return _copy(args[0])


@_rule("native_layer_norm_backward")
def _two_operands(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    return _copy(args[0]) + _copy(args[1])


@_rule("roll")
def _roll(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    # One dimension at a time; the intermediate result lives until the second is done.
    return _copy(args[0]) + (_bytes(outputs[0]) if len(args) > 2 and len(args[2]) > 1 else 0)


@_rule("max_pool2d_with_indices_backward", "avg_pool2d_backward", "embedding_dense_backward")
def _gradient(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    grad: Tensor = args[0]
    return 0 if _is_last(grad) else _copy(grad)


@_rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward")
def _upsample(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    # Forward works on a channels-last copy of both sides.
    x, y = args[0], outputs[0]
    if y.numel() < x.numel():
        return _copy(x)
    return 0 if not x.is_contiguous() else _bytes(x) + _bytes(y)


@_rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def _attention_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    # The kernel walks (batch, tokens, heads, width) and copies a gradient that does not lie so. Each thread keeps two
    # tiles of scores, at most 32 x 512 elements each.
    return _copy(args[0].transpose(1, 2)) + 2 * torch.get_num_threads() * 32 * min(512, args[2].shape[2]) * 4


@_rule("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward")
def _rnn(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    # Gates of all steps; what is kept for backward is in `kept_bytes`.
    return 4 * _bytes(outputs[0])


def kept_bytes(func: Any, outputs: Sequence[Tensor]) -> int:
    """Bytes an operator returns that its fake version does not show: what a recurrent layer keeps for backward."""
    if func.overloadpacket.__name__ != "mkldnn_rnn_layer":
        return 0
    # Measured 15.3 times the hidden sequence for LSTM: four gates, states and their gradients of every step.
    return int(15.3 * _bytes(outputs[0]))
