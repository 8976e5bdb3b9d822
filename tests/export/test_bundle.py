"""Bundles: whole, self-describing, runnable by infer.py alone; a failure leaves what was there before."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.engines.trt import EngineManifest, manifest_path
from chipdeploy.errors import ChipdeployError, DataError, ExportError, UsageError
from chipdeploy.export import bundle, folders
from chipdeploy.export.bundle import write_bundle
from chipdeploy.export.onnx import export_onnx
from chipdeploy.export.precision import PrecisionOptions, convert
from chipdeploy.training.splits import Normaliser

SIZE = (3, 8, 12)
LABELS = ["plane", "sea lion", "Ärmel", "7"]
DATA = {
    "name": "small",
    "shape": list(SIZE),
    "classes": LABELS,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "digest": "d" * 64,
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(SIZE[0], 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, len(LABELS))).eval()


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    """An OnnxFile made for batches of up to 4."""
    return export_onnx(network, torch.zeros(2, *SIZE), tmp_path_factory.mktemp("net") / "pruned.onnx", max_batch=4)


@pytest.fixture
def make(exported, tmp_path):
    """Write a bundle; arguments change the usual ones."""

    def write(folder=None, **changed):
        arguments = {"onnx": exported.path, "description": DATA, "sha256": exported.sha256, "max_batch": 4} | changed
        return write_bundle(folder or tmp_path / "bundle", **arguments)

    return write


def make_engine(path, **changed):
    """An engine file whose manifest agrees with it. Nothing here runs it."""
    path.write_bytes(b"engine of " + path.name.encode())
    facts = {
        "runtime": "tensorrt",
        "runtime_version": "10.16.1",
        "precision": "fp16",
        "gpus": ("sm86",),
        "gpu_name": "A GPU",
        "input_shape": SIZE,
        "batches": (1, 8, 32),
        "onnx_sha256": "0" * 64,
        "engine_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "seconds": 1.0,
    }
    manifest = EngineManifest(**facts | changed)
    manifest_path(path).write_text(json.dumps(manifest.to_dict()))
    return path


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def snapshot(folder):
    """Every path and content below a folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def pixels(count, channels=SIZE[0]):
    return np.random.default_rng(count).integers(0, 256, (count, *SIZE[1:], channels), dtype=np.uint8)


def infer(folder, *arguments, code=0, program=("infer.py",)):
    """Run infer.py, or another program, in the folder of a bundle."""
    line = [sys.executable, "-I", "-B", *program, *map(str, arguments)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def best(network, images):
    """Probabilities [N, classes] of the network in torch, and classes [N, classes] in their order."""
    with torch.no_grad():
        shares = network(Normaliser(DATA["mean"], DATA["std"])(torch.from_numpy(images))).softmax(1)
    order = shares.argsort(1, descending=True)
    return shares.gather(1, order).numpy(), order.numpy()


def test_the_manifest_tells_all(make, exported, tmp_path):
    facts = {"run": "20261124-prune", "accuracy": 0.9}
    manifest = make(name="ships", facts=facts)
    folder = tmp_path / "bundle"
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    listed = manifest.pop("files")
    assert files(folder) == {"manifest.json", *listed}
    assert listed.keys() == {
        "model.onnx",
        "labels.txt",
        "infer.py",
        "triton/ships/config.pbtxt",
        "triton/ships/labels.txt",
        "triton/ships/1/model.onnx",
    }
    for name, written in listed.items():
        content = (folder / name).read_bytes()
        assert written == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    version = manifest.pop("chipdeploy_version")
    assert version.count(".") == 2
    assert manifest == {
        "schema": 1,
        "kind": "chipdeploy-bundle",
        "name": "ships",
        "run": facts,
        "data": {"name": "small", "digest": "d" * 64},
        "images": {
            "dtype": "uint8",
            "layout": "NHWC",
            "shape": ["batch", 8, 12, 3],
            "mean": DATA["mean"],
            "std": DATA["std"],
        },
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", 3, 8, 12], "layout": "NCHW"},
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 4]}],
        "classes": 4,
        "preprocess": False,
        "top_k": None,
        "max_batch": 4,
        "onnx_sha256": exported.sha256,
        "engines": [],
        "triton": ["ships"],
    }


def test_the_network_is_byte_for_byte_the_exported_one(make, exported, tmp_path):
    make()
    for name in ("model.onnx", "triton/model/1/model.onnx"):
        assert (tmp_path / "bundle" / name).read_bytes() == exported.path.read_bytes()
    assert (tmp_path / "bundle" / "labels.txt").read_text(encoding="utf-8").splitlines() == LABELS


