"""From a name to a data set."""

from __future__ import annotations

import difflib
import gzip
import importlib.resources
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bpfx.data._splits import LazySplit, Normalisation, Splits, TensorSplit
from bpfx.errors import BpfxError

__all__ = ["BUNDLED", "load"]

BUNDLED = "fashion-mnist-subset"
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# For image folders, where measuring would mean decoding every image first.
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_IMAGENET_GREY = Normalisation((0.449,), (0.226,))
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLIT_SEED = 0
_TEST_SHARE = 5  # one in five, where a set has no test part of its own


def load(
    name: str = BUNDLED,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    download: bool = False,
) -> Splits:
    """Load an image classification set by name.

    Args:
        name: one of

            - `"fashion-mnist-subset"`: bundled, 6,000 + 2,000 grey images of 28 px in 10 balanced classes;
            - the name of a class in `torchvision.datasets`, such as `"FashionMNIST"` or `"CIFAR10"`; needs `data_root`;
            - the path of a folder of images, one folder per class, either directly inside it or inside its `train/` and
              `val/` (or `test/`) folders. Without a test folder, every fifth image of a fixed shuffle is held out.
        data_root: the folder torchvision's sets live in.
        image_size: side of the images, pixels. None: the set's own; 224 where images differ in size.
        channels: 1 or 3. None: the set's own; 3 for image folders. Grey images are repeated for 3.
        download: let torchvision fetch what is missing in `data_root`.

    Returns:
        The two splits and what a model for them must look like. Pixels are normalised with the training set's own mean
        and standard deviation where the set is held in memory, with ImageNet's otherwise.

    Raises:
        BpfxError: the name is unknown, the data are missing, or they are not labelled images.

    Example:
        >>> from bpfx import data
        >>> splits = data.load("fashion-mnist-subset", image_size=32, channels=3)
        >>> next(data.batches(splits.train, 4))[0].shape
        torch.Size([4, 3, 32, 32])
    """
    if image_size is not None and image_size < 1:
        raise BpfxError(f"The image size must be a positive number of pixels, not {image_size}.")
    if channels not in (None, 1, 3):
        raise BpfxError(f"Images have 1 or 3 channels, not {channels}.")
    if name == BUNDLED:
        return _bundled(image_size, channels)
    if "/" not in name and "\\" not in name and (factory := _torchvision_factory(name)) is not None:
        return _torchvision(name, factory, data_root, image_size, channels, download)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _image_folder(folder, image_size, channels)
    raise BpfxError(_unknown(name))


