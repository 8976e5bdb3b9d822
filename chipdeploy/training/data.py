"""Data sets by name, as training, validation and test splits of normalised images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from chipdeploy.errors import DataError, UsageError
from chipdeploy.training import sources
from chipdeploy.training.models.registry import did_you_mean
from chipdeploy.training.sources import Arrays, Files
from chipdeploy.training.splits import FolderSplit, Labelled, MemorySplit, Split

__all__ = ["FolderSplit", "ImageData", "MemorySplit", "Split", "data_names", "load_data"]

_MOST_CLASSES = 100_000
_MOST_CHANNELS = 4
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_FOLDER_SIZE = 224
_CHUNK = 1024  # Images handled at once where a whole set as floats would not fit in memory.

_Part = tuple[Sequence[Path], Tensor]
Loader = Callable[[str, Path | None], "Arrays | Files"]

# A name that ends in a colon takes the rest of the spec as its argument.
_LOADERS: dict[str, Loader] = {
    "fashion-mini": lambda _, root: sources.read_fashion_mini(),
    "fashion-mnist": lambda _, root: sources.read_fashion_mnist(root),
    "cifar10": lambda _, root: sources.read_cifar(root, 10),
    "cifar100": lambda _, root: sources.read_cifar(root, 100),
    "tiny-imagenet": lambda _, root: sources.read_tiny_imagenet(root),
    "npz:": lambda path, _: sources.read_npz(Path(path).expanduser()),
    "folder:": lambda path, _: sources.read_folder(Path(path).expanduser()),
}
_ARGUMENTS = {"npz:": "FILE", "folder:": "DIR"}


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        name: the spec that it was loaded by.
        train: images to train on.
        val: images to choose by, taken from the published training images where the data have none.
        test: images to report on.
        classes: names of the labels 0, 1, 2, …
        mean: mean of each channel that batches are normalised by, for pixels in [0, 1].
        std: standard deviation of each channel that batches are normalised by, for pixels in [0, 1].
        shape: channels, height and width of an image.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Height and width of an image, pixels."""
        return self.shape[1]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell apart data of other labels, classes, shape or splits."""
        parts = (self.train, self.val, self.test)
        digest = hashlib.sha256(json.dumps([self.shape, self.classes, [len(part) for part in parts]]).encode())
        for part in parts:
            if isinstance(part, Labelled):
                digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def images_digest(self) -> str:
        """16 hexadecimal digits of the images: of their pixels, or of names and sizes of compressed files.

        Apart from `digest`, which older runs were made by.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.test):
            if isinstance(part, Labelled):
                for content in part.contents():
                    digest.update(content)
        return digest.hexdigest()[:16]


def data_names() -> list[str]:
    """What `load_data` accepts, with the arguments in capitals."""
    return [name + _ARGUMENTS.get(name, "") for name in _LOADERS]