def test_the_same_again_is_the_same(make, tmp_path):
    make(tmp_path / "a", preprocess=True, top_k=2)
    make(tmp_path / "b", preprocess=True, top_k=2)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("options", [{}, {"preprocess": True}, {"preprocess": True, "top_k": 2}], ids=str)
def test_infer_says_what_the_network_says(make, network, tmp_path, options):
    make(**options)
    images, count = pixels(7), options.get("top_k", 4)  # more images than the largest batch
    np.save(tmp_path / "images.npy", images)
    lines = infer(tmp_path / "bundle", "--top", count, tmp_path / "images.npy").splitlines()
    shares, classes = best(network, images)
    assert len(lines) == len(images)
    for number, line in enumerate(lines):
        name, *found = line.split("\t")
        assert name == f"{tmp_path / 'images.npy'}[{number}]"
        assert [text.rpartition(" ")[0] for text in found] == [LABELS[k] for k in classes[number, :count]]
        got = [float(text.rpartition(" ")[2]) for text in found]
        assert np.abs(got - shares[number, :count]).max() <= 1e-4  # four digits are printed


def test_infer_can_be_imported(make, network, tmp_path):
    make()
    images = pixels(9)
    np.save(tmp_path / "images.npy", images)
    program = "import sys; sys.path.insert(0, '.'); import numpy; from infer import classify; "
    program += "print(classify(numpy.load(sys.argv[1])).tolist())"
    got = json.loads(infer(tmp_path / "bundle", tmp_path / "images.npy", program=("-c", program)))
    assert got == best(network, images)[1][:, 0].tolist()


