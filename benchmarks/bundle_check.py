#!/usr/bin/env python3
"""A bundle in a clean environment, of onnxruntime and numpy only, against its network in torch.

    bundle_check.py --bundle DIR --data npz:cifar10.npz --run runs/... --out results/bundle-check.json

The first test images are classified by the bundle's infer.py in a new virtual environment, as a program and by import.
For a network that is no run's: --model resnet20 --weights FILE in place of --run. Exits with 5 where a class differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from chipdeploy.latency.environment import environment
from chipdeploy.result import load
from chipdeploy.run import read_json, write_json
from chipdeploy.training.models import build_model
from chipdeploy.training.splits import Normaliser
from chipdeploy.training.weights import load_weights

PACKAGES = ("onnxruntime", "numpy")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
BY_IMPORT = (
    "import sys; sys.path.insert(0, '.'); import numpy; from infer import classify; "
    "numpy.save(sys.argv[2], classify(numpy.load(sys.argv[1])))"
)
DIFFERS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", required=True, help="npz:FILE with x_test and y_test")
    parser.add_argument("--run", type=Path, help="the run whose network the bundle holds")
    parser.add_argument("--dense", action="store_true", help="it holds the run's dense network")
    parser.add_argument("--model", help="built-in or FILE.py:FACTORY, with --weights")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if (options.run is None) == (options.model is None or options.weights is None):
        parser.error("give --run, or --model and --weights")
    with np.load(options.data.removeprefix("npz:")) as arrays:
        images, labels = arrays["x_test"][: options.images], arrays["y_test"][: options.images]
    manifest = read_json(options.bundle / "manifest.json")
    expected = in_torch(network(options, manifest), images, manifest)
    program, imported, packages = in_clean_environment(options.bundle, images)
    facts: dict[str, Any] = {
        "schema": 1,
        "environment": environment(),
        "packages": packages,
        "bundle": {key: manifest[key] for key in ("name", "input", "outputs", "preprocess", "top_k", "onnx_sha256")},
        "images": len(images),
        "accuracy": {"torch": float(np.mean(expected == labels)), "bundle": float(np.mean(program == labels))},
        "same_top1": {"program": int((program == expected).sum()), "import": int((imported == expected).sum())},
    }
    write_json(options.out, facts)
    print(f"packages: {', '.join(packages)}")
    print(f"same top-1 as torch on {facts['same_top1']['program']} of {len(images)} images", end="")
    print(f" (imported: {facts['same_top1']['import']}); accuracy {facts['accuracy']['bundle']:.2%}")
    if min(facts["same_top1"].values()) < len(images):
        sys.exit(DIFFERS)


def network(options: argparse.Namespace, manifest: dict[str, Any]) -> nn.Module:
    """The network of the run, or the one of the given weights, in eval mode."""
    if options.run is not None:
        return load(options.run, dense=options.dense)
    _, height, _, channels = manifest["images"]["shape"]
    model = build_model(options.model, num_classes=manifest["classes"], in_channels=channels, image_size=height)
    load_weights(model, options.weights)
    return model.eval()


def in_torch(model: nn.Module, images: NDArray[np.uint8], manifest: dict[str, Any]) -> NDArray[np.int64]:
    """Top-1 [N] of uint8 images [N, H, W, C], normalised as in training."""
    normalise = Normaliser(manifest["images"]["mean"], manifest["images"]["std"])
    pixels = torch.from_numpy(images.reshape(-1, *manifest["images"]["shape"][1:]))
    with torch.inference_mode():
        parts = [model(normalise(part)).argmax(1) for part in torch.split(pixels, 100)]
    classes: NDArray[np.int64] = torch.cat(parts).numpy()
    return classes


def in_clean_environment(
    bundle: Path, images: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Top-1 [N] by infer.py as a program and by import, and the packages that were there."""
    labels = (bundle / "labels.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "-c", str(CONSTRAINTS), *PACKAGES], check=True)
        packages = json.loads(subprocess.check_output([*pip, "list", "--format", "json"]))
        source, target = folder / "images.npy", folder / "classes.npy"
        np.save(source, images)
        isolated = [python, "-I", "-B"]
        lines = subprocess.check_output([*isolated, "infer.py", "--top", "1", str(source)], cwd=bundle, text=True)
        subprocess.run([*isolated, "-c", BY_IMPORT, str(source), str(target)], cwd=bundle, check=True)
        found = [line.split("\t")[1].rpartition(" ")[0] for line in lines.splitlines()]
        program = np.array([labels.index(label) for label in found], dtype=np.int64)
        return program, np.load(target), [f"{package['name']} {package['version']}" for package in packages]


if __name__ == "__main__":
    main()
