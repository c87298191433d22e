"""PEFT: adapters first, then the conversion; only adapters and classifier train.

    python examples/peft_adapters.py
    python examples/peft_adapters.py dora    (or: lokr, loha, ia3)

Fashion-MNIST images, bundled; a few seconds on a CPU. The argument, LoRA by default, names another adapter.
"""

import bpfx  # first: it stands in for operators that some builds of torchvision lack

# isort: split

import sys

import peft
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import bpfx.data

torch.manual_seed(0)
TARGETS = ["qkv", "fc1"]
ADAPTERS = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["head"]),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS, modules_to_save=["head"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=TARGETS, modules_to_save=["head"]),
    "loha": peft.LoHaConfig(r=4, target_modules=TARGETS, modules_to_save=["head"]),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc1"], modules_to_save=["head"]),
}


def base() -> torch.nn.Module:
    """Here with random weights, equal in every call; a pretrained model otherwise."""
    torch.manual_seed(1)
    return VisionTransformer(img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=3, num_heads=4, num_classes=10)


model = peft.get_peft_model(base(), ADAPTERS[sys.argv[1] if len(sys.argv) > 1 else "lora"])
model.print_trainable_parameters()
splits = bpfx.data.load()
example = next(bpfx.data.batches(splits.train, 100))

blocks = [f"base_model.model.blocks.{k}" for k in (1, 2)]  # PEFT puts base_model.model before every name
step = bpfx.convert(model, F.cross_entropy, example, blocks=blocks)
optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=5e-3)

for x, y in bpfx.data.batches(splits.train, 100, seed=0):
    step(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"Δ is kept for {len(step.offset_state)} of {sum(1 for _ in model.parameters())} parameters")

model.eval()
model.save_pretrained("runs/peft_adapters")  # adapters and classifier, as ever
again = peft.PeftModel.from_pretrained(base(), "runs/peft_adapters").eval()
merged = model.merge_and_unload()  # a plain VisionTransformer
with torch.no_grad():
    x, y = next(bpfx.data.batches(splits.test, 1000))
    assert torch.allclose(again(x), merged(x), atol=1e-4)
    print(f"test accuracy {(merged(x).argmax(1) == y).float().mean():.1%}")