def test_infer_needs_nothing_but_numpy_and_onnxruntime(make, tmp_path):
    make()
    nodes = list(ast.walk(ast.parse((tmp_path / "bundle" / "infer.py").read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_infer_reads_every_form_of_images(make, tmp_path):
    make()
    images = pixels(2)
    np.save(tmp_path / "many.npy", images)
    np.save(tmp_path / "one.npy", images[0])
    np.savez(tmp_path / "only.npz", x=images)
    np.savez(tmp_path / "named.npz", labels=np.zeros(2), images=images)
    (tmp_path / "raw.bin").write_bytes(images.tobytes())

    def results(name):
        return [line.partition("\t")[2] for line in infer(tmp_path / "bundle", tmp_path / name).splitlines()]

    expected = results("many.npy")
    assert len(expected) == 2
    assert results("one.npy") == expected[:1]
    for name in ("only.npz", "named.npz", "raw.bin"):
        assert results(name) == expected
    together = infer(tmp_path / "bundle", tmp_path / "many.npy", tmp_path / "one.npy").splitlines()
    assert [line.partition("\t")[2] for line in together] == [*expected, expected[0]]


def test_infer_takes_grey_images_without_a_channel(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(96, 4))
    file = export_onnx(net, torch.zeros(2, 1, 8, 12), tmp_path / "grey.onnx")
    write_bundle(tmp_path / "bundle", file.path, DATA | {"shape": [1, 8, 12], "mean": [0.3], "std": [0.4]})
    images = pixels(2, channels=1)
    forms = {"NHWC": images, "NHW": images[..., 0], "HWC": images[0], "HW": images[0, ..., 0]}
    found = {}
    for name, form in forms.items():
        np.save(tmp_path / f"{name}.npy", form)
        lines = infer(tmp_path / "bundle", tmp_path / f"{name}.npy").splitlines()
        found[name] = [line.partition("\t")[2] for line in lines]
    assert len(found["NHWC"]) == 2
    assert found["NHW"] == found["NHWC"]
    assert found["HWC"] == found["HW"] == found["NHWC"][:1]


def test_infer_refuses_in_one_line(make, tmp_path):
    make()
    folder = tmp_path / "bundle"
    bad = {
        "float": pixels(1).astype(np.float32),
        "turned": pixels(1).transpose(0, 3, 1, 2),
        "none": pixels(0),
        "deep": pixels(1)[None],
        "pickled": np.array([None]),
    }
    for name, array in bad.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "short.bin").write_bytes(b"x" * 100)
    (tmp_path / "damaged.npz").write_bytes(b"PK\3\4 and no more")
    names = [*(f"{name}.npy" for name in bad), "short.bin", "damaged.npz", "gone.npy"]
    for name in names:
        (line,) = infer(folder, tmp_path / name, code=1).splitlines()
        assert line.startswith(f"error: {tmp_path / name}: ")
    np.save(tmp_path / "good.npy", pixels(1))
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    (line,) = infer(folder, tmp_path / "good.npy", code=1).splitlines()
    assert line.startswith("error: the bundle cannot be loaded: model.onnx is not the file of manifest.json")
    (folder / "labels.txt").unlink()
    (line,) = infer(folder, tmp_path / "good.npy", code=1).splitlines()
    assert line == "error: the bundle cannot be loaded: labels.txt is missing beside infer.py; copy the bundle again"


def test_infer_says_what_to_do_with_image_files(make, tmp_path):
    make()
    for name in ("photo.jpg", "fake.PNG"):  # the second holds as many bytes as an image has
        (tmp_path / name).write_bytes(bytes(8 * 12 * 3))
        line = infer(tmp_path / "bundle", tmp_path / name, code=1)
        fix = "image files are not decoded here; give its pixels, 8 x 12 x 3, as uint8 .npy"
        assert line == f"error: {tmp_path / name}: {fix}\n"
    (tmp_path / "short.bin").write_bytes(b"x" * 100)
    line = infer(tmp_path / "bundle", tmp_path / "short.bin", code=1)
    assert line.endswith("short.bin: holds 100 bytes, an image has 288; give raw uint8 pixels, 8 x 12 x 3\n")


def test_infer_stops_quietly_when_its_reader_does(make, tmp_path):
    make()
    np.save(tmp_path / "images.npy", pixels(2000))  # more lines than a pipe holds
    line = [sys.executable, "-I", "-B", "infer.py", str(tmp_path / "images.npy")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=tmp_path / "bundle", text=True, env={"OMP_NUM_THREADS": "1"}, **pipes) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_infer_keeps_the_warnings_of_onnxruntime_to_itself(make, tmp_path):
    torch.manual_seed(0)
    body = [nn.Conv2d(SIZE[0], 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(LABELS)))
    export_onnx(net, torch.zeros(2, *SIZE), tmp_path / "net.onnx")
    images = np.random.default_rng(0).standard_normal((8, *SIZE), dtype=np.float32)
    convert(tmp_path / "net.onnx", tmp_path / "mixed.onnx", "int8", images, options=PrecisionOptions(rest="fp16"))
    make(onnx=tmp_path / "mixed.onnx", sha256=None)
    np.save(tmp_path / "images.npy", pixels(2))
    line = [sys.executable, "-I", "-B", "infer.py", str(tmp_path / "images.npy")]
    done = subprocess.run(line, cwd=tmp_path / "bundle", capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


def test_engines_are_copied_with_their_manifests(make, tmp_path):
    rtx = make_engine(tmp_path / "rtx-fp16.engine", runtime="tensorrt_rtx")
    trt = make_engine(tmp_path / "trt-fp16.engine")
    manifest = make(engines=[rtx, trt])
    folder = tmp_path / "bundle"
    for path in (rtx, trt, manifest_path(rtx), manifest_path(trt)):
        assert (folder / "engines" / path.name).read_bytes() == path.read_bytes()
    first = manifest["engines"][0]
    assert first["file"] == "engines/rtx-fp16.engine"
    assert first["engine_sha256"] == manifest["files"]["engines/rtx-fp16.engine"]["sha256"]
    # Triton does not load what TensorRT-RTX builds.
    assert manifest["triton"] == ["model", "model_trt"]
    served = folder / "triton" / "model_trt"
    assert (served / "1" / "model.plan").read_bytes() == trt.read_bytes()
    config = (served / "config.pbtxt").read_text()
    assert "max_batch_size: 32" in config and "preferred_batch_size: [ 8, 32 ]" in config and "KIND_GPU" in config
    assert (served / "labels.txt").is_file()


def test_an_engine_takes_normalised_images_even_where_the_graph_takes_bytes(make, tmp_path):
    make(engines=[make_engine(tmp_path / "e.engine")], preprocess=True, top_k=1)
    raw, engine = (tmp_path / "bundle" / "triton" / name / "config.pbtxt" for name in ("model", "model_trt"))
    assert "TYPE_UINT8" in raw.read_text() and "label_filename" not in raw.read_text()
    assert "TYPE_UINT8" not in engine.read_text()
    assert "dims: [ 3, 8, 12 ]" in engine.read_text() and "label_filename" in engine.read_text()


def test_several_engines_are_told_apart_by_precision(make, tmp_path):
    engines = [make_engine(tmp_path / f"{kind}.engine", precision=kind) for kind in ("fp16", "int8")]
    assert make(engines=engines)["triton"] == ["model", "model_trt_fp16", "model_trt_int8"]


def test_an_engine_that_rtx_built(make, exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from chipdeploy.engines.build import BuildOptions, build_engine
    from chipdeploy.engines.target import Target

    path = tmp_path / "net.engine"
    build_engine(exported.path, path, Target.parse("rtx-fp32"), BuildOptions(gpus=("sm86",)))
    (facts,) = make(engines=[path])["engines"]
    assert (facts["runtime"], facts["onnx_sha256"]) == ("tensorrt_rtx", exported.sha256)


def test_a_bundle_is_replaced_and_a_link_to_it_stays(make, tmp_path):
    make(name="first")
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "bundle" / "__pycache__").mkdir()
    (tmp_path / "bundle" / "__pycache__" / "infer.pyc").write_bytes(b"x")
    make(tmp_path / "link", name="second")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["name"] == "second"
    assert not (tmp_path / "bundle" / "triton" / "first").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "link"]


def test_a_bundle_is_made_from_the_one_that_it_replaces(make, tmp_path):
    make(engines=[make_engine(tmp_path / "e.engine")])
    folder = tmp_path / "bundle"
    manifest = make(onnx=folder / "model.onnx", engines=[folder / "engines" / "e.engine"], preprocess=True)
    assert manifest["input"]["name"] == "images_uint8"
    assert files(folder) == {"manifest.json", *manifest["files"]}


def test_an_empty_and_a_new_folder_are_taken(make, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        assert files(folder) == set()
        make(folder)
        assert "model.onnx" in files(folder)


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "3", "{}", '{"kind": "chipdeploy-bundle"}', '{"kind": "other", "files": {}}', "\xff"],
)
def test_a_folder_that_is_no_bundle_is_left_alone(make, tmp_path, content):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    if content is not None:
        (folder / "manifest.json").write_text(content, encoding="latin-1")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="exists and is no bundle of chipdeploy"):
        make()
    assert snapshot(tmp_path) == before


