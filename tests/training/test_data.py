"""Data sets: published formats written small by the test, batches by arithmetic, and refusals."""

from __future__ import annotations

import gzip
import os
import pickle
import time
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from chipdeploy.errors import DataError, UsageError
from chipdeploy.training import sources
from chipdeploy.training.data import data_names, load_data
from chipdeploy.training.splits import FolderSplit, MemorySplit

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_DEBIAN_FOLDER", tmp_path / "no-such-folder")


def refusal(spec, error=DataError, **options):
    """The message of the error, which must be one line."""
    with pytest.raises(error) as caught:
        load_data(spec, **options)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    return str(caught.value)


def random_arrays(train=20, test=10, shape=(8, 8, 3), classes=4):
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": random.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % classes,
    }


@pytest.fixture
def write(tmp_path):
    """Write an .npz with some arrays replaced (None leaves one out); returns its spec."""

    def write(name="data.npz", **changes):
        arrays = random_arrays() | changes
        np.savez(tmp_path / name, **{key: value for key, value in arrays.items() if value is not None})
        return f"npz:{tmp_path / name}"

    return write


def collect(split, size=7, **options):
    """All batches of a split as one pair."""
    batches = list(split.batches(size, **options))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def pixels(images, data):
    """Undo the normalisation: whole numbers 0 … 255, [N, C, H, W]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


# Batches


def test_npz_batches_are_the_stored_images(write):
    arrays = random_arrays()
    data = load_data(write())
    images, labels = collect(data.test)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(pixels(images, data), torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2))
    assert torch.equal(labels, torch.from_numpy(arrays["y_test"]))
    assert data.shape == (3, 8, 8) and data.classes == ("0", "1", "2", "3")
    assert (data.num_classes, data.in_channels, data.image_size) == (4, 3, 8)


def test_validation_images_are_taken_from_the_training_images(write):
    arrays = random_arrays()
    data = load_data(write(), val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (15, 5, 10)
    both = torch.cat([pixels(collect(part)[0], data) for part in (data.train, data.val)])
    stored = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2)
    places = [int((stored == image).flatten(1).all(1).nonzero()) for image in both]
    assert sorted(places) == list(range(20))
    assert places[:15] == sorted(places[:15]) and places[15:] == sorted(places[15:])
    again, other = load_data(write(), val_fraction=0.25), load_data(write(), val_fraction=0.25, seed=1)
    assert torch.equal(collect(again.val)[0], collect(data.val)[0])
    assert again.digest == data.digest != other.digest and len(data.digest) == 16


def test_the_digest_of_the_images_is_of_their_pixels(write):
    data = load_data(write())
    other = random_arrays()["x_test"]
    other[3, 2, 1, 0] ^= 1
    changed = load_data(write("other.npz", x_test=other))
    assert changed.digest == data.digest
    assert changed.images_digest != data.images_digest == load_data(write("same.npz")).images_digest


@pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.999, 19)])
def test_both_parts_keep_an_image(write, fraction, expected):
    data = load_data(write(), val_fraction=fraction)
    assert len(data.val) == expected and len(data.train) == 20 - expected


def test_mean_and_std_are_those_of_the_training_split(write):
    data = load_data(write())
    images, _ = collect(data.train)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)
    given = load_data(write(), mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert given.mean == (0.1, 0.2, 0.3) and given.std == (1.0, 2.0, 3.0)


def test_a_constant_channel_is_not_divided_by_zero(write):
    arrays = random_arrays()
    arrays["x_train"][..., 2] = 255
    data = load_data(write(**arrays))
    assert data.std[2] == pytest.approx(1 / 255)
    assert collect(data.train)[0][:, 2].abs().max() == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_channels_last(channels, augment):
    split = memory(10, channels)
    for images, _ in split.batches(5, seed=0, augment=augment):
        assert images.shape == (5, channels, 6, 6)
        assert images.is_contiguous(memory_format=torch.channels_last)


def memory(count, channels=1, size=6):
    """Image i is filled with i + 1, and labelled i."""
    values = torch.arange(1, count + 1, dtype=torch.uint8)
    images = values.view(-1, 1, 1, 1).expand(count, size, size, channels)
    return MemorySplit(images, torch.arange(count), (0.0,) * channels, (1 / 255,) * channels)


def test_without_a_seed_the_order_is_stored_and_the_short_batch_stays():
    batches = list(memory(10).batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))


def test_a_seed_shuffles_and_drops_the_short_batch():
    split = memory(10)
    images, labels = collect(split, 4, seed=3)
    assert len(set(labels.tolist())) == 8 and labels.tolist() != sorted(labels.tolist())
    assert torch.equal(images[:, 0, 0, 0].round().long(), labels + 1)
    assert torch.equal(collect(split, 4, seed=3)[1], labels)
    assert not torch.equal(collect(split, 4, seed=4)[1], labels)
    assert len(collect(split, 16, seed=3)[1]) == 10  # The only batch stays.


def test_augmentation_shifts_by_up_to_four_and_flips():
    count, size = 400, 6
    image = torch.arange(1, size * size + 1, dtype=torch.uint8).view(size, size)
    images = image.view(1, size, size, 1).expand(count, size, size, 1)
    split = MemorySplit(images, torch.zeros(count, dtype=torch.int64), (0.0,), (1 / 255,))
    padded = torch.zeros(size + 8, size + 8)
    possible = {}
    for flipped in (0, 1):
        padded[4:-4, 4:-4] = image.flip(1) if flipped else image
        for y in range(9):
            for x in range(9):
                possible[tuple(padded[y : y + size, x : x + size].flatten().tolist())] = (flipped, y, x)
    crops = collect(split, 100, seed=0, augment=True)[0].round()
    drawn = [possible[tuple(crop.flatten().tolist())] for crop in crops]
    # 400 draws: each offset is expected 44 times, a flip 200 times.
    assert all(30 < sum(d[0] == flip for d in drawn) < 370 for flip in (0, 1))
    assert {d[1] for d in drawn} == {d[2] for d in drawn} == set(range(9))
    assert torch.equal(collect(split, 100, seed=0, augment=True)[0].round(), crops)
    assert not torch.equal(collect(split, 100, seed=1, augment=True)[0].round(), crops)
    assert torch.equal(collect(split, 100)[0].round()[0, 0], image.float())  # The stored images are as they were.


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    collect(memory(10), seed=5, augment=True)
    assert torch.equal(torch.rand(1), expected)


def test_an_epoch_of_cifar_costs_little():
    images = torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8)
    split = MemorySplit(images, torch.zeros(10_000, dtype=torch.int64), (0.5,) * 3, (0.2,) * 3)
    started = time.process_time()
    for _ in split.batches(128, seed=0, augment=True):
        pass
    seconds = time.process_time() - started
    print(f"augmentation and normalisation of 50,000 images: {5 * seconds:.2f} s of CPU")
    assert 5 * seconds < 10  # About 0.5 s; room for a loaded machine.


def test_batch_size_below_one(write):
    with pytest.raises(UsageError, match="at least 1, got 0"):
        next(load_data(write()).train.batches(0))


def test_image_size_resizes(write):
    data = load_data(write(), image_size=16)
    assert data.shape == (3, 16, 16) and collect(data.test)[0].shape == (10, 3, 16, 16)
    grey = load_data(write(**random_arrays(shape=(8, 6))), image_size=8)
    assert grey.shape == (1, 8, 8)


# Embedded and published sets


def test_fashion_mini():
    data = load_data("fashion-mini")
    assert (len(data.train), len(data.val), len(data.test)) == (9_000, 1_000, 2_000)
    assert data.shape == (1, 28, 28) and data.classes[9] == "Ankle boot"
    labels = torch.cat([data.train.labels, data.val.labels])
    assert labels.bincount().tolist() == [1_000] * 10
    assert data.test.labels.bincount().tolist() == [200] * 10
    # Published for the full set: 0.2860 and 0.3530.
    assert data.mean[0] == pytest.approx(0.286, abs=0.005) and data.std[0] == pytest.approx(0.353, abs=0.005)
    assert load_data("fashion-mini").digest == data.digest


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(("folder", "suffix"), [("", ".gz"), ("FashionMNIST/raw", ""), ("fashion-mnist", ".gz")])
def test_fashion_mnist(tmp_path, folder, suffix):
    arrays = random_arrays(shape=(28, 28), classes=10)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, array in zip(names, arrays.values(), strict=True):
        write_idx(tmp_path / folder / f"{name}-ubyte{suffix}", array)
    data = load_data("fashion-mnist", root=tmp_path)
    images, labels = collect(data.test)
    assert torch.equal(pixels(images, data)[:, 0], torch.from_numpy(arrays["x_test"]))
    assert labels.tolist() == arrays["y_test"].tolist() and data.num_classes == 10

    path = tmp_path / folder / f"t10k-labels-idx1-ubyte{suffix}"
    for content in (path.read_bytes()[:-3], b"", b"\0\0\x08\x02" + b"\xff" * 8 + b"x"):
        path.write_bytes(content)
        assert "is damaged or no idx file" in refusal("fashion-mnist", root=tmp_path)


def test_fashion_mnist_from_debian(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_DEBIAN_FOLDER", tmp_path)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, array in zip(names, random_arrays(shape=(28, 28)).values(), strict=True):
        write_idx(tmp_path / f"{name}-ubyte.gz", array)
    assert len(load_data("fashion-mnist").test) == 10


def test_fashion_mnist_absent(tmp_path, monkeypatch):
    message = refusal("fashion-mnist")
    assert "dataset-fashion-mnist" in message and "--data-root" in message

    def no_network(root, download):
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    assert "could not be downloaded" in refusal("fashion-mnist", root=tmp_path)


def write_cifar(root, ten=True, protocol=2, **changes):
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    key, names, count = (b"labels", b"label_names", 10) if ten else (b"fine_labels", b"fine_label_names", 100)
    parts = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for number, part in enumerate(parts):
        rows = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {b"data": rows, key: [number, 1, 2, 3], b"filenames": [b"a.png"] * 4} | changes
        (folder / part).write_bytes(pickle.dumps(content, protocol=protocol))
    meta = {names: [b"class %d" % i for i in range(count)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=protocol))
    return folder, rows


@pytest.mark.parametrize("ten", [True, False])
@pytest.mark.parametrize("protocol", [3, 5])
def test_cifar(tmp_path, ten, protocol):
    folder, rows = write_cifar(tmp_path, ten, protocol)
    for root in (tmp_path, folder):
        data = load_data("cifar10" if ten else "cifar100", root=root)
        assert len(data.train) + len(data.val) == (20 if ten else 4) and data.num_classes == (10 if ten else 100)
        images, labels = collect(data.test)
        assert torch.equal(pixels(images, data).flatten(1), torch.from_numpy(rows))
        assert labels.tolist() == [5 if ten else 1, 1, 2, 3] and data.classes[3] == "class 3"
        assert data.mean[0] == (0.4914 if ten else 0.5071)


def test_cifar_as_python_2_pickled_it(tmp_path):
    """Python 2 wrote text as bytes, and arrays by `numpy.core.multiarray._reconstruct` with a string of bytes."""
    _, rows = write_cifar(tmp_path)
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        content = pickle.loads(path.read_bytes())
        path.write_bytes(python_2_pickle(content))
    images, _ = collect(load_data("cifar10", root=tmp_path).test)
    assert images.shape == (4, 3, 32, 32) and rows.shape == (4, 3072)


def python_2_pickle(value):
    return b"\x80\x02" + python_2_parts(value) + b"."


def python_2_parts(value):
    """Opcodes of pickle protocol 2 as Python 2 used them."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2_parts(k) + python_2_parts(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(python_2_parts(item) for item in value) + b"e"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little")
    if isinstance(value, bytes):
        return b"T" + len(value).to_bytes(4, "little") + value
    assert value.dtype == np.uint8
    shape = python_2_parts(value.shape[0]) + python_2_parts(value.shape[1]) + b"\x86"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python_2_parts(value.tobytes()) + b"tb"


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_no_code_of_a_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = write_cifar(tmp_path)
    for content in (Evil(), {b"data": Evil()}, {b"data": eval}):
        (folder / "test_batch").write_bytes(pickle.dumps(content))
        assert "holds more than arrays (UnpicklingError)" in refusal("cifar10", root=tmp_path)
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": np.zeros((4, 3000), np.uint8)}, "no 'data' of bytes [N, 3072]"),
        ({b"data": [1, 2]}, "no 'data' of bytes [N, 3072]"),
        ({b"labels": [1, 2, 3]}, "no 'labels', a number for each image"),
        ({b"labels": [1, 2, 3, b"4"]}, "no 'labels', a number for each image"),
        ({b"labels": [1, 2, 3, 10]}, "y_train lies in 1 … 10, must lie in 0 … 9"),
        ({b"labels": [1, 2, 3, 10**30]}, "labels out of range"),
    ],
)
def test_damaged_cifar(tmp_path, changes, message):
    folder, _ = write_cifar(tmp_path, True, 3)
    for number in range(1, 6):
        path = folder / f"data_batch_{number}"
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | changes, protocol=3))
    assert message in refusal("cifar10", root=tmp_path)


