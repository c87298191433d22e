"""Where the cuts fall: counts, names, policies, balance, and what crosses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracles import check_bp
from torch import nn

import bpfx
from bpfx.compiler import Compiler


def planned(model: nn.Module, loss_fn: Any, batch: Any, **options: Any) -> Any:
    """As `bpfx.plan` without its table of schedules, which takes longer than everything else (see test_plan.py)."""
    return Compiler(model, loss_fn, batch, **options).plan


def plan(name: str, **options: Any) -> Any:
    case = zoo.ZOO[name].case()
    return planned(case.model, case.loss_fn, case.batch, **options)


def narrow_resnet(size: int = 32) -> tuple[nn.Module, Any, tuple[torch.Tensor, torch.Tensor]]:
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=16)
    return model, nn.CrossEntropyLoss(), (torch.randn(size, 3, 112, 112), torch.arange(size))


def large_resnet50(size: int = 32) -> tuple[nn.Module, Any, tuple[torch.Tensor, torch.Tensor]]:
    import torchvision

    model = torchvision.models.resnet50(weights=None)
    return model, nn.CrossEntropyLoss(), (torch.randn(size, 3, 224, 224), torch.arange(size))


@pytest.fixture(scope="module")
def resnet50_at_224() -> Any:
    return planned(*large_resnet50())


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["resnet18", "gpt2", "unet"])
def test_a_count_gives_that_many_blocks(name: str, count: int) -> None:
    found = plan(name, blocks=count)
    assert len(found.blocks) == count
    assert all(block.parameter_names for block in found.blocks)


def test_names_begin_blocks() -> None:
    found = plan("resnet18", blocks=["layer2", "layer4"])
    owner = {name: k for k, block in enumerate(found.blocks) for name in block.parameter_names}
    assert len(found.blocks) == 3
    assert {owner[name] for name in owner if name.startswith(("conv1", "bn1", "layer1"))} == {0}
    assert {owner[name] for name in owner if name.startswith(("layer2", "layer3"))} == {1}
    assert {owner[name] for name in owner if name.startswith(("layer4", "fc"))} == {2}


def test_names_in_any_order_are_the_same_blocks() -> None:
    forward, backward = plan("resnet18", blocks=["layer2", "layer4"]), plan("resnet18", blocks=["layer4", "layer2"])
    assert [b.parameter_names for b in forward.blocks] == [b.parameter_names for b in backward.blocks]


def test_a_policy_chooses_among_the_cuts() -> None:
    seen: list[Any] = []

    def first_only(info: Any) -> list[Any]:
        seen.append(info)
        return list(info.cuts if hasattr(info, "cuts") else info)[:1]

    found = plan("resnet18", blocks=first_only)
    assert seen, "the policy was never asked"
    assert len(found.blocks) == 2


@pytest.mark.parametrize("name", ["resnet18", "timm_vit", "gpt2", "llama_lora", "lstm"])
def test_auto_makes_more_than_one_block(name: str) -> None:
    assert len(plan(name).blocks) > 1


# --- every parameter has its place -----------------------------------------------------------------------------------


def test_blocks_know_their_parameters_by_object() -> None:
    case = zoo.ZOO["resnet18"].case()
    found = planned(case.model, case.loss_fn, case.batch, blocks=3)
    by_name = dict(case.model.named_parameters())
    for block in found.blocks:
        objects = {id(by_name[name]) for name in block.parameter_names}
        listed = block.parameters.values() if isinstance(block.parameters, dict) else block.parameters
        assert isinstance(listed, int) or {id(parameter) for parameter in listed} == objects


def test_modules_of_a_block() -> None:
    found = plan("resnet18", blocks=["layer2", "layer3", "layer4"])
    assert any(module.startswith("layer1") for module in found.blocks[0].modules)
    assert not any(module.startswith("layer1") for block in found.blocks[1:] for module in block.modules)


# --- what crosses ----------------------------------------------------------------------------------------------------


def test_one_tensor_crosses_a_resnet() -> None:
    found = plan("resnet18", blocks=["layer2", "layer3", "layer4"])
    for block, channels in zip(found.blocks, (64, 128, 256), strict=False):
        (crossing,) = block.outputs
        assert tuple(crossing.shape)[:2] == (4, channels)
        assert crossing.dtype == torch.float64
        assert crossing.bytes == torch.Size(crossing.shape).numel() * 8
        assert crossing.differentiable


def test_skips_of_a_unet_cross() -> None:
    """fine passes three boundaries and coarse one: each must be an input of the block that joins it."""
    found = plan("unet", blocks=["down2", "middle", "up2", "up1"])
    up2, up1 = found.blocks[3], found.blocks[4]
    assert len(up2.inputs) >= 2
    assert len(up1.inputs) >= 2
    assert (4, 6, 16, 16) in {tuple(tensor.shape) for tensor in up1.inputs}
    assert (4, 8, 8, 8) in {tuple(tensor.shape) for tensor in up2.inputs}


def test_features_of_a_dense_block_cross() -> None:
    """A cut in the middle of a dense block is crossed by every feature map made so far, joined or one by one."""
    entry = zoo.ZOO["densenet"]
    case = entry.case()
    blocks = ["features.denseblock1.denselayer3"]
    step = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=blocks, offset=None, compile="eager")
    crossing = step.plan.blocks[1].inputs
    assert sum(tensor.shape[1] for tensor in crossing if len(tensor.shape) == 4) >= 16 + 2 * 8
    check_bp(step, case)
    assert bpfx.audit(step).ok


def test_masks_cross_without_a_gradient() -> None:
    found = plan("llama", blocks=["model.layers.1", "model.layers.2"])
    crossing = found.blocks[1].inputs
    assert any(tensor.differentiable for tensor in crossing)
    for tensor in crossing:
        assert tensor.differentiable <= tensor.dtype.is_floating_point


def test_the_last_block_has_the_task_loss_and_no_head() -> None:
    found = plan("resnet18", blocks=3)
    assert all(block.head for block in found.blocks[:-1])
    assert not found.blocks[-1].head


# --- balance ---------------------------------------------------------------------------------------------------------


def test_auto_splits_the_stem_of_a_large_resnet(resnet50_at_224: Any) -> None:
    """At 224 px the stem is the largest block; a block with the whole of layer1 beside it would set the peak."""
    owner = {name: k for k, block in enumerate(resnet50_at_224.blocks) for name in block.parameter_names}
    assert owner["conv1.weight"] != owner["layer1.2.conv3.weight"]


def test_auto_balances_memory(resnet50_at_224: Any) -> None:
    predicted = resnet50_at_224.predicted
    assert 0 < predicted["local"] < 0.25 * predicted["bp"]
    assert predicted["bp_blocks"] < predicted["bp"]


def test_predictions_grow_with_the_batch() -> None:
    half, whole = (planned(*narrow_resnet(size)).predicted for size in (16, 32))
    assert half["bp"] < 0.75 * whole["bp"]
    assert half["local"] < 0.75 * whole["local"]


def test_more_blocks_need_no_more_memory() -> None:
    model, loss_fn, batch = narrow_resnet()
    few, many = (planned(model, loss_fn, batch, blocks=count).predicted for count in (2, 6))
    assert many["local"] <= few["local"]


# --- the plan itself -------------------------------------------------------------------------------------------------


def test_plan_trains_nothing() -> None:
    case = zoo.convnet()
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    bpfx.plan(case.model, case.loss_fn, case.batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_plan_and_conversion_agree() -> None:
    case = zoo.ZOO["resnet18"].case()
    plan = bpfx.plan(case.model, case.loss_fn, case.batch, blocks=4)
    step = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=4, offset=None, compile="eager")
    assert [b.parameter_names for b in plan.blocks] == [b.parameter_names for b in step.plan.blocks]
    assert plan.predicted == step.plan.predicted


def test_plan_prints_a_line_for_every_block() -> None:
    found = plan("resnet18", blocks=["layer2", "layer3"])
    text = str(found)
    for block in found.blocks:
        assert block.name in text


def test_emitted_steps_are_graph_modules_to_read() -> None:
    case = zoo.convnet()
    step = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=list(zoo.CONVNET_CUTS), compile="eager")
    for emitted in (step.local_step, step.bp_step):
        assert isinstance(emitted, torch.fx.GraphModule)
        assert len(emitted.code.splitlines()) < 200
