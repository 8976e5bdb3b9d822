"""One part of a data set, as batches of normalised images: in memory, or decoded from files as they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from chipdeploy.errors import DataError, UsageError
from chipdeploy.training.images import quiet_decoding, read_rgb

_PAD = 4  # Pixels of black around an image before a crop of its own size is drawn (He et al. 2016, section 4.2).
_WORKERS = 8
_UNCOMPRESSED = frozenset({".bmp", ".pgm", ".ppm", ".tif", ".tiff"})
_WORTH_WORKERS = 512  # Below this many images, starting processes takes longer than decoding.


class Split(Protocol):
    """Images and labels of the training, validation or test part."""

    def __len__(self) -> int: ...

    @property
    def pixels(self) -> int:
        """Of an image: height times width."""
        ...

    def batches(
        self, size: int, *, seed: int | None = None, augment: bool = False, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through the images.

        Args:
            size: images in a batch.
            seed: None keeps the stored order and the short last batch. A number shuffles, and drops the last batch if
                it is short, unless it is the only one.
            augment: random crop and horizontal flip. The same seed gives the same batches; without a seed it is 0.
            device: where the batches are.

        Yields:
            float32 [B, C, H, W], normalised by mean and standard deviation, channels last in memory; int64 [B].

        Raises:
            UsageError: `size` is below 1.
            DataError: an image file cannot be decoded.
        """
        ...


@runtime_checkable
class Labelled(Protocol):
    """A split that knows its labels, and what tells its images from others, without decoding them."""

    @property
    def labels(self) -> Tensor: ...

    def contents(self) -> Iterator[bytes | memoryview]:
        """The pixels where they are in memory or files are not compressed; names and sizes of other files."""
        ...


class Normaliser:
    """Turns bytes into numbers of mean 0 and deviation 1 a channel.

    Args:
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        deviation = torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * deviation)).float()
        self._shift = (-torch.tensor(mean, dtype=torch.float64) / deviation).float()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] to float32 [B, C, H, W], channels last in memory."""
        batch, height, width, _ = images.shape
        # Whole images as rows: an inner loop over 1 or 3 channels would be several times slower.
        scale = self._scale.to(images.device).repeat(height * width)
        shift = self._shift.to(images.device).repeat(height * width)
        values = images.reshape(batch, -1).to(torch.float32).mul_(scale).add_(shift)
        return values.view(images.shape).permute(0, 3, 1, 2)


class MemorySplit:
    """Images held as bytes.

    Args:
        images: uint8 [N, H, W, C] (channels last, so that a row of pixels can be copied at once).
        labels: int64 [N].
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self._images = images.contiguous()
        self._labels = labels
        self._normalise = Normaliser(mean, std)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def pixels(self) -> int:
        """See `Split.pixels`."""
        return self._images.shape[1] * self._images.shape[2]

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self._labels

    def contents(self) -> Iterator[bytes | memoryview]:
        """See `Labelled.contents`."""
        yield self._images.numpy().data

    def batches(
        self, size: int, *, seed: int | None = None, augment: bool = False, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`; crops are of images padded by 4 black pixels. The bytes move to `device` once a call."""
        # On the CPU whatever the device: one seed, one sequence.
        generator = torch.Generator().manual_seed(seed or 0)
        order = _order(len(self), size, generator if seed is not None else None)
        images, labels = self._images.to(device), self._labels.to(device)
        for chosen in order:
            there = chosen.to(images.device)
            batch = images[there]
            if augment:
                batch = _cropped_and_flipped(batch, generator)
            yield self._normalise(batch), labels[there]


