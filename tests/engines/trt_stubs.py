"""Loads TensorRT's real Python bindings without TensorRT: its libraries are stood in for by empty functions.

Run in a process of its own, `python trt_stubs.py WANTED` prints the names that a binding has, as JSON. WANTED is the
path of a folder of unpacked bindings, or the name of a module that is installed with its own libraries.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

# All C functions that the bindings 10 and 11 link to. A version that links to more says which one when it is loaded.
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def compiler():
    """Path of a C compiler, None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def load(folder):
    """The module of the bindings in `folder`, whose name is their major version. Every library call returns null."""
    with tempfile.TemporaryDirectory() as build:
        source = Path(build) / "stubs.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS), encoding="utf-8")
        for library in LIBRARIES:
            name = f"lib{library}.so.{folder.name}"
            command = [compiler(), "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", f"{build}/{name}", str(source)]
            subprocess.run(command, check=True)
            # The loader takes a library that is loaded already for one of the same soname.
            ctypes.CDLL(f"{build}/{name}", mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    return import_module("tensorrt_bindings")


def surface(module):
    """The version, and the attributes of every public name and of the classes inside it (`ILogger.Severity`)."""
    public = ["__version__", *(name for name in dir(module) if not name.startswith("_"))]
    names = {name: dir(getattr(module, name)) for name in public}
    for outer in [name for name in names if isinstance(getattr(module, name), type)]:
        for name in names[outer]:
            inner = getattr(getattr(module, outer), name)
            if isinstance(inner, type) and not name.startswith("_"):
                names[f"{outer}.{name}"] = dir(inner)
    return {"version": module.__version__, "names": names}


if __name__ == "__main__":
    wanted = sys.argv[1]
    print(json.dumps(surface(load(Path(wanted)) if os.sep in wanted else import_module(wanted))))
