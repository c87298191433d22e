"""Small modules that are hard to capture, or hard to cut, one reason each."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 12
CONVNET_CUTS = ("1", "2", "3")
MLP_CUTS = ("1", "2")


class Residual(nn.Module):
    """x + f(x), the body that the modules below vary."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


class Stack(nn.Module):
    """Blocks in a row and a linear classifier."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.blocks(x))


class _Sign(torch.autograd.Function):
    """The sign forward; backward a clipped straight-through gradient, scaled by 3 so that no other rule equals it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * (x.abs() < 1)


class Sign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + _Sign.apply(self.linear(x))


class SignNet(Stack):
    def __init__(self) -> None:
        super().__init__(Residual(), Sign(), Residual())


class CheckpointedResidual(Residual):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.body, self.norm(x), use_reentrant=self.reentrant)


class Checkpointed(Stack):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(*(CheckpointedResidual(reentrant) for _ in range(3)))


class LstmNet(nn.Module):
    """Two LSTMs over words, dropout between layers, the last state classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(53, WIDTH)
        self.first = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)
        self.second = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.first(self.words(words))
        states, _ = self.second(states)
        return self.head(states[:, -1])


class PythonDepthResidual(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.3 else super().forward(x)


class PythonDepth(Stack):
    """Blocks that Python's own random numbers leave out."""

    def __init__(self) -> None:
        super().__init__(*(PythonDepthResidual() for _ in range(6)))


class TorchDepthResidual(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(()) < 0.3 else super().forward(x)


class TorchDepth(Stack):
    """Blocks that torch's random numbers leave out: the branch depends on a tensor."""

    def __init__(self) -> None:
        super().__init__(*(TorchDepthResidual() for _ in range(6)))


class Conv(nn.Module):
    """A residual convolution with BatchNorm and dropout; without `norm`, its own."""

    def __init__(self, channels_in: int, channels: int, norm: nn.Module | None = None, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm = norm or nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(x)).relu())


class Pooled(nn.Module):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class AverageNorm(nn.Module):
    """BatchNorm with momentum=None: a cumulative average that reads its own step counter as a number."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 6, 8, 8)
        norms = [nn.BatchNorm2d(width, momentum=None) for width in widths[1:]]
        self.blocks = nn.Sequential(*(Conv(a, b, norm) for a, b, norm in zip(widths, widths[1:], norms, strict=False)))
        self.head = Pooled(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Branch(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else x - self.body(x)


class BranchInside(Stack):
    """A block that looks at its input before it decides."""

    def __init__(self) -> None:
        super().__init__(Residual(), Branch(), Residual())


class BranchAtRoot(Stack):
    """The whole model looks at its input before it decides."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return self.head(self.blocks[1](x)) if x.mean() > 0 else self.head(self.blocks[1](-x))


class Up(nn.Module):
    """Upsample, join the skip, convolve."""

    def __init__(self, channels_in: int, skip: int, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels_in + skip, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skip], dim=1))


class UNet(nn.Module):
    """Two levels down, two up, and a class for every pixel; both skips cross several boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = Conv(3, 6)
        self.down2 = Conv(6, 8, stride=2)
        self.middle = Conv(8, 10, stride=2)
        self.up2 = Up(10, 8, 8)
        self.up1 = Up(8, 6, 6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(fine)
        x = self.up2(self.middle(coarse), coarse)
        return self.head(self.up1(x, fine))


class InPlaceResidual(nn.Module):
    """Overwrites its input: allowed under autograd, since neither the addition nor tanh keeps what is overwritten."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x += self.relu(self.norm(self.conv(x.tanh())))
        return x


class InPlace(nn.Module):
    """A residual stream that every block overwrites, its own input included."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.Sequential(*(InPlaceResidual(6) for _ in range(3)))
        self.head = Pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Unused(Stack):
    """A layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual())
        self.unused = nn.Linear(WIDTH, 3)


class TupleOut(Stack):
    """Returns its scores and, beside them, its features, which the loss ignores."""

    def __init__(self) -> None:
        super().__init__(*(Residual() for _ in range(3)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(x)
        return self.head(x), x


class TwoInputs(Stack):
    """Called with two tensors; the second enters at the front only."""

    def __init__(self) -> None:
        super().__init__(*(Residual() for _ in range(3)))
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(self.join(torch.cat([left, right], dim=1)))


class Regression(nn.Sequential):
    """Three numbers from a vector."""

    def __init__(self) -> None:
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)]
        super().__init__(*layers, nn.Linear(WIDTH, 3))


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Conv(3, 6), Conv(6, 8, stride=2), Conv(8, 8), Pooled(8))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)]
        super().__init__(*hidden, nn.Linear(WIDTH, 5))
