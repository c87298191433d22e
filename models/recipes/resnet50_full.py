"""Fine-tune a pretrained ResNet-50, every parameter of it.

    python -m bpfx.models.recipes.resnet50_full --data CIFAR100 --data-root DATA --download
    python -m bpfx.models.recipes.resnet50_full --data path/to/images --device cuda --bf16
    python -m bpfx.models.recipes.resnet50_full --smoke

The first of the three recipes of Ren & Li (ICLR 2025). We know their abstract and public reviews only: model, data set
and method are theirs, all numbers below are our choice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from bpfx.models.recipes import common

# Nine blocks. Activations are largest at the beginning, so the blocks are small there: the stem, each bottleneck of
# layer1, then two or three bottlenecks, and layer4 with the classifier.
BLOCKS = ["layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.2", "layer3.0", "layer3.3", "layer4.0"]
# What --method checkpointing recomputes: every bottleneck.
UNITS = [f"layer{stage}.{k}" for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for k in range(count)]
CLASSIFIER = "fc"


def build(num_classes: int, image_size: int = 224, weights: str = common.PUBLISHED) -> nn.Module:
    """ResNet-50 with a classifier for `num_classes`.

    Args:
        num_classes: number of logits.
        image_size: side of the images, pixels; any size will do.
        weights: "torchvision" for its ImageNet weights (a download of 98 MB the first time), "none" for random ones,
            or the path of a state dict.

    Returns:
        A module in training mode from float32 images `(B, 3, image_size, image_size)` to logits `(B, num_classes)`.

    Raises:
        BpfxError: torchvision is not installed, or the weights cannot be had or do not fit.

    Example:
        >>> from bpfx.models.recipes import resnet50_full
        >>> resnet50_full.build(10, weights="none").fc.out_features
        10
    """
    zoo: Any = common.library("torchvision.models", "vision")
    model: nn.Module = zoo.resnet50(weights=None, num_classes=num_classes)
    common.load_weights(model, weights, zoo.ResNet50_Weights.IMAGENET1K_V2, CLASSIFIER)
    return model.train()


RECIPE = common.Recipe(
    name="resnet50_full",
    build=build,
    blocks=BLOCKS,
    units=UNITS,
    classifier=CLASSIFIER,
    lr=1e-4,  # of pretrained weights: small, which also keeps the offset valid for a period
    new_lr=1e-3,  # of the classifier and the heads, which begin at random
    weight_decay=1e-2,
    epochs=10,
    batch_size=128,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status (0, or 2 after an error that the user can put right)."""
    return common.main(RECIPE, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