def test_a_file_of_ones_own_in_a_bundle_is_not_lost(make, tmp_path):
    make()
    (tmp_path / "bundle" / "triton" / "notes.txt").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"holds triton/notes\.txt, which is not of the bundle there"):
        make()
    assert snapshot(tmp_path) == before


def edited(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def wrong_networks(folder, exported):
    """Files that are no network of these data, and what is said of them."""
    copy = Path(shutil.copy(exported.path, folder / "copy.onnx"))
    (folder / "text.onnx").write_text("no network")
    (folder / "empty.onnx").write_bytes(b"")
    return [
        ({"onnx": folder / "gone.onnx"}, ExportError, r"cannot read .*gone\.onnx"),
        ({"onnx": folder / "gone.onnx", "sha256": None}, ExportError, r"cannot read .*gone\.onnx"),
        ({"onnx": folder, "sha256": None}, ExportError, "cannot read"),
        ({"onnx": edited(copy)}, ExportError, r"copy\.onnx was edited since export"),
        ({"onnx": folder / "text.onnx", "sha256": None}, ExportError, r"text\.onnx is no valid ONNX file"),
        ({"onnx": folder / "empty.onnx", "sha256": None}, ExportError, r"empty\.onnx is no valid ONNX file"),
    ]


def wrong_engines(folder):
    """Engines that do not go into a bundle, and what is said of them."""
    alone, lost = make_engine(folder / "alone.engine"), make_engine(folder / "lost.engine")
    manifest_path(alone).unlink()
    lost.unlink()
    damaged, twin = make_engine(folder / "damaged.engine"), make_engine(folder / "twin.engine")
    manifest_path(damaged).write_text("{")
    (folder / "other").mkdir()
    return [
        ([folder / "none.engine"], ExportError, "none.engine"),
        ([alone], ExportError, r"alone\.engine\.json"),
        ([lost], ExportError, r"lost\.engine"),
        ([damaged], ExportError, r"damaged\.engine\.json is damaged"),
        ([edited(make_engine(folder / "edited.engine"))], ExportError, r"edited\.engine was edited"),
        ([make_engine(folder / "big.engine", input_shape=(3, 9, 9))], ExportError, r"takes images of \[3, 9, 9\]"),
        ([make_engine(folder / "many.engine", batches=(4, 8, 8))], ExportError, "takes batches of 4 or more"),
        (
            [twin, make_engine(folder / "other" / "twin.engine", precision="int8")],
            UsageError,
            "file name 'twin.engine'",
        ),
        ([twin, make_engine(folder / "second.engine")], UsageError, "precision for TensorRT 'fp16'"),
    ]


WRONG_OPTIONS = [
    ({"name": "a/b"}, UsageError, "a model's name"),
    ({"max_batch": 0}, UsageError, "max_batch must be at least 1, got 0"),
    ({"top_k": 2}, UsageError, "top-k 2 is worked out in the graph"),
    ({"preprocess": True, "top_k": 5}, UsageError, "top-k must lie in 1 to 4"),
    ({"preprocess": True, "top_k": 0}, UsageError, "top-k must lie in 1 to 4"),
    ({"description": {}}, DataError, "name: Field required"),
    ({"description": DATA | {"classes": LABELS[:3]}}, ExportError, "has 4 outputs, the data 3 classes"),
    ({"description": DATA | {"classes": []}}, DataError, "classes"),
    (
        {"description": DATA | {"classes": [*LABELS[:3], "two\nlines"]}},
        DataError,
        r"one line of text, got 'two\\nlines'",
    ),
    ({"description": DATA | {"classes": [*LABELS[:3], "\udcff"]}}, DataError, r"one line of text, got '\\udcff'"),
    ({"description": DATA | {"mean": [0.5]}}, DataError, r"3 channels need 3 means .* got \[0.5\]"),
    ({"description": DATA | {"std": [0.5] * 4}}, DataError, "3 channels need 3 means"),
    ({"description": DATA | {"std": [0.5, 0.5, 0.0]}}, DataError, "positive standard deviations"),
    ({"description": DATA | {"mean": [0.5, 0.5, float("nan")]}}, DataError, "mean.2"),
    ({"description": DATA | {"shape": [3, 8]}}, DataError, "shape"),
    ({"description": DATA | {"shape": [3, 12, 8]}}, ExportError, "takes images of 3 x 8 x 12, the data are 3 x 12 x 8"),
]


def test_whatever_is_wrong_is_one_line_and_leaves_the_old_bundle(make, exported, tmp_path):
    make()
    before = snapshot(tmp_path / "bundle")
    parts = tmp_path / "parts"
    parts.mkdir()
    engines = [({"engines": given}, kind, cause) for given, kind, cause in wrong_engines(parts)]
    for changed, kind, cause in [*WRONG_OPTIONS, *wrong_networks(parts, exported), *engines]:
        with pytest.raises(ChipdeployError, match=cause) as error:
            make(**changed)
        assert type(error.value) is kind
        assert "\n" not in str(error.value)
        with pytest.raises(kind):
            make(tmp_path / "new", **changed)
    assert snapshot(tmp_path / "bundle") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "parts"]


