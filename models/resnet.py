"""A narrow residual network for small images, in the CIFAR style of He et al. 2016.

The stem keeps the resolution (a 3×3 convolution, no pooling), then come stages of residual blocks, each stage but the
first halving the side and doubling the channels. Seven blocks of 16, 32 and 64 channels make 0.2 million parameters:
small enough to train on two processor cores within a minute, deep enough to be cut into many blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["ResidualBlock", "SmallResNet"]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut that is the identity where shapes allow.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution; 2 halves the side.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, H, W)` to `(B, channels, H/stride, W/stride)`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """Stem, stages of residual blocks, global average pool, linear classifier.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the stem and the first stage; every later stage has twice as many.
        depths: residual blocks per stage.

    Example:
        >>> import torch
        >>> from bpfx.models.resnet import SmallResNet
        >>> SmallResNet(num_classes=10, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, width: int = 16, depths: Sequence[int] = (2, 2, 3)
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages = []
        channels = width
        for index, depth in enumerate(depths):
            out_channels = width * 2**index
            blocks = [ResidualBlock(channels, out_channels, stride=1 if index == 0 else 2)]
            blocks += [ResidualBlock(out_channels, out_channels) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(B, in_channels, H, W)`, float32, to logits `(B, num_classes)`."""
        x = self.stages(self.stem(x))
        return self.classifier(torch.flatten(self.pool(x), 1))
