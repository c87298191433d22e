"""The models that the tests run on: one table, one line per model, and a small builder where a line is not enough.

A case is a model, its loss, and a batch, made small: the point is the graph, not the size. Weights are random, never
downloaded. Tensors that an architecture starts at a constant (zero heads, layer scales of 1e-6, unit norms) are moved a
little, because a gradient that starts at zero compares equal to anything that is zero too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import zoo_hard as hard
from torch import Tensor, nn
from zoo_hard import CONVNET_CUTS, MLP_CUTS

Batch = Any
Loss = Callable[[Any, Any], Tensor]


@dataclass
class Case:
    """A model with its loss and one batch, ready for `bpfx.convert(case.model, case.loss_fn, case.batch)`."""

    model: nn.Module
    loss_fn: Loss | None
    batch: Batch
    task_loss: Callable[[Any, Batch], Tensor]  # from a prediction shaped like the model's: what a head is trained on


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    build: Callable[[int], Case]  # from the batch size
    cuts: tuple[str, ...]  # modules that begin the second block, the third, …
    size: int = 2
    tags: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float64
    dead: tuple[str, ...] = ()  # patterns of trainable parameters that plain BP leaves without a gradient

    def case(self, size: int | None = None, seed: int = 0) -> Case:
        """Build the case: the same weights for every batch size, the caller's random state untouched."""
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.manual_seed(seed)
            case = self.build(size or self.size)
        random.setstate(state)
        case.model = wake(case.model).to(self.dtype).train()
        case.batch = _cast(case.batch, self.dtype)
        return case

    def blocks(self) -> int:
        return len(self.cuts) + 1


def wake(model: nn.Module) -> nn.Module:
    """Move every constant tensor off its constant, so that no gradient is zero by initialisation.

    Frozen ones too: behind a frozen classifier of zeros no adapter gets a gradient.
    """
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                scale = 0.1 if parameter.dim() > 1 or parameter.abs().max() > 0.01 else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter) * scale)
    return model


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    move = lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
    return torch.utils._pytree.tree_map(move, batch)


# --- batches ---------------------------------------------------------------------------------------------------------


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0] + 7))


def _ints(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(shape[0] + 11))


def outside(model: nn.Module, x: Any, y: Tensor, loss_fn: Loss = F.cross_entropy) -> Case:
    """A case whose loss is the caller's own function of the model's output and the target."""
    return Case(model, loss_fn, (x, y), lambda prediction, batch: loss_fn(prediction, batch[1]))


def images(model: nn.Module, size: int, side: int = 64, classes: int = 5) -> Case:
    return outside(model, _noise(size, 3, side, side), _ints(classes, size))


def vision(name: str, side: int = 64, **options: Any) -> Callable[[int], Case]:
    """A torchvision classifier, by name."""

    def build(size: int) -> Case:
        import torchvision

        return images(getattr(torchvision.models, name)(weights=None, num_classes=5, **options), size, side)

    return build


def shrunk(build: Callable[[Any], nn.Module]) -> Callable[[int], Case]:
    """A real architecture of torchvision's with few and narrow layers: the whole ones are in benchmarks/coverage.py."""

    def make(size: int) -> Case:
        import torchvision

        return images(build(torchvision.models), size)

    return make


def _bottlenecks(models: Any) -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=16)


def _basics(models: Any) -> nn.Module:
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def _densenet(models: Any) -> nn.Module:
    return models.DenseNet(8, (4, 2, 2, 2), 16, drop_rate=0.1, num_classes=5)


def _swin(models: Any) -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [2, 1, 1, 1], [2, 2, 2, 2], [7, 7], num_classes=5)


def _convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    stages = [block(16, 32, 1), block(32, 48, 1), block(48, 64, 2), block(64, None, 1)]
    return models.ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=5)


def timm_vision(name: str, side: int, **options: Any) -> Callable[[int], Case]:
    """A timm classifier, by name."""

    def build(size: int) -> Case:
        import timm

        return images(timm.create_model(name, num_classes=5, **options), size, side)

    return build