def load_data(
    spec: str,
    *,
    root: Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
) -> ImageData:
    """Load a data set.

    Args:
        spec: one of `data_names()`.
        root: folder of data sets that are not part of the package.
        val_fraction: share of the training images that becomes the validation split, at least one image. Not used
            where the data have validation images.
        seed: chooses those images; nothing else depends on it.
        mean: mean of each channel, for pixels in [0, 1]. None takes the published one, or that of the training split.
        std: standard deviation of each channel; None as for `mean`.
        image_size: height and width, pixels. None keeps the stored size; `folder:` takes 224.

    Raises:
        DataError: unknown name, or data that are missing, damaged, of a wrong shape or type, or too few.
        UsageError: `val_fraction`, `mean`, `std` or `image_size` out of range.
    """
    if not 0 < val_fraction < 1:
        raise UsageError(f"the validation fraction must lie between 0 and 1, got {val_fraction}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"the image size must be at least 1 pixel, got {image_size}")
    source = _read(spec, root)
    if isinstance(source, Arrays):
        _check_images(spec, "x_train", source.x_train, image_size)
        _check_images(spec, "x_test", source.x_test, image_size)
        if source.x_val is not None:
            _check_images(spec, "x_val", source.x_val, image_size)
    classes = _check_labels(spec, source)
    val_indices, train_indices = _split(len(source.y_train), val_fraction, seed)
    if isinstance(source, Files):
        parts = _folder_parts(source, train_indices, val_indices)
        return _folder_data(spec, source, parts, mean, std, image_size or _FOLDER_SIZE)
    x_train, x_test = _images(source.x_train, image_size), _images(source.x_test, image_size)
    y_train, y_test = _as_labels(source.y_train), _as_labels(source.y_test)
    x_val, y_val = x_train[val_indices], y_train[val_indices]
    if source.x_val is not None and source.y_val is not None:
        x_val, y_val = _images(source.x_val, image_size), _as_labels(source.y_val)
        train_indices = torch.arange(len(x_train))
    for part, images in (("test", x_test), ("val", x_val)):
        if x_train.shape[1:] != images.shape[1:]:
            raise DataError(
                f"{spec}: x_train has images of {_size(x_train)} and x_{part} of {_size(images)}; store them alike"
            )
    own_mean, own_std = source.mean, source.std
    training = x_train[train_indices]
    if own_mean is None or own_std is None:
        own_mean, own_std = _moments(training)
    mean, std = _normalisation(mean, std, own_mean, own_std)
    height, width, channels = x_train.shape[1:]
    return ImageData(
        name=spec,
        train=MemorySplit(training, y_train[train_indices], mean, std),
        val=MemorySplit(x_val, y_val, mean, std),
        test=MemorySplit(x_test, y_test, mean, std),
        classes=classes,
        mean=mean,
        std=std,
        shape=(channels, height, width),
    )


def _folder_parts(source: Files, train_indices: Tensor, val_indices: Tensor) -> tuple[_Part, _Part, _Part]:
    """Files and labels to train, to choose and to report on."""
    labels = _as_labels(source.y_train)
    test = source.x_test, _as_labels(source.y_test)
    if source.x_val is not None and source.y_val is not None:
        return (source.x_train, labels), (source.x_val, _as_labels(source.y_val)), test
    train, val = (
        ([source.x_train[index] for index in part.tolist()], labels[part]) for part in (train_indices, val_indices)
    )
    return train, val, test


def _folder_data(
    spec: str,
    source: Files,
    parts: tuple[_Part, _Part, _Part],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image_size: int,
) -> ImageData:
    mean, std = _normalisation(mean, std, _IMAGENET_MEAN, _IMAGENET_STD)
    train, val, test = (FolderSplit(paths, labels, image_size, mean, std) for paths, labels in parts)
    return ImageData(spec, train, val, test, source.classes, mean, std, (3, image_size, image_size))


def _read(spec: str, root: Path | None) -> Arrays | Files:
    prefix, colon, argument = spec.partition(":")
    loader = _LOADERS.get(prefix + colon)
    if loader is None:
        known = [name.removesuffix(":") for name in _LOADERS]
        raise DataError(f"unknown data {spec!r}{did_you_mean(prefix, known)}; give one of {', '.join(data_names())}")
    if colon and not argument:
        raise DataError(f"data {spec!r} lacks its path; give {spec}{_ARGUMENTS[spec]}")
    return loader(argument, None if root is None else Path(root).expanduser())


def _check_labels(spec: str, source: Arrays | Files) -> tuple[str, ...]:
    """Names of the classes, once the labels of both parts are known to be numbers of them."""
    parts = [("train", source.x_train, source.y_train), ("test", source.x_test, source.y_test)]
    if source.x_val is not None and source.y_val is not None:
        parts.append(("val", source.x_val, source.y_val))
    for part, images, labels in parts:
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{spec}: y_{part} must be whole numbers [N], got {labels.dtype} {list(labels.shape)}; "
                "store the number of the class of each image"
            )
        if len(images) != len(labels):
            raise DataError(f"{spec}: {len(images)} {part} images and {len(labels)} labels; store a label an image")
        if len(labels) < 2:
            raise DataError(f"{spec}: {len(labels)} {part} images; at least 2 are needed")
    if len(np.unique(source.y_train)) < 2:
        raise DataError(f"{spec}: all training images are of class {source.y_train[0]}; at least 2 classes are needed")
    limit = len(source.classes) if source.classes else max(1, min(int(source.y_train.max()) + 1, _MOST_CLASSES))
    for part, _, labels in parts:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= limit:
            raise DataError(
                f"{spec}: y_{part} lies in {low} … {high}, must lie in 0 … {limit - 1}; number the classes from 0"
            )
    if source.classes is None and not any((labels == 0).any() for _, _, labels in parts):
        raise DataError(f"{spec}: no image has the label 0; number the classes from 0, e.g. y_train - 1")
    return source.classes or tuple(str(label) for label in range(limit))