def test_cifar_with_missing_parts(tmp_path):
    assert "--data-root" in refusal("cifar10")
    assert "no folder cifar-10-batches-py/" in refusal("cifar10", root=tmp_path)
    folder, _ = write_cifar(tmp_path, protocol=3)
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"one"]}))
    assert "does not name 10 classes" in refusal("cifar10", root=tmp_path)
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:1000])
    assert "is damaged" in refusal("cifar10", root=tmp_path)
    (folder / "data_batch_3").unlink()
    assert "data_batch_3' does not exist" in refusal("cifar10", root=tmp_path)


def save_image(path, colour, size=(64, 64), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, quality=100)


def write_tiny_imagenet(root):
    folder = root / "tiny-imagenet-200"
    for label, wnid in enumerate(("n02", "n01", "n03")):
        for number in (1, 0):
            save_image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", (40 * label, 10, 200))
    save_image(folder / "val" / "images" / "val_1.JPEG", 100, mode="L")
    save_image(folder / "val" / "images" / "val_0.JPEG", (0, 0, 0))
    lines = ["val_1.JPEG\tn03\t0\t0\t63\t63", "val_0.JPEG\tn01\t0\t0\t63\t63"]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_tiny_imagenet(tmp_path):
    write_tiny_imagenet(tmp_path)
    data = load_data("tiny-imagenet", root=tmp_path)
    assert data.classes == ("n01", "n02", "n03") and data.shape == (3, 64, 64)
    assert len(data.train) + len(data.val) == 6
    images, labels = collect(data.test)
    assert labels.tolist() == [0, 2]
    assert pixels(images, data)[:, :, 0, 0].tolist() == [[0, 0, 0], [100, 100, 100]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_0.JPEG\tn09", "unusable line"),
        ("../images/val_0.JPEG\tn01", "unusable line"),
        ("val_9.JPEG\tn01", "cannot be decoded"),
    ],
)
def test_damaged_tiny_imagenet(tmp_path, line, message):
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").write_text(line)
    assert message in refusal("tiny-imagenet", root=tmp_path)
    (folder / "val" / "val_annotations.txt").unlink()
    assert "does not exist" in refusal("tiny-imagenet", root=tmp_path)
    save_image(folder / "train" / "n01" / "images" / "x.JPEG", 0, (10, 20))
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\nval_1.JPEG\tn01")
    assert "is 10x20, must be 64x64" in refusal("tiny-imagenet", root=tmp_path)