def _bundled(image_size: int | None, channels: int | None) -> Splits:
    folder = importlib.resources.files("bpfx.data") / "fashion_mnist"

    def read(file: str, header: int) -> torch.Tensor:
        content = gzip.decompress((folder / file).read_bytes())
        return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)

    parts = [
        (
            read(f"{part}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28),
            read(f"{part}-labels-idx1-ubyte.gz", 8).long(),
        )
        for part in ("train", "t10k")
    ]
    return _in_memory(BUNDLED, parts, _FASHION_CLASSES, image_size, channels)


def _in_memory(
    name: str,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    classes: tuple[str, ...],
    image_size: int | None,
    channels: int | None,
) -> Splits:
    images = parts[0][0]
    size = image_size or max(images.shape[-2:])
    depth = channels or images.shape[1]
    normalisation = Normalisation.of(images)
    train, test = (TensorSplit(x, y, normalisation, size, depth) for x, y in parts)
    return Splits(train, test, classes, depth, size, name)


def _torchvision_factory(name: str) -> Callable[..., Any] | None:
    try:
        from torchvision import datasets
    except ImportError:
        return None
    return getattr(datasets, name) if name in datasets.__all__ else None


def _torchvision(
    name: str,
    factory: Callable[..., Any],
    data_root: str | Path | None,
    image_size: int | None,
    channels: int | None,
    download: bool,
) -> Splits:
    if data_root is None:
        raise BpfxError(f"{name} needs --data-root, the folder that holds it (add --download to fetch it there).")
    sets = _open_parts(name, factory, Path(data_root).expanduser(), download)
    arrays = [_as_arrays(part) for part in sets]
    if len(arrays) == 2 and all(array is not None for array in arrays):
        kept = [array for array in arrays if array is not None]
        classes = _class_names(sets[0], int(max(int(y.max()) for _, y in kept)) + 1)
        return _in_memory(name, kept, classes, image_size, channels)
    return _lazy(name, sets, image_size, channels)


def _open_parts(name: str, factory: Callable[..., Any], root: Path, download: bool) -> list[Any]:
    """Training and test set, or the one set there is."""
    parameters = inspect.signature(factory).parameters
    options: dict[str, Any] = {"download": download} if "download" in parameters else {}
    if "train" in parameters:
        if "split" in parameters:  # EMNIST: six label sets
            options["split"] = "balanced"
        choices: list[list[dict[str, Any]]] = [[{"train": True}], [{"train": False}]]
    elif "split" in parameters:
        choices = [
            [{"split": s} for s in ("train", "trainval", "train-standard")],
            [{"split": s} for s in ("test", "val", "valid")],
        ]
    else:
        choices = [[{}]]
    return [_open_first(name, factory, root, options, choice) for choice in choices]


def _open_first(
    name: str, factory: Callable[..., Any], root: Path, options: dict[str, Any], choices: list[dict[str, Any]]
) -> Any:
    failure: Exception | None = None
    for choice in choices:
        try:
            return factory(str(root), **options, **choice)
        except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
            # A split name it does not have is a ValueError; missing files, the usual case, are worth reporting instead.
            if failure is None or not isinstance(error, ValueError):
                failure = error
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    advice = "Point --data-root at the folder that holds it, or add --download."
    if any((root / name / "raw").glob("*.gz")):
        advice = f"Its files are there, but packed; unpack them: gunzip -k {root / name / 'raw'}/*.gz"
    raise BpfxError(f"torchvision cannot open {name} in {root}: {reason.rstrip('.')}. {advice}") from None


def _as_arrays(part: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Images `(N, C, H, W)` uint8 and labels `(N,)` int64, where torchvision holds them in memory as arrays."""
    images = getattr(part, "data", None)
    labels = getattr(part, "targets", getattr(part, "labels", None))
    if images is None or labels is None or not hasattr(images, "shape"):
        return None
    x, y = torch.as_tensor(images), torch.as_tensor(labels)
    if x.dtype != torch.uint8 or y.dim() != 1 or len(x) != len(y):
        return None
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4 and x.shape[-1] == 3:
        x = x.permute(0, 3, 1, 2)
    return (x.contiguous(), y.long()) if x.dim() == 4 else None


def _class_names(part: Any, count: int) -> tuple[str, ...]:
    names = [str(entry) for entry in getattr(part, "classes", None) or []]
    return tuple(names) if len(names) == count else tuple(str(index) for index in range(count))


def _lazy(name: str, sets: list[Any], image_size: int | None, channels: int | None) -> Splits:
    image, label = _first_sample(name, sets[0])
    labels = [int(value) for part in sets for value in _all_labels(part)]
    count = max([*labels, label, len(getattr(sets[0], "classes", None) or []) - 1]) + 1
    if not labels and not getattr(sets[0], "classes", None):
        raise BpfxError(f"{name} does not say which classes it has, so no model can be sized for it.")
    depth = channels or (1 if image.mode in ("L", "1", "I", "F") else 3)
    size = image_size or 224
    items = [[(which, index) for index in range(len(part))] for which, part in enumerate(sets)]

    def read(item: tuple[int, int]) -> tuple[Any, int]:
        image, label = sets[item[0]][item[1]]
        return image, int(label)

    train, test = items if len(items) == 2 else _hold_out(items[0])
    normalisation = _IMAGENET_GREY if depth == 1 else _IMAGENET
    first, second = (LazySplit(read, part, normalisation, size, depth) for part in (train, test))
    return Splits(first, second, _class_names(sets[0], count), depth, size, name)


def _first_sample(name: str, part: Any) -> tuple[Any, int]:
    try:
        image, label = part[0]
        label = int(label)
        image.mode  # noqa: B018  (a PIL image has one)
    except (TypeError, ValueError, AttributeError, IndexError):
        raise BpfxError(
            f"{name} is not a set of images with one class each, so it cannot be trained on here."
        ) from None
    return image, label


def _all_labels(part: Any) -> list[Any]:
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(part, attribute, None)
        if values is not None:
            table = (
                getattr(values, "ndim", 1) > 1
            )  # several facts about each image, of which its samples show the class
            return [label for _, label in part] if table else list(values)
    return []


def _image_folder(folder: Path, image_size: int | None, channels: int | None) -> Splits:
    try:
        import PIL.Image
    except ImportError:
        raise BpfxError(
            "Reading images from a folder needs Pillow; install it with: pip install 'bpfx[vision]'."
        ) from None

    test_folder = next((folder / part for part in ("val", "test", "valid") if (folder / part).is_dir()), None)
    has_parts = (folder / "train").is_dir()
    root = folder / "train" if has_parts else folder
    classes = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _images_in(entry)))
    if len(classes) < 2:
        raise BpfxError(
            f"{folder} does not look like an image folder: expected one folder of images per class, at least two, "
            f"in {root} but found {len(classes)}."
        )
    train = _labelled(root, classes)
    if has_parts and test_folder is not None:
        extra = sorted({entry.name for entry in test_folder.iterdir() if entry.is_dir()} - set(classes))
        if extra:
            raise BpfxError(f"{test_folder} has classes that {root} does not have: {', '.join(extra[:5])}.")
        test = _labelled(test_folder, classes)
    else:
        train, test = _hold_out(train)
    if not test:
        raise BpfxError(f"{folder} leaves no image to test on; add a val/ or test/ folder, or more images.")

    def read(item: tuple[Path, int]) -> tuple[Any, int]:
        path, label = item
        try:
            with PIL.Image.open(path) as image:
                image.load()
                return image, label
        except OSError as error:
            raise BpfxError(f"Cannot read the image {path}: {error}.") from None

    depth, size = channels or 3, image_size or 224
    normalisation = _IMAGENET_GREY if depth == 1 else _IMAGENET
    first, second = (LazySplit(read, part, normalisation, size, depth) for part in (train, test))
    return Splits(first, second, classes, depth, size, folder.name)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)


def _labelled(root: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(classes) for path in _images_in(root / name)]


def _hold_out(items: list[Any]) -> tuple[list[Any], list[Any]]:
    """A fixed shuffle, of which every fifth is for testing: the same folder gives the same two parts everywhere."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    test = set(order[::_TEST_SHARE])
    return [item for i, item in enumerate(items) if i not in test], [items[i] for i in sorted(test)]


def _unknown(name: str) -> str:
    known = [BUNDLED, "FashionMNIST", "MNIST", "CIFAR10", "CIFAR100"]
    message = f"Unknown data set {name!r}: no bundled or torchvision set of that name, and no such folder."
    try:
        from torchvision import datasets

        candidates = sorted({BUNDLED, *datasets.__all__})
    except ImportError:
        candidates = [BUNDLED]
        message += " torchvision is not installed (pip install 'bpfx[vision]'), so its sets are not known."
    lowered = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.6)
    if near:
        return f"{message} Did you mean {' or '.join(lowered[candidate] for candidate in near)}?"
    return f"{message} Known ones are, for instance, {', '.join(known)}."
