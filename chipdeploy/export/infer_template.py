"""Classify images with the network beside this file; needs onnxruntime and numpy, nothing else.

python infer.py IMAGES...: .npy, .npz (its only array, or `images`) or raw bytes: uint8 [N, H, W, C], or one [H, W, C].
Image files (.jpg, .png, ...) are not decoded here.
From Python: `from infer import classify`; `classify(images)` gives the number of each image's class.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
PROVIDERS = ["CPUExecutionProvider"]
ERRORS_ONLY = 3  # the warnings of ONNX Runtime are for whoever exports
ENCODED = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@cache
def load() -> tuple[dict[str, Any], Any]:
    """The manifest with the labels, and a session of model.onnx."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    labels = content("labels.txt", manifest).decode().splitlines()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    network = content("model.onnx", manifest)
    session = onnxruntime.InferenceSession(network, settings, providers=PROVIDERS)
    if entry := session.get_modelmeta().custom_metadata_map.get("chipdeploy.onnxruntime"):
        settings.add_session_config_entry(*entry.split("="))
        session = onnxruntime.InferenceSession(network, settings, providers=PROVIDERS)
    return manifest | {"labels": labels}, session


def content(name: str, manifest: dict[str, Any]) -> bytes:
    """The bytes of a file beside this one, once their digest agrees with the manifest."""
    if not (HERE / name).is_file():
        raise ValueError(f"{name} is missing beside infer.py; copy the bundle again")
    found = (HERE / name).read_bytes()
    if hashlib.sha256(found).hexdigest() != manifest["files"][name]["sha256"]:
        raise ValueError(f"{name} is not the file of manifest.json (sha256 differs); copy the bundle again")
    return found


def predict(images: Any) -> tuple[Any, Any]:
    """uint8 [N, H, W, C] to class numbers and probabilities [N, K], the best first; K is the graph's, or all."""
    manifest, session = load()
    pixels, step = checked(np.asarray(images), manifest["images"]["shape"][1:]), manifest["max_batch"]
    parts = [prepared(pixels[start : start + step], manifest) for start in range(0, len(pixels), step)]
    outputs = [session.run(None, {manifest["input"]["name"]: part}) for part in parts]
    first, *rest = (np.concatenate(values) for values in zip(*outputs, strict=True))
    if rest:  # the graph ranks the classes itself
        return rest[0], first
    logits = first.astype(np.float32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")
    return order, np.take_along_axis(powers / powers.sum(axis=1, keepdims=True), order, axis=1)


def classify(images: Any) -> Any:
    """uint8 [N, H, W, C] to int64 [N]."""
    return predict(images)[0][:, 0]


def checked(images: Any, size: list[int]) -> Any:
    """Images as [N, H, W, C]; the channel may be left out where there is one, N where there is one image."""
    usable = images.dtype == np.uint8 and images.size > 0
    for tail in (size, size[:2]) if size[2] == 1 else (size,):
        if usable and list(images.shape[-len(tail) :]) == tail and images.ndim - len(tail) <= 1:
            return images.reshape(-1, *size)
    raise ValueError(f"needs uint8 images [N, {', '.join(map(str, size))}], got {images.dtype} {list(images.shape)}")


def prepared(pixels: Any, manifest: dict[str, Any]) -> Any:
    """What the graph takes: the bytes, or normalised images [N, C, H, W]."""
    if manifest["input"]["dtype"] == "uint8":
        return pixels
    mean, std = (np.array(manifest["images"][key]) for key in ("mean", "std"))
    values = pixels * (1 / (255 * std)).astype(np.float32) + (-mean / std).astype(np.float32)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)).astype(manifest["input"]["dtype"])


def read(path: Path) -> Any:
    """The array of a file."""
    size = load()[0]["images"]["shape"][1:]
    shape = " x ".join(map(str, size))
    if path.suffix.lower() in ENCODED:
        raise ValueError(f"image files are not decoded here; give its pixels, {shape}, as uint8 .npy")
    if path.suffix not in (".npy", ".npz"):
        found = np.fromfile(path, np.uint8)
        if found.size % np.prod(size):
            raise ValueError(f"holds {found.size} bytes, an image has {np.prod(size)}; give raw uint8 pixels, {shape}")
        return found.reshape(-1, *size)
    found = np.load(path)
    return found if path.suffix == ".npy" else found[found.files[0] if len(found.files) == 1 else "images"]


def main() -> None:
    """One line an image: file and number, then label and probability of the best classes, between tabs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES")
    parser.add_argument("--top", type=int, default=5, help="classes an image")
    options = parser.parse_args()
    if options.top < 1:
        parser.error(f"--top is a number from 1 on, got {options.top}")
    try:
        labels = load()[0]["labels"]
    except Exception as error:  # whatever it is, its reader wants one line
        sys.exit(f"error: the bundle cannot be loaded: {' '.join(str(error).split())}")
    for path in options.images:
        try:
            classes, shares = predict(read(path))
        except Exception as error:
            sys.exit(f"error: {path}: {' '.join(str(error).split())}")
        for number, (best, share) in enumerate(zip(classes, shares, strict=True)):
            found = [f"{labels[k]} {p:.4f}" for k, p in list(zip(best, share, strict=True))[: options.top]]
            print(f"{path}[{number}]", *found, sep="\t")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