class FolderSplit:
    """Image files, decoded when they are needed by worker processes.

    Args:
        paths: the files.
        labels: int64 [N].
        image_size: height and width of the batches, pixels.
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
        workers: processes that decode; None chooses by the number of images and of CPUs.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        workers: int | None = None,
    ) -> None:
        self._paths = tuple(paths)
        self._labels = labels
        self._image_size = image_size
        self._normalise = Normaliser(mean, std)
        if workers is None:
            workers = 0 if len(self._paths) < _WORTH_WORKERS else min(_WORKERS, os.cpu_count() or 1)
        self._workers = workers

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def pixels(self) -> int:
        """See `Split.pixels`."""
        return self._image_size**2

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self._labels

    def contents(self) -> Iterator[bytes | memoryview]:
        """See `Labelled.contents`. The folder of a class and the name in it: a data set may be moved.

        Pixels that are not compressed always take the same room, so files of such formats are read.
        """
        for path in self._paths:
            yield f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode(errors="surrogateescape")
            if path.suffix.lower() in _UNCOMPRESSED:
                yield path.read_bytes()

    def batches(
        self, size: int, *, seed: int | None = None, augment: bool = False, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`; augmented crops are of random area and aspect ratio, others of the centre."""
        # The loader draws from this one too; it would otherwise take from the global one, and change the caller's run.
        generator = torch.Generator().manual_seed(seed or 0)
        order = _order(len(self), size, generator if seed is not None else None)
        decoder = _Decoder(self._paths, self._image_size, (seed or 0) if augment else None)
        # A worker gets the indices of a whole batch and gives back the batch, or the reason why there is none. Arrays
        # come through a pipe; tensors would need shared memory, of which a container has 64 MB unless told otherwise.
        loader: torch.utils.data.DataLoader[NDArray[np.uint8] | str] = torch.utils.data.DataLoader(
            decoder,
            batch_size=None,
            sampler=[chosen.tolist() for chosen in order],
            num_workers=self._workers,
            collate_fn=_unchanged,
            generator=generator,
        )
        for chosen, images in zip(order, loader, strict=True):
            if isinstance(images, str):
                raise DataError(images)
            yield self._normalise(torch.from_numpy(images).to(device)), self._labels[chosen].to(device)


def _unchanged(batch: Any) -> Any:
    """Keeps the loader from turning arrays into tensors; a function with a name, so that any worker can find it."""
    return batch


class _Decoder(torch.utils.data.Dataset["NDArray[np.uint8] | str"]):
    """Decodes the files of a batch to uint8 [B, size, size, 3]; augments them if given a seed."""

    def __init__(self, paths: Sequence[Path], image_size: int, seed: int | None) -> None:
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        self._paths = paths
        self._seed = seed
        if seed is None:
            # The usual margin: 256 pixels for a crop of 224.
            steps = [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
        else:
            crop = transforms.RandomResizedCrop(image_size, interpolation=InterpolationMode.BILINEAR)
            steps = [crop, transforms.RandomHorizontalFlip()]
        self._transform = transforms.Compose(steps)

    def __getitem__(self, chosen: list[int]) -> NDArray[np.uint8] | str:
        try:
            with quiet_decoding():
                return np.stack([self._one(index) for index in chosen])
        except DataError as error:
            # Raised in a worker, an error would arrive as pages of traceback.
            return str(error)

    def _one(self, index: int) -> NDArray[np.uint8]:
        """Decode one file to uint8 [size, size, 3]."""
        image = read_rgb(self._paths[index])
        # Its own random numbers an image: the result does not depend on the number of workers.
        with torch.random.fork_rng(devices=[]):
            if self._seed is not None:
                torch.manual_seed((self._seed * len(self._paths) + index) % 2**63)
            return np.asarray(self._transform(image))


def _order(count: int, size: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Indices of the images, int64, a tensor a batch; stored order without a generator."""
    if size < 1:
        raise UsageError(f"the batch size must be at least 1, got {size}")
    if generator is None:
        return torch.split(torch.arange(count), size)
    whole = count // size * size
    return torch.split(torch.randperm(count, generator=generator)[: whole or count], size)


def _cropped_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image of uint8 [B, H, W, C] with probability 1/2, then shift it by up to 4 pixels each way."""
    batch, height, width, channels = images.shape
    flipped = torch.rand(batch, generator=generator) < 0.5
    shifts = torch.randint(0, 2 * _PAD + 1, (2, batch), generator=generator).to(images.device)
    which = flipped.nonzero()[:, 0].to(images.device)
    images[which] = images[which].flip(2)
    padded = F.pad(images, (0, 0, _PAD, _PAD, _PAD, _PAD))
    # Every window of the padded images as a view; a row of a window is contiguous, so one gather copies rows.
    rows = padded.view(batch, height + 2 * _PAD, (width + 2 * _PAD) * channels)
    windows = rows.unfold(1, height, 1).unfold(2, width * channels, channels)
    crops = windows[torch.arange(batch, device=images.device), shifts[0], shifts[1]]
    return crops.view(images.shape)