def test_an_npz_may_bring_its_own_validation_images(tmp_path):
    path, pixels_of = tmp_path / "own.npz", lambda count, value: np.full((count, 8, 8, 3), value, np.uint8)
    parts = {f"x_{name}": pixels_of(6, value) for name, value in (("train", 10), ("val", 20), ("test", 30))}
    parts |= {f"y_{name}": np.arange(6) % 2 for name in ("train", "val", "test")}
    np.savez(path, **parts)
    data = load_data(f"npz:{path}")
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 6, 6]
    assert pixels(collect(data.val)[0], data).unique().tolist() == [20]
    for wrong, message in (
        ({"x_val": pixels_of(6, 20)[:, :4, :4]}, "x_val of 4x4x3; store them alike"),
        ({"y_val": np.full(6, 5)}, "y_val lies in 5 … 5"),
        ({"x_val": parts["x_val"].astype(np.float32)}, "x_val must be uint8"),
    ):
        np.savez(path, **parts | wrong)
        assert message in refusal(f"npz:{path}")
    del parts["y_val"]
    np.savez(path, **parts)
    assert "lacks y_val; it must hold x_train, y_train, x_test, y_test, x_val, y_val" in refusal(f"npz:{path}")


def test_classes_are_numbered_from_0(tmp_path):
    path = tmp_path / "from-1.npz"
    images = np.zeros((6, 8, 8, 3), np.uint8)
    np.savez(path, x_train=images, y_train=1 + np.arange(6) % 2, x_test=images, y_test=1 + np.arange(6) % 2)
    assert "no image has the label 0; number the classes from 0" in refusal(f"npz:{path}")


