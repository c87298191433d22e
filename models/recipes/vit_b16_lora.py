"""Fine-tune a pretrained ViT-B/16 with LoRA adapters (PEFT) on its MLPs; the rest is frozen.

    python -m bpfx.models.recipes.vit_b16_lora --data CIFAR100 --data-root DATA --download
    python -m bpfx.models.recipes.vit_b16_lora --data path/to/images --device cuda --bf16
    python -m bpfx.models.recipes.vit_b16_lora --smoke

The third of the three recipes of Ren & Li (ICLR 2025). We know their abstract and public reviews only: model, data set
and method are theirs, all numbers below are our choice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.models.recipes import common

PATCH, LAYERS = 16, 12
# Both linear layers of every MLP. torchvision's attention is an nn.MultiheadAttention, which calls none of its linear
# layers (it hands their weights to one function): adapters on its out_proj would never run, and PEFT's adapter for the
# whole module rewrites weights in its forward, which no tracer passes.
TARGETS = r".*mlp\.[03]"
RANK, ALPHA = 8, 16
LAYER = "base_model.model.encoder.layers.encoder_layer_"
BLOCKS = [f"{LAYER}{k}" for k in range(2, LAYERS, 2)]  # six blocks of two layers, the patches with the first
UNITS = [f"{LAYER}{k}" for k in range(LAYERS)]
CLASSIFIER = "heads.head"


def build(num_classes: int, image_size: int = 224, weights: str = common.PUBLISHED) -> nn.Module:
    """ViT-B/16 in a `peft.PeftModel`: trainable are the adapters and the classifier.

    Args:
        num_classes: number of logits.
        image_size: side of the images, pixels, a multiple of 16; position embeddings are interpolated to it.
        weights: "torchvision" for its ImageNet weights (a download of 330 MB the first time), "none" for random ones,
            or the path of a state dict.

    Returns:
        A module in training mode from float32 images `(B, 3, image_size, image_size)` to logits `(B, num_classes)`.

    Raises:
        BpfxError: torchvision or PEFT is not installed, the image size does not fit, or the weights cannot be had or
            do not fit.

    Example:
        >>> import torch
        >>> from bpfx.models.recipes import vit_b16_lora
        >>> model = vit_b16_lora.build(10, image_size=32, weights="none")
        >>> model(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    zoo: Any = common.library("torchvision.models", "vision")
    peft: Any = common.library("peft", "peft")
    if image_size < PATCH or image_size % PATCH:
        raise BpfxError(f"ViT-B/16 takes images whose side is a multiple of {PATCH} pixels, not {image_size}.")
    model: nn.Module = zoo.vit_b_16(weights=None, num_classes=num_classes, image_size=image_size)
    fit = partial(_interpolated, image_size)
    common.load_weights(model, weights, zoo.ViT_B_16_Weights.IMAGENET1K_V1, CLASSIFIER, fit)
    adapters = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=["head"])
    return peft.get_peft_model(model, adapters).train()


def _interpolated(image_size: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with as many positions as images of this size have patches."""
    transformer: Any = common.library("torchvision.models.vision_transformer", "vision")
    try:
        return dict(transformer.interpolate_embeddings(image_size, PATCH, state.copy()))
    except (KeyError, ValueError):
        return state  # positions of another model: refused in plain words when the state is loaded


RECIPE = common.Recipe(
    name="vit_b16_lora",
    build=build,
    blocks=BLOCKS,
    units=UNITS,
    classifier=CLASSIFIER,
    lr=1e-3,  # of the adapters, which begin at zero
    new_lr=1e-3,
    weight_decay=1e-2,
    epochs=10,
    batch_size=128,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status (0, or 2 after an error that the user can put right)."""
    return common.main(RECIPE, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
