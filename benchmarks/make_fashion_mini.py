"""Write the embedded data set `fashion-mini` from the full Fashion-MNIST.

    python benchmarks/make_fashion_mini.py IN.npz OUT.npz

IN.npz holds x_train, y_train, x_test and y_test, images uint8 [N, 28, 28] or [N, 28, 28, 1]. The first 1,000 training
and the first 200 test images of each of the 10 classes are kept, in their stored order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TRAIN_PER_CLASS = 1_000
TEST_PER_CLASS = 200
MOST_BYTES = 6_000_000


def first_of_each_class(labels: NDArray[np.integer], count: int) -> NDArray[np.intp]:
    """Indices of the first `count` images of every class, sorted."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def main(source: Path, target: Path) -> None:
    arrays: dict[str, NDArray[np.uint8]] = {}
    with np.load(source, allow_pickle=False) as full:
        for part, count in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
            chosen = first_of_each_class(full[f"y_{part}"], count)
            arrays[f"x_{part}"] = full[f"x_{part}"].reshape(-1, 28, 28)[chosen].astype(np.uint8)
            arrays[f"y_{part}"] = full[f"y_{part}"][chosen].astype(np.uint8)
    np.savez_compressed(target, allow_pickle=False, **arrays)
    size = target.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"{target} has {size} bytes; at most {MOST_BYTES} go into the package")
    print(f"{target}: {len(arrays['x_train'])} training and {len(arrays['x_test'])} test images, {size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
