"""Readers of published data formats. Nothing read here is trusted: what is damaged is refused in one line."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chipdeploy.errors import DataError
from chipdeploy.training.images import check_image, quiet_decoding, read_rgb

_MINI = "fashion-mini.npz"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_NPZ_MORE = ("x_val", "y_val")  # both, or neither
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
_TINY_SIZE = 64
_CHECKED_AT_ONCE = 50_000  # training images; more would take minutes before every command
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

# What a published pickle of CIFAR is made of, under the module names of numpy 1 and numpy 2.
_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


@dataclass(frozen=True)
class Arrays:
    """A data set that fits in memory, as it was stored.

    Attributes:
        x_train: uint8 [N, H, W, C], or [N, H, W] for one channel.
        y_train: integers [N].
        x_test: as x_train.
        y_test: as y_train.
        classes: names of the labels; None takes the labels' numbers.
        mean: published mean of each channel, for pixels in [0, 1]; None computes it.
        std: published standard deviation of each channel, for pixels in [0, 1]; None computes it.
        x_val: as x_train; None where the validation images are to be taken from the training images.
        y_val: as y_train.
    """

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    x_val: NDArray[Any] | None = None
    y_val: NDArray[Any] | None = None


@dataclass(frozen=True)
class Files:
    """A data set of image files, too large to decode at once; `y_train[i]` is the class of `x_train[i]`.

    `x_val` and `y_val` are None where the validation images are to be taken from the training images.
    """

    x_train: tuple[Path, ...]
    y_train: NDArray[np.int64]
    x_test: tuple[Path, ...]
    y_test: NDArray[np.int64]
    classes: tuple[str, ...]
    x_val: tuple[Path, ...] | None = None
    y_val: NDArray[np.int64] | None = None


def read_fashion_mini() -> Arrays:
    """10,000 training and 2,000 test images of Fashion-MNIST, 28x28, from the package itself."""
    with resources.as_file(resources.files("chipdeploy.training") / _MINI) as path:
        return _named(read_npz(path), _FASHION_CLASSES)


def read_npz(path: Path) -> Arrays:
    """An .npz file with x_train, y_train, x_test and y_test; x_val and y_val if there are validation images.

    Raises:
        DataError: the file is missing or damaged, holds Python objects, or lacks an array.
    """
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist; give npz:FILE")
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in (*_NPZ_ARRAYS, *_NPZ_MORE) if name in stored}
    except Exception as error:  # An untrusted file can fail anywhere in its reader; it means the same everywhere.
        raise DataError(
            f"data file {str(path)!r} is damaged or no .npz of plain arrays ({type(error).__name__}); "
            "write it with numpy.savez_compressed"
        ) from error
    wanted = (*_NPZ_ARRAYS, *_NPZ_MORE) if found.keys() & {*_NPZ_MORE} else _NPZ_ARRAYS
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"data file {str(path)!r} lacks {', '.join(missing)}; it must hold {', '.join(wanted)}")
    return Arrays(**found)


def read_fashion_mnist(root: Path | None) -> Arrays:
    """The four idx files of Fashion-MNIST, from `root`, from Debian's package, or downloaded to `root`.

    Raises:
        DataError: the files are nowhere and cannot be downloaded, or are damaged.
    """
    folders = [] if root is None else [root, root / "FashionMNIST" / "raw", root / "fashion-mnist"]
    folder = next((folder for folder in [*folders, _DEBIAN_FOLDER] if _idx_paths(folder) is not None), None)
    if folder is None:
        folder = _download_fashion_mnist(root)
    paths = _idx_paths(folder)
    if paths is None:
        raise DataError(
            f"fashion-mnist: {str(folder)!r} lacks one of {', '.join(_IDX_FILES)}; get the four files again"
        )
    x_train, y_train, x_test, y_test = (_read_idx(path) for path in paths)
    return Arrays(x_train, y_train, x_test, y_test, _FASHION_CLASSES)


def read_cifar(root: Path | None, count: int) -> Arrays:
    """CIFAR-10 or CIFAR-100 (`count` classes) in the published python format, from `root` or from the folder in it.

    Raises:
        DataError: the folder or a file of it is missing, damaged, or holds more than arrays and plain containers.
    """
    ten = count == 10
    folder = _published_folder(f"cifar{count}", root, "cifar-10-batches-py" if ten else "cifar-100-python")
    key = "labels" if ten else "fine_labels"
    parts = [_read_cifar_part(folder / name, key) for name in _cifar_parts(ten)]
    names = _read_pickle(folder / ("batches.meta" if ten else "meta")).get("label_names" if ten else "fine_label_names")
    if not isinstance(names, list) or len(names) != count:
        raise DataError(f"cifar{count}: {str(folder)!r} does not name {count} classes; get the archive again")
    return Arrays(
        np.concatenate([images for images, _ in parts[:-1]]),
        np.concatenate([labels for _, labels in parts[:-1]]),
        *parts[-1],
        classes=tuple(_text(name) for name in names),
        mean=(0.4914, 0.4822, 0.4465) if ten else (0.5071, 0.4865, 0.4409),
        std=(0.2470, 0.2435, 0.2616) if ten else (0.2673, 0.2564, 0.2762),
    )


def read_tiny_imagenet(root: Path | None) -> Arrays:
    """Tiny ImageNet, 64x64, from `root` or from the folder tiny-imagenet-200 in it; the published val/ is the test set.

    Raises:
        DataError: the folder or a part of it is missing, or an image cannot be decoded.
    """
    folder = _published_folder("tiny-imagenet", root, "tiny-imagenet-200")
    classes = tuple(path.name for path in _subfolders(folder / "train"))
    train = [(path, index) for index, name in enumerate(classes) for path in _images(folder / "train" / name)]
    test = _tiny_test(folder / "val", {name: index for index, name in enumerate(classes)})
    return Arrays(
        _decoded([path for path, _ in train], _TINY_SIZE),
        np.array([label for _, label in train], dtype=np.int64),
        _decoded([path for path, _ in test], _TINY_SIZE),
        np.array([label for _, label in test], dtype=np.int64),
        classes=classes,
    )


def read_folder(folder: Path) -> Files:
    """A folder train/, and val/ or test/ or both, in each a folder of image files for every class.

    Where only one of val/ and test/ is there, it is the test set.

    Raises:
        DataError: a folder is missing or empty, a class has no training images or train/ lacks it, or an image is
            damaged. Of a large train/ the images are not looked at.
    """
    train, val, test = (folder / name for name in ("train", "val", "test"))
    held_out = [part for part in (test, val) if part.is_dir()] or [val]
    for part in (train, *held_out):
        if not part.is_dir():
            raise DataError(f"data folder {str(folder)!r} has no {part.name}/; it must hold train/ and val/ or test/")
    classes = tuple(path.name for path in _subfolders(train))
    parts = [_class_files(part, classes) for part in (train, *held_out)]
    if empty := sorted(set(range(len(classes))) - set(parts[0][1].tolist())):
        kinds = " ".join(sorted(_IMAGE_SUFFIXES))
        raise DataError(f"{str(train / classes[empty[0]])!r} holds no images ({kinds}); fill it, or take it away")
    few = parts if len(parts[0][0]) <= _CHECKED_AT_ONCE else parts[1:]  # others are met in the first epoch
    _check_images([path for paths, _ in few for path in paths])
    (x_train, y_train), (x_test, y_test), *more = parts
    return Files(x_train, y_train, x_test, y_test, classes, *(more[0] if more else ()))


def _named(arrays: Arrays, classes: tuple[str, ...]) -> Arrays:
    return Arrays(arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test, classes)


def _published_folder(name: str, root: Path | None, folder: str) -> Path:
    if root is None:
        raise DataError(f"{name} is not part of the package; give the folder that holds {folder}/ as --data-root")
    for path in (root / folder, root):
        if path.name == folder and path.is_dir():
            return path
    raise DataError(f"{name}: no folder {folder}/ in {str(root)!r}; unpack it there or give another --data-root")


def _idx_paths(folder: Path) -> list[Path] | None:
    """The four files, packed or not; None if one is missing."""
    found = []
    for name in _IDX_FILES:
        path = next((path for path in (folder / f"{name}-ubyte.gz", folder / f"{name}-ubyte") if path.is_file()), None)
        if path is None:
            return None
        found.append(path)
    return found


def _download_fashion_mnist(root: Path | None) -> Path:
    if root is None:
        raise DataError(
            "fashion-mnist is not on this machine; install Debian's package dataset-fashion-mnist, "
            "or give a folder to download it to as --data-root"
        )
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except Exception as error:  # Networks fail in many ways.
        raise DataError(
            f"fashion-mnist could not be downloaded to {str(root)!r} ({type(error).__name__}); "
            "put its four idx files there, or install Debian's package dataset-fashion-mnist"
        ) from error
    return root / "FashionMNIST" / "raw"


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array in the idx format: two zeros, type 8 (bytes), number of dimensions, each as 4 bytes, then the values."""
    damaged = f"{str(path)!r} is damaged or no idx file of bytes; get it again"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except Exception as error:
        raise DataError(damaged) from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(damaged)
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    values = np.frombuffer(content[start:], dtype=np.uint8)
    # Python's own product: numpy's would wrap around for the sizes of a damaged header.
    if not shape or len(values) != _product(shape):
        raise DataError(damaged)
    return values.reshape(shape)


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


