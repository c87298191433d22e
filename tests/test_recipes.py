"""The recipes train what they say, save what loads without bpfx, and refuse in plain words what they cannot do."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torchvision
from torch import nn

from bpfx import BpfxError
from bpfx.models import recipes
from bpfx.models.recipes import common, resnet50_full, resnet50_lokr, vit_b16_lora
from bpfx.models.recipes._images import augment

SIZE, CLASSES = 32, 10
TINY = ["--smoke", "--image-size", str(SIZE), "--batch-size", "4", "--train-images", "4", "--test-images", "8"]
PLAIN = {
    "resnet50_full": lambda: torchvision.models.resnet50(num_classes=CLASSES),
    "resnet50_lokr": lambda: torchvision.models.resnet50(num_classes=CLASSES),
    "vit_b16_lora": lambda: torchvision.models.vit_b_16(num_classes=CLASSES, image_size=SIZE),
}


def run(recipe: Any, out: Path, *arguments: str) -> int:
    status = recipe.main([*TINY, "--epochs", "1", "--out", str(out), *arguments])
    assert isinstance(status, int)
    return status


def adapts(name: str, classifier: str) -> bool:
    return "lora_" in name or "lokr_" in name or f".{classifier}.modules_to_save." in name


def settings(**changes: Any) -> argparse.Namespace:
    usual = {"method": "offset", "blocks": None, "period": 2, "bf16": False, "device": "cpu"}
    return argparse.Namespace(**(usual | changes))


@pytest.mark.parametrize("name", recipes.NAMES)
def test_smoke_run_saves_what_the_plain_model_loads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module(f"bpfx.models.recipes.{name}")
    bf16 = ["--bf16"] if name == "resnet50_lokr" else []
    assert run(recipe, tmp_path, *bf16) == 0
    printed = capsys.readouterr().out
    assert "epoch 1/1: training loss" in printed and "test accuracy" in printed
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    PLAIN[name]().load_state_dict(state)  # strict: the plain model's names and no others
    assert (tmp_path / "adapters" / "adapter_config.json").exists() == (name != "resnet50_full")
    # It goes back in as --weights, classifier and all, and nothing needs to be said about it.
    again = recipe.build(CLASSES, SIZE, str(tmp_path / "model.pt"))
    plain = PLAIN[name]()
    plain.load_state_dict(state)
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(again.eval()(x), plain.eval()(x))
    assert capsys.readouterr().out == ""
    if name == "vit_b16_lora":  # the same by PEFT alone: the weights it began with, and the adapters
        torch.manual_seed(0)
        restored = peft.PeftModel.from_pretrained(PLAIN[name](), str(tmp_path / "adapters"))
        torch.testing.assert_close(restored.eval()(x), plain(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recipe", [resnet50_lokr, vit_b16_lora], ids=["lokr", "lora"])
def test_adapters_and_classifier_train_and_nothing_else(recipe: Any) -> None:
    model = recipe.build(CLASSES, SIZE, common.RANDOM)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if adapts(n, recipe.CLASSIFIER)}
    kinds = (nn.Conv2d,) if recipe is resnet50_lokr else (nn.Linear,)
    wrapped = {
        n.split(".base_layer")[0] for n, m in model.named_modules() if "base_layer" in n and isinstance(m, kinds)
    }
    assert len(wrapped) == (52 if recipe is resnet50_lokr else 24)  # 16 · 3 + 4 convolutions; two layers in 12 MLPs
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = torch.randn(4, 3, SIZE, SIZE), torch.randint(0, CLASSES, (4,))
    update = common.updater(recipe.RECIPE, model, (x, y), 10, settings())
    for _ in range(2):
        update(x, y)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= trained
    assert {n for n in trained if "modules_to_save" in n} <= changed
    # Both steps reach every wrapped layer: of each product one factor begins at zero, and that one moves.
    assert {n for n in wrapped if any(c.startswith(f"{n}.lo") for c in changed)} == wrapped


@pytest.mark.parametrize(("method", "bf16"), [("checkpointing", False), ("serial", True)])
def test_exact_methods_take_the_step_of_bp(method: str, bf16: bool) -> None:
    x, y = torch.randn(4, 3, SIZE, SIZE), torch.randint(0, CLASSES, (4,))
    losses, weights = [], []
    for chosen in ("bp", method):
        torch.manual_seed(1)
        model = resnet50_full.build(CLASSES, weights=common.RANDOM)
        losses.append(common.updater(resnet50_full.RECIPE, model, (x, y), 10, settings(method=chosen, bf16=bf16))(x, y))
        weights.append({n: p.detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    # Adam's first step has the size of the rate in every entry: only signs of tiny gradients could differ.
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).abs().mean() < 1e-6, name


def test_published_weights_load_but_for_the_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ViT weights for 1,000 classes and 48 px, as a download brings them: cut to size on the way in."""
    full = torchvision.models.vit_b_16(image_size=48)
    monkeypatch.setattr(common, "_published", lambda weights: dict(full.state_dict()))
    model = vit_b16_lora.build(CLASSES, SIZE)
    assert "the classifier for 1000 classes is left out; one for 10 classes begins" in capsys.readouterr().out
    loaded = model.base_model.model
    torch.testing.assert_close(loaded.conv_proj.weight, full.conv_proj.weight)
    assert loaded.encoder.pos_embedding.shape == (1, 5, 768)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file"),
        ("text", "cannot be read as a state dict"),
        ({}, "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"epoch": 3, "model": {"weight": torch.ones(2)}}, "holds no state dict.*'model' may be one: save that alone"),
        ({"module.weight": torch.ones(2)}, "every name begins with 'module.'.*save wrapped.module.state_dict"),
        ({"fc.weight": torch.ones(2).to_sparse()}, "'fc.weight' is quantized or sparse"),
        ({"weight": torch.ones(2)}, "lacks 'bn1.bias' and .* more; has 'weight' and 0 more"),
        ("other shape", r"has 'conv1.weight' as \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"),
    ],
    ids=["missing", "text", "empty", "no tensors", "nested", "wrapped", "sparse", "other model", "other shape"],
)
def test_weights_that_do_not_fit_are_refused_in_words(content: Any, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    if content == "text":
        file.write_text("no weights")
    elif content == "other shape":
        state = torchvision.models.resnet50(num_classes=CLASSES).state_dict()
        torch.save(state | {"conv1.weight": torch.ones(64, 3, 3, 3)}, file)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(BpfxError, match=expected):
        resnet50_full.build(CLASSES, weights=str(file))


def test_weights_without_a_classifier_leave_it_at_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torchvision.models.resnet50(num_classes=3).state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, tmp_path / "weights.pt")
    model = resnet50_full.build(CLASSES, weights=str(tmp_path / "weights.pt"))
    assert "has no classifier; one for 10 classes begins at random" in capsys.readouterr().out
    torch.testing.assert_close(model.conv1.weight, state["conv1.weight"])
    assert model.fc.out_features == CLASSES


