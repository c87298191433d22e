"""Make the bundled subset of Fashion-MNIST: the first images of every class, in the order of the original files.

    python benchmarks/make_subset.py --data-root DATA            # DATA/FashionMNIST/raw/*.gz, torchvision's layout

The same input gives the same bytes, so the result can be checked against what is in the repository.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import struct
from pathlib import Path

CLASSES = 10
SIDE = 28
TARGET = Path(__file__).resolve().parent.parent / "bpfx" / "data" / "fashion_mnist"


def first_of_each_class(labels: bytes, per_class: int) -> list[int]:
    """Indices, in ascending order, of the first `per_class` samples of each class."""
    left = [per_class] * CLASSES
    chosen = []
    for index, label in enumerate(labels):
        if left[label]:
            left[label] -= 1
            chosen.append(index)
    if any(left):
        raise SystemExit(f"some classes have fewer than {per_class} images")
    return chosen


def write_gzip(path: Path, content: bytes) -> None:
    # No name and no time in the header: the same images are the same bytes on every day.
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as out:
        out.write(content)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def make(source: Path, target: Path, split: str, per_class: int) -> None:
    labels = gzip.decompress((source / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = gzip.decompress((source / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
    chosen = first_of_each_class(labels, per_class)
    size = SIDE * SIDE
    # IDX magic numbers: 0x08 is unsigned byte, the last byte is the number of dimensions.
    write_gzip(
        target / f"{split}-images-idx3-ubyte.gz",
        struct.pack(">IIII", 0x0803, len(chosen), SIDE, SIDE)
        + b"".join(images[i * size : (i + 1) * size] for i in chosen),
    )
    write_gzip(
        target / f"{split}-labels-idx1-ubyte.gz",
        struct.pack(">II", 0x0801, len(chosen)) + bytes(labels[i] for i in chosen),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds FashionMNIST/raw/")
    parser.add_argument("--out", type=Path, default=TARGET, help="default: the package's own data folder")
    args = parser.parse_args()
    raw = args.data_root / "FashionMNIST" / "raw"
    args.out.mkdir(parents=True, exist_ok=True)
    make(raw, args.out, "train", per_class=600)
    make(raw, args.out, "t10k", per_class=200)
    shutil.copyfile(args.data_root / "FashionMNIST" / "LICENSE.txt", args.out / "LICENSE.txt")


if __name__ == "__main__":
    main()
