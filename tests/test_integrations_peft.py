"""PEFT before the conversion: only adapters train, both steps are exact, and adapters save, load and merge as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from oracles import check_bp, check_local, run
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from twins import loss_of, sgd
from zoo import Case, Entry

import bpfx


def convolutions(size: int) -> Case:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return zoo.images(nn.Sequential(*layers), size, side=16)


def vit(size: int) -> Case:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return zoo.images(VisionTransformer(num_classes=5, **shape), size, side=16)


def causal(size: int) -> Case:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {
        "hidden_size": 24,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 24,
    }
    config = OPTConfig(vocab_size=zoo.WORDS, max_position_embeddings=32, use_cache=False, dropout=0.1, **shape)
    return zoo._causal(OPTForCausalLM(config), size, mask=False)


# The model, the layers that get adapters, what trains as a whole, and the cuts.
BASES: dict[str, tuple[Callable[[int], Case], list[str], list[str] | None, tuple[str, ...]]] = {
    "cnn": (convolutions, ["0", "3", "5"], ["9"], ("3", "5")),
    "vit": (vit, ["qkv", "fc1"], ["head"], ("blocks.1",)),
    "causal": (causal, ["q_proj", "v_proj"], None, ("model.decoder.layers.1",)),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "lora_dropout": 0.1}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "lokr": ("LoKrConfig", {"r": 2}),
    "loha": ("LoHaConfig", {"r": 2}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
}
PARTS = {"lora": "lora_", "dora": "lora_", "lokr": "lokr_", "loha": "hada_", "ia3": "ia3_"}
# LoRA and LoKr in ResNets, ViTs and Llama are in the zoo, so in every test of the compiler.
CASES = [f"cnn {a}" for a in ADAPTERS] + [f"vit {a}" for a in ("dora", "loha", "ia3")]
CASES += [f"causal {a}" for a in ("lora", "dora", "loha", "ia3")]


@cache
def converted(name: str) -> tuple[Case, bpfx.Step, Entry]:
    base, adapter = name.split()
    build, targets, whole, cuts = BASES[base]
    kind, options = ADAPTERS[adapter]
    config = getattr(peft, kind)(**options, target_modules=targets, modules_to_save=whole)

    def adapted(size: int) -> Case:
        case = build(size)
        case.model = peft.get_peft_model(case.model, config)
        return case

    entry = Entry(name, adapted, zoo.inside(cuts), size=4)
    case = entry.case()
    return case, bpfx.convert(case.model, case.loss_fn, case.batch, blocks=list(entry.cuts), offset=None), entry


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits if isinstance(batch, dict) else model.eval()(batch[0])


@pytest.mark.parametrize("name", CASES)
def test_both_steps_are_exact(name: str) -> None:
    case, step, entry = converted(name)
    check_bp(step, case)
    check_local(step, case, entry.cuts)


@pytest.mark.parametrize("name", CASES)
def test_only_adapters_train_and_the_result_saves_loads_and_merges(name: str, tmp_path: Path) -> None:
    case, plain, entry = converted(name)
    case.model.train()
    step = bpfx.Step(plain._compiler, bpfx.Offset(period=2, match=0))
    before = copy.deepcopy(case.model.state_dict())
    optimizer = sgd([p for p in step.parameters() if p.requires_grad])
    for _ in range(3):  # a refresh, a corrected step, a refresh
        loss_of(run(step, case.batch)).backward()
        optimizer.step()
        frozen = [n for n, p in case.model.named_parameters() if not p.requires_grad and p.grad is not None]
        assert not frozen, "frozen parameters have gradients"
        optimizer.zero_grad()

    trainable = {n for n, p in case.model.named_parameters() if p.requires_grad}
    part = PARTS[name.split()[1]]
    assert trainable and all(part in n or "modules_to_save" in n for n in trainable)
    assert step.offset_state and set(step.offset_state) <= trainable
    after, buffers = case.model.state_dict(), {n for n, _ in case.model.named_buffers()}
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved - buffers == trainable, moved ^ trainable

    expected = outputs(case.model, case.batch)
    case.model.save_pretrained(str(tmp_path))
    # A base model of its own, with the buffers that adapters do not hold.
    fresh = BASES[name.split()[0]][0](4).model.double()
    stored = {n: v for n, v in _base_state(entry, before, after).items() if n in fresh.state_dict()}
    fresh.load_state_dict(stored)
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(fresh, str(tmp_path)), case.batch), expected)

    merged = copy.deepcopy(case.model).merge_and_unload()
    assert not any(part in n or "modules_to_save" in n for n in merged.state_dict())
    torch.testing.assert_close(outputs(merged, case.batch), expected, rtol=1e-6, atol=1e-8)


def _base_state(entry: Entry, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base model's weights under its own names: as they were, with today's running statistics."""
    state = {}
    for name, value in before.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        state[plain] = after[name] if "running_" in name or "num_batches" in name else value
    return state
