"""Models by name: they build, see the images they are promised, and repeat under a seed."""

from __future__ import annotations

import pytest
import torch

from bpfx import BpfxError, models


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("small-resnet", 1, 28),
        ("small-resnet", 3, 32),
        ("resnet18", 3, 32),
        ("resnet18", 1, 32),
        ("resnet50", 3, 32),
        ("torchvision:mobilenet_v3_small", 3, 64),
        ("torchvision:googlenet", 3, 64),
        ("timm:vit_tiny_patch16_224", 3, 64),
        ("timm:resnet18", 1, 32),
    ],
)
def test_built_models_give_logits_for_their_images(name: str, channels: int, size: int) -> None:
    model = models.build(name, num_classes=7, in_channels=channels, image_size=size)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()


@pytest.mark.slow
def test_vit_b_16_takes_the_image_size_it_is_built_for() -> None:
    model = models.build("vit_b_16", num_classes=3, image_size=32)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_same_seed_gives_same_weights() -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(5)
        return torch.cat([p.flatten() for p in models.build("small-resnet", 10, 1).parameters()])

    assert torch.equal(weights(), weights())


def test_requirements_name_what_is_fixed() -> None:
    assert models.requirements("vit_b_16") == models.Requirements(224, 3)
    assert models.requirements("torchvision:vit_b_32") == models.Requirements(224, 3)
    assert models.requirements("timm:vit_tiny_patch16_224") == models.Requirements(224, 3)
    assert models.requirements("resnet50") == models.Requirements(None, 3)
    assert models.requirements("small-resnet") == models.Requirements(None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small_resnet", "Did you mean small-resnet?"),
        ("resent18", "Did you mean resnet18?"),
        ("resnet34", "Did you mean torchvision:resnet34?"),
        ("zzzzzz", "Known are small-resnet, resnet18, resnet50, vit_b_16, torchvision:NAME, timm:NAME"),
        ("torchvision:resnet19", "Did you mean resnet1"),
        ("timm:resnet19", "Did you mean resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classification model"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(BpfxError, match=expected.replace("?", r"\?")):
        models.build(name, 10)


def test_impossible_sizes_are_refused_in_words() -> None:
    with pytest.raises(BpfxError, match="cannot build vit_b_16 for images of 30 px"):
        models.build("vit_b_16", 10, image_size=30)