def adapted(base: Callable[[int], Case], adapter: str, **options: Any) -> Callable[[int], Case]:
    """A case whose model is wrapped by PEFT; adapters start away from zero, or half of them would get no gradient."""

    def build(size: int) -> Case:
        import peft

        start = {"init_lora_weights" if adapter == "LoraConfig" else "init_weights": False}
        case = base(size)
        case.model = peft.get_peft_model(case.model, getattr(peft, adapter)(**start, **options))
        return case

    return build


def by_keyword(base: Callable[[int], Case], name: str) -> Callable[[int], Case]:
    """The same case with the model called by keyword."""

    def build(size: int) -> Case:
        case = base(size)
        case.batch = ({name: case.batch[0]}, case.batch[1])
        return case

    return build


# --- transformers ----------------------------------------------------------------------------------------------------

WORDS, LENGTH = 53, 9


def _padded(size: int) -> Tensor:
    mask = torch.ones(size, LENGTH, dtype=torch.long)
    mask[0, LENGTH - 3 :] = 0
    return mask


def bert(size: int) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=5, **shape))
    batch = {"input_ids": _ints(WORDS, size, LENGTH), "attention_mask": _padded(size), "labels": _ints(5, size)}
    return Case(model, None, batch, lambda prediction, batch: F.cross_entropy(prediction, batch["labels"]))


def _causal(model: nn.Module, size: int, mask: bool) -> Case:
    ids = _ints(WORDS, size, LENGTH)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if mask:
        batch["attention_mask"] = _padded(size)
        batch["labels"] = ids.masked_fill(_padded(size) == 0, -100)

    def task_loss(prediction: Tensor, batch: Batch) -> Tensor:
        # the next token from each position, in fp32 whatever the model computes in, as transformers does it
        flat = prediction[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(flat, batch["labels"][:, 1:].flatten(), ignore_index=-100)

    return Case(model, None, batch, task_loss)


def gpt2(size: int, mask: bool = True) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _causal(
        GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=3, n_head=4)), size, mask
    )


def llama(size: int, mask: bool = True) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return _causal(LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, attention_dropout=0.1, **shape)), size, mask)


def t5(size: int) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **shape))
    batch = {"input_ids": _ints(WORDS, size, LENGTH), "attention_mask": _padded(size), "labels": _ints(WORDS, size, 6)}
    flat = lambda prediction, batch: F.cross_entropy(prediction.flatten(0, 1), batch["labels"].flatten())  # noqa: E731
    return Case(model, None, batch, flat)


# --- the table -------------------------------------------------------------------------------------------------------


def tags(*names: str) -> frozenset[str]:
    return frozenset(names)


RESNET = ("layer2", "layer3", "layer4")
VIT = tuple(f"encoder.layers.encoder_layer_{i}" for i in (3, 6, 9))
LLAMA = ("model.layers.1", "model.layers.2")
CONVS = ["conv1", "conv2", "conv3"]
HARD = tags("hard")
LARGE = tags("large")  # at full depth: every architecture has a smaller entry for tests that need none


def inside(cuts: tuple[str, ...]) -> tuple[str, ...]:
    """The same cuts in a model that PEFT has wrapped."""
    return tuple(f"base_model.model.{cut}" for cut in cuts)


def small(
    make: Callable[[], nn.Module], target: str = "class", x: Callable[[int], Any] | None = None
) -> Callable[[int], Case]:
    """A small module of zoo_hard on vectors, or on the inputs given."""

    def build(size: int) -> Case:
        inputs = x(size) if x else _noise(size, hard.WIDTH)
        if target == "value":
            return outside(make(), inputs, _noise(size, 3).cos(), F.mse_loss)
        if target == "pixels":
            return outside(make(), inputs, _ints(5, size, 16, 16))
        return outside(make(), inputs, _ints(5, size))

    return build


def _pixels(size: int) -> Tensor:
    return _noise(size, 3, 16, 16)


def _first(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output[0], y)


def _tuple_out(size: int) -> Case:
    case = outside(hard.TupleOut(), _noise(size, hard.WIDTH), _ints(5, size), _first)
    # A head predicts what the loss reads: the scores.
    case.task_loss = lambda prediction, batch: F.cross_entropy(prediction, batch[1])
    return case