# Folders of image files


def write_folder(root, test="val", count=6):
    for label, name in enumerate(("cat", "dog")):
        for number in range(count):
            save_image(root / "train" / name / f"{number}.png", (100 * label, 10 * number, 7), (40, 32))
        for number in range(2):
            save_image(root / test / name / f"{number}.png", (100 * label, number, 9), (32, 40))


@pytest.mark.parametrize("test", ["val", "test"])
def test_folder(tmp_path, test):
    write_folder(tmp_path, test)
    data = load_data(f"folder:{tmp_path}", image_size=16, val_fraction=0.25)
    assert data.classes == ("cat", "dog") and data.shape == (3, 16, 16)
    assert (len(data.train), len(data.val), len(data.test)) == (9, 3, 4)
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
    images, labels = collect(data.test, 3)
    assert labels.tolist() == [0, 0, 1, 1]
    assert pixels(images, data)[:, :, 3, 5].tolist() == [[0, 0, 9], [0, 1, 9], [100, 0, 9], [100, 1, 9]]
    assert load_data(f"folder:{tmp_path}").shape == (3, 224, 224)
    images, _ = collect(data.train, 4, seed=0, augment=True)
    assert images.shape == (8, 3, 16, 16)


def test_folder_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    results = [
        collect(FolderSplit(paths, torch.arange(8), 8, (0.5,) * 3, (0.2,) * 3, workers), 3, seed=seed, augment=True)
        for workers, seed in ((0, 5), (2, 5), (0, 6))
    ]
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(one, two) for one, two in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line(tmp_path, workers):
    (tmp_path / "x.png").write_bytes(b"no image")
    split = FolderSplit([tmp_path / "x.png"], torch.zeros(1, dtype=torch.int64), 8, (0.5,) * 3, (0.2,) * 3, workers)
    with pytest.raises(DataError) as caught:
        next(split.batches(1))
    assert "x.png" in str(caught.value) and "\n" not in str(caught.value)


