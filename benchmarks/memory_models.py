"""What `memory.py` trains: the models, and the exact recipes that bpfx is held against, each as one whole step.

A recipe is a call without arguments: forward, backward, optimizer step, and no gradient left at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from memory_report import Part, Row
from step import CheckpointedResNet, CheckpointedViT
from step import build as build_vision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Optimizer = Callable[[Any], torch.optim.Optimizer]  # from parameters, or pairs of name and parameter


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Everything that a try-out may shrink."""

    batch: int
    tokens: int = 512
    width: int = 512
    image_size: int = 224


# --- the stack --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A pre-norm transformer layer: attention over 8 heads, an MLP four times as wide."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Equal layers on float inputs, so that depth is all that changes; mean over tokens, norm, ten classes."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(1)))


class CheckpointedStack(nn.Module):
    """The same stack, every layer under activation checkpointing."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.net.head(self.net.norm(x.mean(1)))


class CheckpointedPlainViT(CheckpointedViT):
    """`step.py`'s checkpointed ViT, around a model without adapters."""

    def __init__(self, net: nn.Module) -> None:
        nn.Module.__init__(self)
        self.net = net


# --- by name ----------------------------------------------------------------------------------------------------------


def build(part: Part, sizes: Sizes) -> nn.Module:
    """The part's model, new weights, in training mode."""
    if part.depth:
        return Stack(part.depth, sizes.width).train()
    if part.model == "vit_b_16-lora":
        return build_vision("vit_b_16", sizes.image_size)
    if part.model == "vit_b_16":
        import torchvision

        return torchvision.models.vit_b_16(weights=None, image_size=sizes.image_size).train()
    return build_vision(part.model, sizes.image_size)


def data(part: Part, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """One batch of noise, with labels."""
    if part.depth:
        return torch.randn(sizes.batch, sizes.tokens, sizes.width), torch.randint(0, 10, (sizes.batch,))
    return torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size), torch.randint(0, 1000, (sizes.batch,))


def checkpointed(part: Part, model: nn.Module) -> nn.Module:
    """The same parameters under checkpointing, with the layers (or bottlenecks, and the stem) as its units."""
    if part.depth:
        return CheckpointedStack(model)
    if part.model == "vit_b_16-lora":
        return CheckpointedViT(model)
    return CheckpointedPlainViT(model) if part.model == "vit_b_16" else CheckpointedResNet(model)


def block_starts(part: Part, model: nn.Module) -> list[str]:
    """The modules that begin a block of bpfx's: as many blocks as there are units of checkpointing.

    A ViT's patches go with its first layer, a ResNet's stem is a block of its own. The stack is cut in front of each
    MLP's first linear layer, behind its norm: a linear layer that begins a block needs no gradient of its input, which
    saves a ninth of the block's work (a norm would need it, for its own weights).
    """
    if part.depth:
        return [f"layers.{k}.up" for k in range(part.depth)]
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.vision_transformer import EncoderBlock

    kind: type[nn.Module] = EncoderBlock if part.model.startswith("vit") else Bottleneck
    names = [name for name, module in model.named_modules() if isinstance(module, kind)]
    return names if part.model.startswith("resnet") else names[1:]


# --- the exact recipes ------------------------------------------------------------------------------------------------


class SharedAdamW(torch.optim.AdamW):
    """AdamW that keeps its state where others may too: rows that are timed on one model need one state, not ten."""

    def __init__(self, params: Any, shared: dict[Tensor, dict[str, Any]], lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = shared.setdefault(parameter, {})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def accumulating(
    net: nn.Module, x: Tensor, y: Tensor, micro_batches: int, optimizer: Optimizer
) -> Callable[[], Tensor]:
    """Plain training: the pieces' gradients add up in `.grad`, then one optimizer steps on all of them."""
    opt = optimizer(trainable(net))

    def call() -> Tensor:
        opt.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for piece, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = F.cross_entropy(net(piece), labels) / micro_batches
            loss.backward()
            total += loss.detach()
        opt.step()
        opt.zero_grad(set_to_none=True)
        return total

    return call


class OptimizerInBackward:
    """Every parameter steps as soon as its gradient is complete, and the gradient goes."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer) -> None:
        self.net, self.x, self.y = net, x, y
        self.optimizers = {parameter: optimizer([parameter]) for parameter in trainable(net)}

    def _apply(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()  # type: ignore[index]
        parameter.grad = None

    def __call__(self) -> Tensor:
        # Hooks are there during the call only: other rows train the same parameters when times are taken.
        hooks = [parameter.register_post_accumulate_grad_hook(self._apply) for parameter in self.optimizers]
        try:
            loss = F.cross_entropy(self.net(self.x), self.y)
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return loss.detach()


def exact(part: Part, row: Row, model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer) -> Callable[[], Tensor]:
    """One of the recipes that give BP's gradient."""
    if row.recipe == "ac_oib":
        return OptimizerInBackward(checkpointed(part, model), x, y, optimizer)
    net = checkpointed(part, model) if row.recipe == "ac" else model
    return accumulating(net, x, y, row.micro_batches, optimizer)
