"""Fine-tune a pretrained ResNet-50 with LoKr adapters (PEFT) on its convolutions; the rest is frozen.

    python -m bpfx.models.recipes.resnet50_lokr --data CIFAR100 --data-root DATA --download
    python -m bpfx.models.recipes.resnet50_lokr --data path/to/images --device cuda --bf16
    python -m bpfx.models.recipes.resnet50_lokr --smoke

The second of the three recipes of Ren & Li (ICLR 2025). We know their abstract and public reviews only: model, data set
and method are theirs, all numbers below are our choice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from bpfx.models.recipes import common, resnet50_full

# Every convolution of every bottleneck, the one on the skip of each stage's first bottleneck included; not the stem's.
TARGETS = r"layer\d\.\d+\.(conv[123]|downsample\.0)"
# LoKr writes the change of a weight as a Kronecker product W1 ⊗ W2 and factors W2 to this rank.
RANK, ALPHA = 8, 8
# PEFT's names for the same modules. The stem is frozen, and a block has to train something: it goes with layer1.0.
BLOCKS = [f"base_model.model.{name}" for name in resnet50_full.BLOCKS[1:]]
UNITS = [f"base_model.model.{name}" for name in resnet50_full.UNITS]
CLASSIFIER = resnet50_full.CLASSIFIER


def build(num_classes: int, image_size: int = 224, weights: str = common.PUBLISHED) -> nn.Module:
    """ResNet-50 in a `peft.PeftModel`: trainable are the adapters and the classifier.

    BatchNorm's running statistics follow the new data, though its weights are frozen; `model.pt`, with the adapters
    merged, holds them, a folder of adapters cannot.

    Args, returns and errors as :func:`bpfx.models.recipes.resnet50_full.build`; PEFT has to be installed.

    Example:
        >>> from bpfx.models.recipes import resnet50_lokr
        >>> model = resnet50_lokr.build(10, weights="none")
        >>> {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "lokr" not in name}
        {'default'}
    """
    peft: Any = common.library("peft", "peft")
    model = resnet50_full.build(num_classes, image_size, weights)
    adapters = peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS, modules_to_save=[CLASSIFIER])
    return peft.get_peft_model(model, adapters).train()


RECIPE = common.Recipe(
    name="resnet50_lokr",
    build=build,
    blocks=BLOCKS,
    units=UNITS,
    classifier=CLASSIFIER,
    lr=2e-3,  # of the adapters, which begin at zero
    new_lr=2e-3,
    weight_decay=1e-2,
    epochs=10,
    batch_size=128,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status (0, or 2 after an error that the user can put right)."""
    return common.main(RECIPE, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
