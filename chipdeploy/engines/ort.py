"""ONNX Runtime on the CPU, set up so that its times mean something."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from chipdeploy.engines.base import Images, engine
from chipdeploy.errors import ExportError, InputError, MissingError, UsageError

ERRORS_ONLY = 3  # ONNX Runtime's severities: 2 warning, 3 error, 4 fatal
PROVIDER = "CPUExecutionProvider"


class OrtEngine:
    """An ONNX file in an ONNX Runtime session on the CPU.

    Args:
        path: the ONNX file; one input of images, the first output is the logits.
        threads: intra-op threads. Nothing else may run beside them: inter-op is 1, execution is sequential.

    Raises:
        UsageError: fewer than 1 thread.
        MissingError: ONNX Runtime is absent, installed twice, or gave another execution provider.
        ExportError: the file is missing, damaged, or has more than one input.
    """

    name = "ort-cpu"

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self.path = path
        self.threads = threads
        self._session = _session(path, threads)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ExportError(f"{path.name} takes {len(inputs)} inputs; export a network that takes images only")
        self._input: str = inputs[0].name
        # A number is a fixed size, a string a free one.
        self.input_shape: tuple[int | str, ...] = tuple(inputs[0].shape)

    def run(self, images: Images) -> Images:
        """Images [N, C, H, W] float32 to logits [N, classes] float32.

        Raises:
            InputError: images of another type or shape than the network takes.
        """
        self._check(images)
        logits: Images = self._session.run(None, {self._input: images})[0]
        return logits

    def describe(self) -> dict[str, object]:
        """Runtime, version, provider, threads and shapes; JSON values only."""
        import onnxruntime

        return {
            "name": self.name,
            "file": self.path.name,
            "onnxruntime": onnxruntime.__version__,
            "providers": list(self._session.get_providers()),
            "threads": self.threads,
            "spinning": False,
            "input": list(self.input_shape),
        }

    def _check(self, images: Images) -> None:
        if images.dtype != np.float32:
            raise InputError(f"{self.path.name} takes float32 images, got {images.dtype}; use images.astype('float32')")
        fits = len(images.shape) == len(self.input_shape) and all(
            got == wanted if isinstance(wanted, int) else got >= 1
            for got, wanted in zip(images.shape, self.input_shape, strict=True)
        )
        if not fits:
            wanted, got = (" x ".join(map(str, shape)) for shape in (self.input_shape, images.shape))
            raise InputError(f"{self.path.name} takes images of {wanted}, got {got}; resize the images")


@engine("ort-cpu")
def open_ort_cpu(path: Path, /, **options: int) -> OrtEngine:
    """Open `path` in ONNX Runtime on the CPU; the only option is `threads` (default 1)."""
    unknown = sorted(options.keys() - {"threads"})
    if unknown:
        raise UsageError(f"ort-cpu has no option {', '.join(unknown)}; known: threads")
    return OrtEngine(path, **options)


def _session(path: Path, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` that runs on the CPU provider and nowhere else."""
    _check_installed()
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingError("onnxruntime is not installed; run: pip install 'chipdeploy[cpu]'") from error
    if not path.is_file():
        raise ExportError(f"there is no ONNX file {path.name!r} in {path.parent}; export the network first")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = ERRORS_ONLY
    # Threads that spin while they wait steal the cores of whatever else runs: times then depend on the neighbours.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's errors share no base class.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"{path.name} is not a network that ONNX Runtime can load: {reason}; export again") from error
    if (got := session.get_providers()) != [PROVIDER]:
        # ONNX Runtime falls back to another provider without a word.
        raise MissingError(f"asked ONNX Runtime for {PROVIDER}, got {', '.join(got)}; reinstall onnxruntime")
    return session


def _check_installed() -> None:
    """Refuse the two distributions of ONNX Runtime side by side: they unpack into the same folder."""
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise MissingError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'chipdeploy[cpu]'"
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