@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_bundle_leaves_what_was_there(make, tmp_path, monkeypatch, fresh):
    folder = tmp_path / "above" / "bundle" if fresh else tmp_path / "bundle"
    if not fresh:
        make()
    before = snapshot(tmp_path)

    def interrupt(path, content):
        if path.name == "model.onnx":
            raise KeyboardInterrupt
        folders.put(path, content)

    monkeypatch.setattr(bundle, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    assert snapshot(tmp_path) == before


def test_a_bundle_that_cannot_be_put_in_place_leaves_the_old_one(make, tmp_path, monkeypatch):
    make()
    before, rename = snapshot(tmp_path), Path.rename

    def refuse(path, target):
        if path.name.endswith("-new"):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match=r"^cannot write .*bundle: Permission denied"):
        make()
    assert snapshot(tmp_path) == before


LIMITED = """
import json, resource, sys
from pathlib import Path
from chipdeploy.errors import ExportError
from chipdeploy.export.bundle import write_bundle
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bundle(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
except ExportError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(exported, tmp_path):
    """No file may grow beyond a limit: the labels can be written, the network cannot."""
    line = [sys.executable, "-c", LIMITED, tmp_path / "above" / "bundle", exported.path, json.dumps(DATA)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path / 'above' / 'bundle'}: File too large; free the folder")
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file; choose an empty or new folder"):
        make(tmp_path / "file")
    for folder in (tmp_path / "file" / "bundle", Path("/proc/chipdeploy/bundle"), tmp_path / ("x" * 300)):
        with pytest.raises(ExportError, match=r"^cannot write ") as error:
            make(folder)
        assert "\n" not in str(error.value)
    assert files(tmp_path) == {"file"}