def _check_images(spec: str, name: str, images: NDArray[Any], image_size: int | None) -> None:
    """Refuse what is not uint8 [N, H, W] or [N, H, W, C], or not square and not to be made so."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{spec}: {name} must be uint8 [N, H, W] or [N, H, W, C], got {images.dtype} {list(images.shape)}; "
            "store pixels as bytes 0 … 255"
        )
    height, width = images.shape[1:3]
    channels = images.shape[3] if images.ndim == 4 else 1
    if channels > _MOST_CHANNELS:
        raise DataError(f"{spec}: {name} has {channels} channels; store 1 to {_MOST_CHANNELS} in the last dimension")
    if height != width and image_size is None:
        raise DataError(f"{spec}: {name} has images of {width}x{height}; give an image size to make them square")


def _images(images: NDArray[Any], image_size: int | None) -> Tensor:
    """Checked images as uint8 [N, H, W, C], resized if asked for."""
    if images.ndim == 3:
        images = images[..., None]
    height, width = images.shape[1:3]
    stored = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    return stored if image_size is None or height == width == image_size else _resized(stored, image_size)


def _resized(images: Tensor, size: int) -> Tensor:
    """Bilinear with antialiasing: uint8 [N, H, W, C] to [N, size, size, C]."""
    chunks = [
        F.interpolate(chunk.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        for chunk in torch.split(images, _CHUNK)
    ]
    return torch.cat(chunks)


def _size(images: Tensor) -> str:
    height, width, channels = images.shape[1:]
    return f"{width}x{height}x{channels}"


def _as_labels(labels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _split(count: int, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the validation and of the training images, each sorted, each at least one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = min(max(1, round(count * val_fraction)), count - 1)
    return order[:held_out].sort().values, order[held_out:].sort().values


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, C], for pixels in [0, 1].

    Sums of whole numbers: the same on every machine, whatever the order.
    """
    channels = images.shape[-1]
    total, squares = torch.zeros(channels, dtype=torch.int64), torch.zeros(channels, dtype=torch.int64)
    for chunk in torch.split(images, _CHUNK):
        pixels = chunk.view(-1, channels).to(torch.int32)
        total += pixels.sum(0)
        squares += pixels.square().sum(0)
    count = images.numel() // channels
    mean = total.double() / count
    deviation = (squares.double() / count - mean.square()).clamp(min=0).sqrt()
    # A channel that is the same everywhere (an opaque alpha) would divide by 0: take one step of brightness.
    deviation = deviation.clamp(min=1.0)
    return tuple((mean / 255).tolist()), tuple((deviation / 255).tolist())


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, own_mean: tuple[float, ...], own_std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The caller's numbers, checked, where given; else the data's own."""
    chosen_mean = own_mean if mean is None else tuple(float(value) for value in mean)
    chosen_std = own_std if std is None else tuple(float(value) for value in std)
    for what, values, lowest in (("mean", chosen_mean, -math.inf), ("std", chosen_std, 0.0)):
        if len(values) != len(own_mean):
            raise UsageError(f"{what} must have {len(own_mean)} numbers, one a channel, got {len(values)}")
        if not all(math.isfinite(value) and value > lowest for value in values):
            raise UsageError(f"{what} must be finite{' and above 0' if what == 'std' else ''}, got {values}")
    return chosen_mean, chosen_std
