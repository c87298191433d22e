"""Data: what is bundled, what loads by name, and an order that depends on seed and epoch alone."""

from __future__ import annotations

import gzip
import importlib.resources
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpfx import BpfxError, data

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundled() -> data.Splits:
    return data.load()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of ten images of different sizes, red and blue, in one folder per class."""
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (20 + index, 30), colour).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


# the bundled subset


def test_bundled_subset_is_class_balanced_and_normalised(bundled: data.Splits) -> None:
    x, y = bundled.train.fetch(torch.arange(len(bundled.train)))
    assert torch.bincount(y).tolist() == [600] * 10
    assert torch.bincount(bundled.test.fetch(torch.arange(2000))[1]).tolist() == [200] * 10
    assert x.shape == (6000, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3
    assert bundled.num_classes == 10 and bundled.classes[9] == "Ankle boot"


def test_bundled_subset_needs_neither_numpy_nor_torchvision() -> None:
    code = (
        "import sys; sys.modules.update(numpy=None, torchvision=None, PIL=None)\n"
        "from bpfx import data; print(len(data.load().train))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "6000", done.stderr


def test_bundled_subset_carries_its_licence() -> None:
    text = (importlib.resources.files("bpfx.data") / "fashion_mnist" / "LICENSE.txt").read_text()
    assert "Zalando" in text and "MIT" in text


def test_images_are_resized_and_repeated_for_the_model() -> None:
    splits = data.load(image_size=40, channels=3)
    x, _ = next(data.batches(splits.test, 5))
    assert x.shape == (5, 3, 40, 40) and (splits.channels, splits.image_size) == (3, 40)
    assert torch.equal(x[:, 0], x[:, 2])


def test_wheel_carries_data_and_mapped_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".venv", ".git", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, source, ignore=skip)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"bpfx/data/fashion_mnist/{part}-{kind}" for part in ("train", "t10k") for kind in KINDS}
    assert wanted | {"bpfx/passes/__init__.py", "bpfx/models/resnet.py", "bpfx/py.typed"} <= names
    assert all(name.startswith(("bpfx/", "bpfx-")) for name in names), "a stray top-level package"
    python = {f"bpfx/{path.relative_to(REPOSITORY / 'bpfx')}" for path in (REPOSITORY / "bpfx").rglob("*.py")}
    assert python <= names, "a subpackage is missing from [tool.setuptools] packages"


KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")


# order


@settings(deadline=None, max_examples=25)
@given(batch_size=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 50), data_=st.data())
def test_resumed_batches_equal_uninterrupted_ones(batch_size: int, seed: int, epoch: int, data_: st.DataObject) -> None:
    split = data.load().test.take(500)
    count = data.batch_count(split, batch_size)
    start = data_.draw(st.integers(0, count))
    whole = list(data.batches(split, batch_size, seed, epoch))
    rest = list(data.batches(split, batch_size, seed, epoch, start))
    assert len(whole) == count and len(rest) == count - start
    for (x, y), (x2, y2) in zip(whole[start:], rest, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_every_epoch_sees_every_sample_once_in_another_order(bundled: data.Splits) -> None:
    test = bundled.test.take(300)
    epochs = [torch.cat([x for x, _ in data.batches(test, 64, seed=3, epoch=e)]).sum(dim=(1, 2, 3)) for e in (0, 1)]
    in_order = torch.cat([x for x, _ in data.batches(test, 64)]).sum(dim=(1, 2, 3))
    assert not torch.equal(epochs[0], epochs[1])
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, in_order.sort().values)


def test_order_leaves_the_global_generator_alone(bundled: data.Splits) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(data.batches(bundled.train, 10, seed=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("size", "drop", "count"), [(300, False, 7), (300, True, 6), (500, True, 4), (9999, True, 1)])
def test_last_smaller_batch_is_dropped_only_when_asked(bundled: data.Splits, size: int, drop: bool, count: int) -> None:
    assert data.batch_count(bundled.test, size, drop) == count
    assert len(list(data.batches(bundled.test, size, drop_last=drop))) == count


def test_take_spreads_over_all_classes(bundled: data.Splits) -> None:
    few = bundled.test.take(200)
    assert len(few) == 200 and len(bundled.test.take(10**6)) == 2000
    assert torch.bincount(few.fetch(torch.arange(200))[1], minlength=10).min() > 5


# torchvision's sets


def test_torchvision_set_equals_the_same_bytes_bundled(tmp_path: Path, bundled: data.Splits) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in Path(str(importlib.resources.files("bpfx.data"))).glob("fashion_mnist/*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    splits = data.load("FashionMNIST", data_root=tmp_path)
    assert splits.classes == bundled.classes and (splits.channels, splits.image_size) == (1, 28)
    for one, other in ((splits.train, bundled.train), (splits.test, bundled.test)):
        for ours, theirs in zip(one.fetch(torch.arange(50)), other.fetch(torch.arange(50)), strict=True):
            assert torch.equal(ours, theirs)


def test_torchvision_set_without_arrays_is_decoded_lazily(image_folder: Path) -> None:
    pytest.importorskip("torchvision")
    splits = data.load("ImageFolder", data_root=image_folder, image_size=16)
    assert splits.classes == ("blue", "red") and len(splits.train) == 16 and len(splits.test) == 4
    assert splits.train.fetch(torch.tensor([0, 15]))[0].shape == (2, 3, 16, 16)


def test_labels_with_more_than_the_class_in_them_are_read_from_the_samples(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("test", 4)):  # big-endian int32: type, dimensions, then eight facts per image
        images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + bytes(count * 784)
        facts = [fact for index in range(count) for fact in (index % 3, *range(7))]
        labels = bytes([0, 0, 12, 2]) + b"".join(n.to_bytes(4, "big") for n in (count, 8, *facts))
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(labels)
    splits = data.load("QMNIST", data_root=tmp_path)
    assert len(splits.classes) in (3, 10) and (len(splits.train), len(splits.test)) == (6, 4)
    assert splits.train.fetch(torch.arange(6))[1].tolist() == [0, 1, 2, 0, 1, 2]


# image folders


def test_image_folder_is_split_the_same_way_every_time(image_folder: Path) -> None:
    one, two = (data.load(str(image_folder), image_size=16) for _ in range(2))
    assert one.classes == ("blue", "red") and (len(one.train), len(one.test)) == (16, 4)
    for part in ("train", "test"):
        first, second = getattr(one, part), getattr(two, part)
        for a, b in zip(first.fetch(torch.arange(4)), second.fetch(torch.arange(4)), strict=True):
            assert torch.equal(a, b)


def test_image_folder_pixels_keep_channel_order(image_folder: Path) -> None:
    x, y = next(data.batches(data.load(str(image_folder), image_size=8).train, 16))
    red, blue = x[y == 1], x[y == 0]
    assert x.shape == (16, 3, 8, 8)
    assert (red[:, 0] > red[:, 2]).all() and (blue[:, 2] > blue[:, 0]).all()


def test_image_folder_with_its_own_test_part_uses_it(image_folder: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(image_folder, image_folder.parent / "parts" / part)
    splits = data.load(str(image_folder.parent / "parts"), image_size=8, channels=1)
    assert len(splits.train) == len(splits.test) == 20 and splits.channels == 1


# messages


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "CIFAR11", "data_root": "."}, "Unknown data set 'CIFAR11'.*CIFAR10"),
        ({"name": "fashion-mnist"}, "Unknown data set 'fashion-mnist'.*fashion-mnist-subset"),
        ({"name": "FashionMNIST"}, "FashionMNIST needs --data-root"),
        (
            {"name": "FashionMNIST", "data_root": "/nonexistent-folder"},
            "cannot open FashionMNIST in /nonexistent-folder",
        ),
        ({"name": "./no/such/folder"}, "no such folder"),
        ({"image_size": 0}, "image size must be a positive number of pixels, not 0"),
        ({"channels": 2}, "1 or 3 channels, not 2"),
    ],
)
def test_messages_say_what_would_work(arguments: dict[str, object], expected: str) -> None:
    with pytest.raises(BpfxError, match=expected):
        data.load(**arguments)  # type: ignore[arg-type]


def test_packed_files_are_to_be_unpacked(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(BpfxError, match="unpack them: gunzip -k .*FashionMNIST/raw"):
        data.load("FashionMNIST", str(tmp_path))


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BpfxError, match="does not look like an image folder.*found 0"):
        data.load(str(tmp_path))


def test_unreadable_image_is_named(image_folder: Path) -> None:
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"not an image")
    splits = data.load(str(image_folder))
    with pytest.raises(BpfxError, match=r"Cannot read the image .*\.png"):
        splits.train.fetch(torch.tensor([0]))


def test_batch_size_must_be_positive(bundled: data.Splits) -> None:
    with pytest.raises(BpfxError, match="batch size must be at least 1, not 0"):
        next(data.batches(bundled.train, 0))