class _PlainUnpickler(pickle.Unpickler):
    """Admits arrays and plain containers: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary; its keys as text, whichever Python wrote them."""
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist; unpack the published archive again")
    try:
        found = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # An untrusted file can fail anywhere in its reader; it means the same everywhere.
        raise DataError(
            f"data file {str(path)!r} is damaged or holds more than arrays ({type(error).__name__}); "
            "unpack the published archive again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"data file {str(path)!r} holds a {type(found).__name__}, not a dictionary; get it again")
    return {_text(key): value for key, value in found.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _cifar_parts(ten: bool) -> list[str]:
    """Names of the files, the test set last."""
    return [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"] if ten else ["train", "test"]


def _read_cifar_part(path: Path, key: str) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images uint8 [N, 32, 32, 3] and labels [N]; the file holds rows of 3 planes of 32x32."""
    part = _read_pickle(path)
    images, labels = part.get("data"), part.get(key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"data file {str(path)!r} has no 'data' of bytes [N, 3072]; unpack the archive again")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(images):
        raise DataError(f"data file {str(path)!r} has no {key!r}, a number for each image; unpack the archive again")
    try:
        numbers = np.array(labels, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"data file {str(path)!r} has labels out of range; unpack the archive again") from error
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), numbers


def _tiny_test(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    """The images of val/ with their classes, sorted by name."""
    annotations = folder / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(f"tiny-imagenet: {str(annotations)!r} does not exist; unpack the archive again")
    result = []
    for line in sorted(annotations.read_text(encoding="utf-8", errors="replace").splitlines()):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        # Only a plain name: a path in the annotations could reach any file.
        if wnid not in classes or Path(name).name != name:
            raise DataError(f"tiny-imagenet: {str(annotations)!r} has an unusable line {line[:60]!r}; get it again")
        result.append((folder / "images" / name, classes[wnid]))
    return result


def _decoded(paths: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Decode image files of one size to uint8 [N, size, size, 3]."""
    result = np.empty((len(paths), size, size, 3), dtype=np.uint8)

    def decode(index: int) -> None:
        result[index] = _decode(paths[index], size)

    with quiet_decoding(), ThreadPoolExecutor() as pool:  # Decoders release the interpreter's lock.
        for _ in pool.map(decode, range(len(paths))):
            pass
    return result


def _decode(path: Path, size: int) -> NDArray[np.uint8]:
    image = np.asarray(read_rgb(path))
    if image.shape != (size, size, 3):
        raise DataError(
            f"image {str(path)!r} is {image.shape[1]}x{image.shape[0]}, must be {size}x{size}; get it again"
        )
    return image


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"data folder {str(folder)!r} does not exist; check the path, or unpack the archive again")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(f"data folder {str(folder)!r} has no class folders; put each class into a folder of its own")
    return found


def _images(folder: Path) -> list[Path]:
    """Image files at any depth; hidden ones are notes of systems and editors, of the same suffix."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()]
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _check_images(paths: Sequence[Path]) -> None:
    with quiet_decoding(), ThreadPoolExecutor() as pool:
        for _ in pool.map(check_image, paths):
            pass


def _class_files(folder: Path, classes: tuple[str, ...]) -> tuple[tuple[Path, ...], NDArray[np.int64]]:
    unknown = [path.name for path in _subfolders(folder) if path.name not in classes]
    if unknown:
        raise DataError(f"data folder {str(folder)!r} has class {unknown[0]!r}, which train/ lacks; name them alike")
    found = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
    return tuple(path for path, _ in found), np.array([label for _, label in found], dtype=np.int64)