def _two_inputs(size: int) -> tuple[Tensor, Tensor]:
    return _noise(size, hard.WIDTH), _noise(size, hard.WIDTH).sin()


def _vit_of_full_depth(size: int) -> Case:
    import torchvision

    shape = {"image_size": 32, "patch_size": 16, "num_layers": 12, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    return images(torchvision.models.VisionTransformer(num_classes=5, dropout=0.1, **shape), size, side=32)


def _attention_adapters(size: int) -> Case:
    # a real ViT-B/16 cut down to three layers: the adapters are what is hard here, not the depth
    import torchvision

    shape = {"image_size": 32, "patch_size": 16, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
    return images(torchvision.models.VisionTransformer(num_classes=5, dropout=0.1, **shape), size, side=32)


def _dense_memory(size: int) -> Case:
    # checkpoints its own layers, so that plain eager runs each BatchNorm twice per step
    import torchvision

    shape = {"growth_rate": 4, "block_config": (2, 2, 2), "num_init_features": 8, "drop_rate": 0.1}
    return images(torchvision.models.DenseNet(num_classes=5, memory_efficient=True, **shape), size, side=32)


LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
ENTRIES: list[Entry] = [
    # torchvision and timm
    Entry("resnet18", vision("resnet18"), RESNET, size=4),
    Entry("resnet_bottleneck", shrunk(_bottlenecks), RESNET, size=4),
    Entry("vit", _vit_of_full_depth, VIT),
    Entry("convnext", shrunk(_convnext), ("features.2", "features.4", "features.6")),
    Entry("mobilenet_v3_small", vision("mobilenet_v3_small"), ("features.4", "features.8"), size=4),
    Entry("densenet", shrunk(_densenet), tuple(f"features.denseblock{i}" for i in (2, 3, 4)), size=4),
    Entry("swin", shrunk(_swin), ("features.2", "features.4", "features.6")),
    Entry(
        "timm_vit",
        timm_vision("vit_tiny_patch16_224", 32, img_size=32, depth=4, proj_drop_rate=0.1, drop_path_rate=0.2),
        ("blocks.1", "blocks.3"),
    ),
    # transformers
    Entry("bert", bert, ("bert.encoder.layer.1", "bert.encoder.layer.2")),
    Entry("gpt2", gpt2, ("transformer.h.1", "transformer.h.2"), tags=tags("tied")),
    Entry(
        "gpt2_no_mask", lambda size: gpt2(size, mask=False), ("transformer.h.1", "transformer.h.2"), tags=tags("tied")
    ),
    Entry("llama", llama, LLAMA),
    Entry("llama_no_mask", lambda size: llama(size, mask=False), LLAMA),
    Entry("t5", t5, ("encoder.block.1", "decoder.block.1"), tags=tags("tied")),
    # PEFT
    Entry(
        "resnet_bottleneck_lora",
        adapted(shrunk(_bottlenecks), "LoraConfig", target_modules=CONVS, **LORA),
        inside(RESNET),
        size=4,
    ),
    Entry(
        "resnet50_lokr",
        adapted(vision("resnet50", width_per_group=16), "LoKrConfig", target_modules=CONVS, r=2),
        inside(RESNET),
        4,
        LARGE,
    ),
    Entry(
        "vit_lora",
        adapted(_vit_of_full_depth, "LoraConfig", target_modules=r".*mlp\.[03]", **LORA),
        inside(VIT),
        tags=LARGE,
    ),
    Entry(
        "vit_lokr",
        adapted(_attention_adapters, "LoKrConfig", target_modules=r".*mlp\.[03]", r=2),
        inside(VIT_CUTS := ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2")),
    ),
    Entry("llama_lora", adapted(llama, "LoraConfig", target_modules=["q_proj", "v_proj"], **LORA), inside(LLAMA)),
    Entry("llama_lokr", adapted(llama, "LoKrConfig", target_modules=["q_proj", "v_proj"], r=2), inside(LLAMA)),
    # hard to capture
    Entry(
        "resnet_basic_lokr",
        adapted(shrunk(_basics), "LoKrConfig", target_modules=CONVS[:2], r=2),
        inside(RESNET),
        4,
        HARD,
    ),
    Entry(
        "resnet_basic_loha",
        adapted(shrunk(_basics), "LoHaConfig", target_modules=CONVS[:2], r=2),
        inside(RESNET),
        4,
        HARD,
    ),
    Entry(
        "vit_attention_lora",
        adapted(_attention_adapters, "LoraConfig", target_modules=["self_attention"], **LORA),
        inside(VIT_CUTS),
        tags=HARD,
    ),
    Entry(
        "vit_out_proj_lora",
        adapted(_attention_adapters, "LoraConfig", target_modules=["out_proj", "mlp.0"], **LORA),
        inside(VIT_CUTS),
        tags=HARD,
        dead=("*out_proj*",),  # attention reads out_proj's weight and never calls it
    ),
    Entry(
        "peft_by_keyword",
        by_keyword(adapted(shrunk(_basics), "LoraConfig", target_modules=CONVS[:2], **LORA), "x"),
        inside(RESNET),
        4,
        HARD,
    ),
    Entry("custom_function", small(hard.SignNet), ("blocks.1", "blocks.2"), 4, HARD),
    Entry("checkpoint_reentrant", small(lambda: hard.Checkpointed(True)), ("blocks.1", "blocks.2"), 4, HARD),
    Entry("checkpoint_non_reentrant", small(lambda: hard.Checkpointed(False)), ("blocks.1", "blocks.2"), 4, HARD),
    Entry("lstm", small(hard.LstmNet, x=lambda size: _ints(WORDS, size, LENGTH)), ("second",), 4, HARD),
    Entry("python_depth", small(hard.PythonDepth), ("blocks.2", "blocks.4"), 4, HARD | {"random_depth"}),
    Entry("torch_depth", small(hard.TorchDepth), ("blocks.2", "blocks.4"), 4, HARD | {"random_depth"}),
    Entry("batchnorm_average", small(hard.AverageNorm, x=_pixels), ("blocks.1", "blocks.2"), 4, HARD),
    Entry("branch_inside", small(hard.BranchInside), ("blocks.1", "blocks.2"), 4, HARD),
    Entry("branch_at_root", small(hard.BranchAtRoot), (), 4, HARD),
    Entry("densenet_memory_efficient", _dense_memory, ("features.denseblock2", "features.denseblock3"), 4, HARD),
    # unusual, though every tracer should manage
    Entry("unet", small(hard.UNet, "pixels", _pixels), ("down2", "middle", "up2", "up1"), 4, tags("skips")),
    Entry("regression", small(hard.Regression, "value"), ("1", "2"), 4),
    Entry("in_place", small(hard.InPlace, x=_pixels), ("blocks.1", "blocks.2"), 4),
    Entry("unused_parameter", small(hard.Unused), ("blocks.1",), 4, dead=("unused.*",)),
    Entry("tuple_output", _tuple_out, ("blocks.1", "blocks.2"), 4, tags("tuple")),
    Entry("tuple_input", small(hard.TwoInputs, x=_two_inputs), ("blocks.1", "blocks.2"), 4, tags("tuple")),
]

ZOO: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}


def names(*, hard: bool | None = None, large: bool | None = None) -> list[str]:
    """The table's names, all of them or those with or without the tags `hard` and `large`."""
    asked = {"hard": hard, "large": large}
    return [e.name for e in ENTRIES if all(a is None or a == (tag in e.tags) for tag, a in asked.items())]


# --- models for the tests that look at one property ------------------------------------------------------------------


def convnet(size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Convolutions, BatchNorm and dropout in a row of four: small, and everything that can go wrong once too often."""
    return Entry("convnet", small(hard.ConvNet, x=_pixels), CONVNET_CUTS, dtype=dtype).case(size, seed)


def mlp(size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Three layers without anything random, for Inductor."""
    return Entry("mlp", small(hard.Mlp), MLP_CUTS, dtype=dtype).case(size, seed)