def test_no_network_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(BpfxError, match="cannot be fetched from https://.* --weights FILE"):
        resnet50_full.build(CLASSES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--lr", "-1"], "--lr must be a positive number, not -1.0"),
        (["--seed", "-1"], "--seed must be at least 0 and below 2**63, not -1"),
        (["--out", "/dev/null/run"], "Cannot make the folder /dev/null/run"),
        (["--smok"], "unrecognized arguments: --smok"),
        (["--period", "0"], "'0' is neither a number of at least 1 nor auto"),
        (["--blocks", "none"], "'none' is neither a number of at least 1 nor auto"),
        (["--device", "tpu"], "The device 'tpu' is not available here"),
        (["--data", "CIFAR11"], "Unknown data set 'CIFAR11'"),
        (["--data", "CIFAR100"], "CIFAR100 needs --data-root"),
        (["--image-size", "40"], "multiple of 16 pixels, not 40"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(vit_b16_lora, tmp_path / "out", *arguments) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_image_that_batchnorm_cannot_train_on_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(resnet50_full, tmp_path, "--batch-size", "1", "--train-images", "1", "--method", "bp") == 2
    assert "BatchNorm cannot train on 1 image of 32 px; raise --batch-size" in capsys.readouterr().err


def test_a_result_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt").touch()
    assert run(resnet50_full, tmp_path) == 2
    assert "holds the result of another run" in capsys.readouterr().err


def test_augmented_images_are_moved_and_mirrored_originals() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(16.0).expand(1, 1, 16, 16) + 16 * torch.arange(16.0)[:, None] + 1
    x = ramp.expand(64, 3, 16, 16)
    shifts = set()
    for image in augment(x):
        assert torch.equal(image[0], image[2])
        inner = image[0, 2:-2, 2:-2]  # a margin of 2 on every side is all that can be lost
        steps = (inner.diff(dim=1)).unique().tolist()
        assert steps in ([1.0], [-1.0]) and inner.diff(dim=0).unique().tolist() == [16.0]
        shifts.add((steps[0], inner[0, 0].item()))
    assert len(shifts) > 20