def test_the_digest_of_files_is_of_names_and_sizes(tmp_path):
    write_folder(tmp_path / "one")
    one = load_data(f"folder:{tmp_path / 'one'}").images_digest
    (tmp_path / "one").rename(tmp_path / "two")
    spec = f"folder:{tmp_path / 'two'}"
    assert load_data(spec).images_digest == one
    path = tmp_path / "two" / "val" / "cat" / "0.png"
    path.write_bytes(path.read_bytes() + b"x")
    assert load_data(spec).images_digest != one


def test_pixels_that_are_not_compressed_are_told_apart(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "train" / "cat" / "more.bmp"
    save_image(path, 10, (40, 32))
    before, size = load_data(f"folder:{tmp_path}").images_digest, path.stat().st_size
    save_image(path, 11, (40, 32))
    assert path.stat().st_size == size
    assert load_data(f"folder:{tmp_path}").images_digest != before


def test_a_class_without_training_images_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "train" / "eel" / "0.gif").write_bytes(b"GIF89a")
    assert "eel' holds no images (.bmp " in refusal(f"folder:{tmp_path}")


def test_a_damaged_training_image_is_found_before_training(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "train" / "dog" / "9.png").write_bytes(b"")
    assert "9.png' " in refusal(f"folder:{tmp_path}")
    monkeypatch.setattr(sources, "_CHECKED_AT_ONCE", 5)
    load_data(f"folder:{tmp_path}")


