"""Bad input is refused in words: what was wrong, with which value, and what would work."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import drop_in
from torch import nn

import bpfx


def convert(model: nn.Module, loss_fn: Any, batch: Any, **options: Any) -> Any:
    options = {"offset": None, "compile": "eager", **options}
    return bpfx.convert(model, loss_fn, batch, **options)


def resnet18() -> tuple[nn.Module, Any, Any]:
    case = zoo.ZOO["resnet18"].case()
    return case.model, case.loss_fn, case.batch


def small() -> tuple[nn.Module, Any, Any]:
    case = zoo.convnet()
    return case.model, case.loss_fn, case.batch


# --- the model -------------------------------------------------------------------------------------------------------


def test_nothing_trains() -> None:
    model, loss_fn, batch = small()
    model.requires_grad_(False)
    with pytest.raises(bpfx.BpfxError, match=r"(?s)no parameter.*(train|requires_grad)"):
        convert(model, loss_fn, batch)


def test_no_parameters_at_all() -> None:
    _, loss_fn, (_, y) = small()
    with pytest.raises(bpfx.BpfxError, match=r"no parameter"):
        convert(nn.Flatten(), loss_fn, (torch.randn(4, 5), y))


def test_not_a_module() -> None:
    _, loss_fn, batch = small()
    with pytest.raises(bpfx.BpfxError, match=r"function"):
        convert(lambda x: x, loss_fn, batch)


def test_converted_already() -> None:
    model, loss_fn, batch = small()
    step = convert(model, loss_fn, batch)
    with pytest.raises(bpfx.BpfxError, match=r"(?s)already.*\.model"):
        convert(step, loss_fn, batch)


def test_data_parallel() -> None:
    model, loss_fn, batch = small()
    with pytest.raises(bpfx.BpfxError, match=r"(?s)DataParallel.*\.module"):
        convert(nn.DataParallel(model), loss_fn, batch)


def test_distributed_data_parallel() -> None:
    model, loss_fn, batch = small()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(bpfx.BpfxError, match=r"(?s)DistributedDataParallel.*\.module"):
            convert(wrapped, loss_fn, batch)
    finally:
        torch.distributed.destroy_process_group()


# --- the loss and the batch ------------------------------------------------------------------------------------------


def test_loss_is_no_scalar() -> None:
    model, _, batch = small()
    with pytest.raises(bpfx.BpfxError, match=r"(?s)scalar.*\(4,?\)"):
        convert(model, lambda output, y: F.cross_entropy(output, y, reduction="none"), batch)


def test_loss_is_no_tensor() -> None:
    model, _, batch = small()
    with pytest.raises(bpfx.BpfxError, match=r"(?s)scalar.*float|float.*(tensor|scalar)"):
        convert(model, lambda output, y: F.cross_entropy(output, y).item(), batch)


def test_loss_without_gradient() -> None:
    model, _, batch = small()
    with pytest.raises(bpfx.BpfxError, match=r"gradient|depend"):
        convert(model, lambda output, y: F.cross_entropy(output.detach(), y), batch)


def test_target_without_influence() -> None:
    model, _, batch = small()
    with pytest.raises(bpfx.BpfxError, match=r"target"):
        convert(model, lambda output, y: output.square().mean(), batch)


def test_model_without_a_loss_of_its_own() -> None:
    case = zoo.ZOO["bert"].case()
    case.batch.pop("labels")
    with pytest.raises(bpfx.BpfxError, match=r"(?s)loss.*(labels|loss_fn)"):
        convert(case.model, None, case.batch)


def test_batch_is_no_pair() -> None:
    model, loss_fn, (x, _) = small()
    with pytest.raises(bpfx.BpfxError, match=r"(?s)\(inputs?, targets?\)|\(x, y\)"):
        convert(model, loss_fn, x)


def test_batch_with_another_structure() -> None:
    model, loss_fn, (x, y) = small()
    step = convert(model, loss_fn, (x, y))
    with pytest.raises(bpfx.BpfxError, match=r"(?s)example.*(16, 16|structure)"):
        step((x, x), y)
    with pytest.raises(bpfx.BpfxError, match=r"example"):
        step(x)


def test_batch_with_another_key() -> None:
    case = zoo.ZOO["bert"].case()
    step = convert(case.model, None, case.batch, blocks=2)
    batch = dict(case.batch)
    batch.pop("attention_mask")
    with pytest.raises(bpfx.BpfxError, match=r"attention_mask"):
        step(**batch)


def test_batch_with_another_dtype() -> None:
    model, loss_fn, (x, y) = small()
    step = convert(model, loss_fn, (x, y))
    with pytest.raises(bpfx.BpfxError, match=r"(?s)float64.*float32"):
        step(x.double(), y)


def test_batch_with_another_number_of_dimensions() -> None:
    model, loss_fn, (x, y) = small()
    step = convert(model, loss_fn, (x, y))
    with pytest.raises(bpfx.BpfxError, match=r"(?s)dimension.*|\(3, 16, 16\)"):
        step(x[0], y)


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "right"), [("layr2", "layer2"), ("layer2.O", r"layer2\.0"), ("Layer3", "layer3")])
def test_unknown_name_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=rf"(?s){wrong}.*{right}"):
        convert(*resnet18(), blocks=["layer1", wrong])


def test_more_blocks_than_cut_points() -> None:
    with pytest.raises(bpfx.BpfxError, match=r"(?s)10000.*at most \d+|10000.*\d+ (cut|block)"):
        convert(*small(), blocks=10_000)


def test_the_number_in_the_message_works() -> None:
    """The most that it says is possible is possible, and one more is not."""
    import re

    with pytest.raises(bpfx.BpfxError) as refusal:
        convert(*small(), blocks=10_000)
    numbers = sorted(int(n) for n in re.findall(r"\d+", str(refusal.value)) if int(n) != 10_000)
    most = numbers[-1]
    assert len(bpfx.plan(*small(), blocks=most).blocks) == most
    with pytest.raises(bpfx.BpfxError):
        bpfx.plan(*small(), blocks=most + 1)


@pytest.mark.parametrize("blocks", [0, -3, 2.5, "automatic", []])
def test_blocks_that_make_no_sense(blocks: Any) -> None:
    with pytest.raises(bpfx.BpfxError, match=r"(?s)blocks.*auto"):
        convert(*small(), blocks=blocks)


def test_blocks_and_memory_budget() -> None:
    with pytest.raises(bpfx.BpfxError, match=r"(?s)blocks.*memory_budget"):
        convert(*small(), blocks=3, memory_budget="1GiB")


def test_name_of_a_module_that_never_runs() -> None:
    case = zoo.ZOO["unused_parameter"].case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(bpfx.BpfxError, match=r"unused"):
            convert(case.model, case.loss_fn, case.batch, blocks=["unused"])


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": "inducter"}, r"inducter.*inductor"),
        ({"local_loss": "supervized"}, r"supervized.*supervised"),
        ({"horizon": 0}, r"horizon.*0"),
        ({"offset": "always"}, r"offset.*always"),
    ],
)
def test_settings_that_do_not_exist(options: dict[str, Any], words: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=f"(?s){words}"):
        convert(*small(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"period": 0}, r"period.*0"), ({"period": -2}, r"period.*-2"), ({"lam": "much"}, r"lam.*much")],
)
def test_offsets_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=f"(?s){words}"):
        convert(*small(), offset=bpfx.Offset(**options))


# --- while it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_gradients_at_a_refresh_keep_the_old_offset(poison: float) -> None:
    model, loss_fn, (x, y) = small()
    step = convert(
        model, loss_fn, (x, y), blocks=list(zoo.CONVNET_CUTS), offset=bpfx.Offset(period=1, alpha=1.0, lam=1.0)
    )
    drop_in(step, (x, y))
    before = {name: offset.clone() for name, offset in step.offset_state.items()}
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = poison
    buffers = copy.deepcopy(model.state_dict())
    with pytest.warns(bpfx.BpfxWarning, match=r"(?s)(NaN|finite|infinite).*offset|offset.*(NaN|finite|infinite)"):
        drop_in(step, (poisoned, y))
    assert before
    assert all(torch.equal(step.offset_state[name], offset) for name, offset in before.items())
    model.load_state_dict(buffers)  # the poisoned batch went through BatchNorm's averages, as it does in plain training
    drop_in(step, (x, y), seed=5)
    assert all(offset.isfinite().all() for offset in step.offset_state.values())
    assert any(not torch.equal(step.offset_state[name], offset) for name, offset in before.items())


def test_bad_gradients_at_the_first_refresh_store_nothing() -> None:
    model, loss_fn, (x, y) = small()
    step = convert(
        model, loss_fn, (x, y), blocks=list(zoo.CONVNET_CUTS), offset=bpfx.Offset(period=4, alpha=1.0, lam=1.0)
    )
    with pytest.warns(bpfx.BpfxWarning):
        drop_in(step, (x * float("nan"), y))
    assert all(offset.isfinite().all() for offset in step.offset_state.values())


def test_errors_are_one_class_and_short() -> None:
    """The reader sees the message, not the inside of the library."""
    with pytest.raises(bpfx.BpfxError) as refusal:
        convert(*resnet18(), blocks=["layr2"])
    assert refusal.value.__cause__ is None
    assert len(str(refusal.value)) < 400
