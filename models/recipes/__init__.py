"""The three fine-tuning recipes of Ren & Li (ICLR 2025), one file and one command each.

| command | trains |
|---|---|
| `python -m bpfx.models.recipes.resnet50_full` | ResNet-50: every parameter |
| `python -m bpfx.models.recipes.resnet50_lokr` | ResNet-50: PEFT's LoKr on its convolutions, and the classifier |
| `python -m bpfx.models.recipes.vit_b16_lora` | ViT-B/16: PEFT's LoRA on the MLPs, and the classifier |

What they have in common (arguments, data, loop, saving) is in `bpfx.models.recipes.common`.
"""

NAMES = ("resnet50_full", "resnet50_lokr", "vit_b16_lora")

__all__ = ["NAMES"]