def test_a_folder_of_three_parts_has_its_own_validation_images(tmp_path):
    write_folder(tmp_path, "val")
    write_folder(tmp_path, "test")
    save_image(tmp_path / "val" / "cat" / "0.png", (77, 77, 77))
    data = load_data(f"folder:{tmp_path}", image_size=16)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 4)
    assert pixels(collect(data.val)[0], data)[:2, :, 3, 5].tolist() == [[77, 77, 77], [0, 1, 9]]
    assert pixels(collect(data.test)[0], data)[:2, :, 3, 5].tolist() == [[0, 0, 9], [0, 1, 9]]
    save_image(tmp_path / "val" / "bird" / "0.png", 0)
    assert "val' has class 'bird', which train/ lacks" in refusal(f"folder:{tmp_path}")


def test_hidden_files_are_no_images(tmp_path):
    write_folder(tmp_path / ".data")
    (tmp_path / ".data" / "train" / "cat" / "._0.png").write_bytes(b"Mac OS X")
    save_image(tmp_path / ".data" / "train" / "cat" / ".ipynb_checkpoints" / "0.png", 0)
    save_image(tmp_path / ".data" / "train" / "cat" / "more" / "0.png", 0)
    data = load_data(f"folder:{tmp_path / '.data'}", image_size=16)
    assert len(data.train) + len(data.val) == 13


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("test", ["val", "test"])
def test_a_damaged_test_image_is_found_before_training(tmp_path, suffix, test):
    write_folder(tmp_path, test)
    path = tmp_path / test / "dog" / f"1.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    # What stands behind the end of an image harms nobody.
    path.write_bytes(whole + b"padding")
    load_data(f"folder:{tmp_path}")
    path.write_bytes(whole[: len(whole) // 2])
    assert f"1.{suffix}' cannot be decoded" in refusal(f"folder:{tmp_path}")


def one_file(path, workers=0):
    """A split of one image of 8x8 pixels, not normalised."""
    return FolderSplit([path], torch.zeros(1, dtype=torch.int64), 8, (0.0,) * 3, (1 / 255,) * 3, workers)


@pytest.mark.parametrize(("suffix", "order"), [("png", "<"), ("tiff", "<"), ("tiff", ">")])
def test_16_bits_become_8(tmp_path, suffix, order):
    levels = np.array([0, 256, 257, 32768, 65535])
    for level in levels:
        path = tmp_path / f"{level}.{suffix}"
        Image.fromarray(np.full((10, 10), level, f"{order}u2")).save(path)
        assert collect(one_file(path))[0].unique().tolist() == pytest.approx([round(level / 257)])


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_without_a_white_are_refused_by_name(tmp_path, kind, mode, workers):
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.full((10, 10), 0.5).astype(kind)).save(path)
    with pytest.raises(DataError, match=rf"depth\.tiff' has pixels of 32 bits \(mode {mode}\)"):
        collect(one_file(path, workers))


def test_what_decoders_advise_is_not_shown(tmp_path, recwarn, monkeypatch):
    image = Image.new("P", (10, 10))
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "clear.png", transparency=bytes(256))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # 100 pixels: enough for advice, not for a refusal
    images, _ = collect(one_file(tmp_path / "clear.png"))
    assert images[0, :, 0, 0].tolist() == pytest.approx([10, 20, 30])
    assert not recwarn.list


def test_damaged_folders(tmp_path):
    spec = f"folder:{tmp_path}"
    assert "has no train/" in refusal(spec)
    (tmp_path / "train").mkdir()
    assert "has no val/" in refusal(spec)
    (tmp_path / "val").mkdir()
    assert "has no class folders" in refusal(spec)
    write_folder(tmp_path)
    save_image(tmp_path / "val" / "bird" / "0.png", 0)
    assert "has class 'bird', which train/ lacks" in refusal(spec)


# Refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fashion-mimi", "did you mean 'fashion-mini'?"),
        ("cifar10:x", "unknown data 'cifar10:x'"),
        ("zzz", "unknown data 'zzz'; give one of fashion-mini"),
        ("", "unknown data ''"),
        ("npz:", "give npz:FILE"),
        ("npz:/absent.npz", "does not exist"),
    ],
)
def test_unknown_names(spec, message):
    assert message in refusal(spec)


def test_names_show_their_arguments():
    assert {"npz:FILE", "folder:DIR", "cifar10", "fashion-mini"} <= set(data_names())


BYTES = np.zeros((20, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "lacks x_test"),
        ({"x_train": None, "y_test": None}, "lacks x_train, y_test"),
        ({"x_train": BYTES.astype(np.float32)}, "x_train must be uint8 [N, H, W] or [N, H, W, C], got float32"),
        ({"x_train": BYTES[0, 0]}, "got uint8 [8, 3]"),
        ({"x_train": np.uint8(3)}, "got uint8 []"),
        ({"x_train": BYTES[:, :0]}, "got uint8 [20, 0, 8, 3]"),
        ({"x_train": np.zeros((20, 3, 8, 8), np.uint8)}, "x_train has 8 channels; store 1 to 4"),
        ({"x_train": np.zeros((20, 8, 8, 9), np.uint8)}, "9 channels"),
        ({"x_train": BYTES[:, :6]}, "x_train has images of 8x6; give an image size"),
        ({"x_train": BYTES[:, :6, :6]}, "x_train has images of 6x6x3 and x_test of 8x8x3"),
        ({"x_train": BYTES[:19]}, "19 train images and 20 labels"),
        ({"y_train": np.arange(20) / 2}, "y_train must be whole numbers [N], got float64 [20]"),
        ({"y_train": np.ones((20, 4), int)}, "got int64 [20, 4]"),
        ({"y_train": np.ones(20, bool)}, "got bool"),
        ({"y_train": np.arange(20) - 1}, "y_train lies in -1 … 18"),
        ({"y_train": -1 - np.arange(20)}, "y_train lies in -20 … -1"),
        ({"y_test": np.arange(10)}, "y_test lies in 0 … 9, must lie in 0 … 3"),
        ({"y_train": np.arange(20) * 10**9}, "must lie in 0 … 99999"),
        ({"y_train": np.ones(20, int)}, "all training images are of class 1"),
        ({"x_train": BYTES[:1], "y_train": np.zeros(1, int)}, "1 train images; at least 2"),
        ({"x_test": BYTES[:1], "y_test": np.zeros(1, int)}, "1 test images; at least 2"),
        ({"x_train": np.array([object()] * 20)}, "damaged or no .npz of plain arrays"),
    ],
)
def test_unusable_npz(write, changes, message):
    assert message in refusal(write(**changes))


def test_a_gap_in_the_labels_is_fine(write):
    data = load_data(write(y_train=np.arange(20) % 2 * 5, y_test=np.arange(10) % 6))
    assert data.num_classes == 6


def test_damaged_npz(write, tmp_path):
    spec = write()
    content = (tmp_path / "data.npz").read_bytes()
    flipped = bytearray(content)
    flipped[2000] ^= 1  # zip's own checksum finds it.
    for damaged in (b"", content[:100], content[: len(content) // 2], bytes(flipped), b"\x93NUMPY", pickle.dumps([1])):
        (tmp_path / "data.npz").write_bytes(damaged)
        assert "damaged" in refusal(spec)
    np.save(tmp_path / "one.npy", BYTES)
    assert "damaged or no .npz" in refusal(f"npz:{tmp_path / 'one.npy'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "validation fraction"),
        ({"val_fraction": 1.0}, "validation fraction"),
        ({"image_size": 0}, "image size"),
        ({"mean": (0.5,)}, "mean must have 3 numbers, one a channel, got 1"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean must be finite"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be finite and above 0"),
    ],
)
def test_options_out_of_range(write, options, message):
    assert message in refusal(write(), UsageError, **options)
