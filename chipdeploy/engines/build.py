"""From an ONNX file to a TensorRT engine file with a manifest beside it; TensorRT-RTX builds without a GPU."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chipdeploy.engines.cuda import this_gpu
from chipdeploy.engines.target import Target
from chipdeploy.engines.trt import (
    INPUT,
    PACKAGES,
    EngineManifest,
    logger,
    manifest_path,
    tensorrt,
)
from chipdeploy.engines.turing import TURING, linear_as_convolution
from chipdeploy.errors import ExportError, MissingError, UsageError
from chipdeploy.files import atomic, digest

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
Built = tuple[bytes, tuple[int, int, int], str]
DEFAULT_BATCHES = (1, 8, 32)
CURRENT = "current"
GRAPH_OPTIMISATION_LEVELS = range(6)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Args:
        batches: smallest, most frequent and largest batch; tactics are chosen for the middle one.
        gpus: compute capabilities to build for, e.g. `sm86`; only TensorRT-RTX builds ahead of time. Empty: this GPU.
        workspace_mb: scratch memory that kernels may take; None leaves it to TensorRT.
        level: 0 (quick build) to 5 (slow build, faster engine); None is TensorRT's own default.
        timing_cache: file that carries kernel timings from build to build on one device; TensorRT only.

    Raises:
        UsageError: batches out of order, or a level or workspace outside its range.
    """

    batches: tuple[int, int, int] = DEFAULT_BATCHES
    gpus: tuple[str, ...] = ()
    workspace_mb: int | None = None
    level: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        low, middle, high = self.batches
        if not 1 <= low <= middle <= high:
            raise UsageError(f"batches are smallest:usual:largest, got {low}:{middle}:{high}; e.g. 1:8:32")
        if self.level is not None and self.level not in GRAPH_OPTIMISATION_LEVELS:
            raise UsageError(f"the optimisation level is 0 to 5, got {self.level}")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise UsageError(f"the workspace is a number of MB from 1 on, got {self.workspace_mb}")


def build_engine(
    onnx: Path,
    path: Path,
    target: Target,
    options: BuildOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> EngineManifest:
    """Build the engine of an ONNX file for a `trt` or `rtx` target and write it, with its manifest, to `path`.

    The precision is the graph's own: networks are strongly typed, and TF32 is off.

    Raises:
        UsageError: `gpus` for a runtime that cannot build ahead, or a GPU that it does not know.
        MissingError: the package is not there, or TensorRT has no GPU to build on.
        ExportError: the parser does not take the graph (node and operator are named), or the build fails. Nothing is
            left behind, and an engine that was at `path` before is untouched.
    """
    options = options or BuildOptions()
    trt = tensorrt(target.runtime)
    _check_gpus(trt, target, options.gpus)
    started = time.monotonic()
    build = _Build(trt, target, options, on_progress)
    content, shape, io_type = build.run(onnx)
    with atomic(path, ExportError) as temporary:
        temporary.write_bytes(content)
    manifest = EngineManifest(
        runtime=PACKAGES[target.runtime],
        runtime_version=str(trt.__version__),
        precision=target.precision,
        gpus=options.gpus or (this_gpu()[0],),
        gpu_name="" if options.gpus else this_gpu()[1],
        input_shape=shape,
        batches=options.batches,
        onnx_sha256=digest(onnx),
        engine_sha256=digest(path),
        bytes=len(content),
        seconds=round(time.monotonic() - started, 3),
        io_type=io_type,
    )
    with atomic(manifest_path(path), ExportError) as temporary:
        temporary.write_text(json.dumps(manifest.to_dict(), indent=1) + "\n", encoding="utf-8")
    return manifest


def buildable_gpus() -> tuple[str, ...]:
    """Compute capabilities for which TensorRT-RTX builds without a GPU, e.g. ('sm75', …).

    Raises:
        MissingError: TensorRT-RTX is not installed.
    """
    members = tensorrt("rtx").ComputeCapability.__members__
    return tuple(sorted((name.lower() for name in members if name.startswith("SM")), key=lambda name: int(name[2:])))


def timing_cache() -> Path:
    """Where kernel timings are kept for the GPU of this machine, below the user's cache folder."""
    import os
    import re

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = re.sub(r"[^a-z0-9]+", "-", " ".join(this_gpu()).lower()) or "none"
    return base / "chipdeploy" / f"timings-{device}.bin"


def check_buildable(runtime: str, gpus: tuple[str, ...]) -> None:
    """Raise what `build_engine` would raise for any network: before a long export, not after it.

    Raises:
        UsageError, MissingError: as `build_engine`.
    """
    _check_gpus(tensorrt(runtime), Target.parse(runtime), gpus)


def _check_gpus(trt: Any, target: Target, gpus: tuple[str, ...]) -> None:
    if gpus and target.runtime != "rtx":
        raise UsageError(f"{target.name} builds on the GPU where it runs; leave --gpu out, or build for rtx")
    known = buildable_gpus() if gpus else ()
    if unknown := [gpu for gpu in gpus if gpu not in known]:
        raise UsageError(f"TensorRT-RTX {trt.__version__} does not build for {unknown[0]}; known: {', '.join(known)}")
    if not gpus and not this_gpu()[0]:
        fix = f"name the GPUs with --gpu, e.g. {','.join(buildable_gpus()[-2:])}" if target.runtime == "rtx" else ""
        raise MissingError(
            f"no GPU is here to build {target.name} on; {fix or 'build it where it runs, or use rtx with --gpu'}"
        )


class _Build:
    """One build. It runs in a thread, so that Ctrl-C reaches Python while TensorRT is at work, and ends it cleanly."""

    def __init__(self, trt: Any, target: Target, options: BuildOptions, on_progress: Progress | None) -> None:
        self._trt, self._target, self._options, self._on_progress = trt, target, options, on_progress
        self._log = logger(target.runtime)
        self._cancelled = threading.Event()
        self._result: Built | None = None
        self._error: BaseException | None = None

    def run(self, onnx: Path) -> Built:
        """The serialized engine, [C, H, W] of its input, and the type of its input."""
        worker = threading.Thread(target=self._guarded, args=(onnx,), name="tensorrt build", daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.1)
        except BaseException:  # Ctrl-C, or a termination: TensorRT stops at its next step
            self._cancelled.set()
            worker.join()
            raise
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _guarded(self, onnx: Path) -> None:
        try:
            self._result = self._build(onnx)
        except BaseException as error:  # raised again in the caller's thread
            self._error = error

    def _build(self, onnx: Path) -> Built:
        trt = self._trt
        self._log.take()
        try:
            builder = trt.Builder(self._log)
        except (TypeError, RuntimeError) as error:  # "pybind11::init(): factory function returned nullptr"
            raise MissingError(f"{PACKAGES[self._target.runtime]} cannot build here: {self._log.take()}") from error
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flags is None else 1 << int(flags))
        self._parse(network, onnx)
        shape = self._input_shape(network, onnx)
        config = self._config(builder, shape)
        monitor = config.progress_monitor = self._monitor()
        serialized = builder.build_serialized_network(network, config)
        del monitor  # TensorRT holds no reference of its own: it must live until here
        if serialized is None:  # failure is no exception in TensorRT
            if self._cancelled.is_set():
                raise ExportError("the build was interrupted")
            raise ExportError(f"{PACKAGES[self._target.runtime]} cannot build {onnx.name}: {self._log.take()}")
        with suppress(OSError, ExportError):  # a help for the next build, no need
            self._keep_timings(config)
        return bytes(serialized), shape, self._io_type(network)

    def _io_type(self, network: Any) -> str:
        types = self._trt.DataType
        return {types.FLOAT: "float32", types.HALF: "float16", types.BF16: "bfloat16"}[network.get_input(0).dtype]

    def _parse(self, network: Any, onnx: Path) -> None:
        parser = self._trt.OnnxParser(network, self._log)
        if self._read(parser, onnx):
            return
        if not parser.num_errors:
            raise ExportError(f"{PACKAGES[self._target.runtime]} cannot read {onnx.name}: {self._log.take()}")
        error = parser.get_error(0)
        raise ExportError(
            f"{PACKAGES[self._target.runtime]} does not take {onnx.name}: "
            f"{error.node_operator() or 'graph'} {error.node_name()!r}: {' '.join(error.desc().split())}"
        )

    def _read(self, parser: Any, onnx: Path) -> bool:
        if TURING in self._options.gpus:
            return bool(parser.parse(linear_as_convolution(onnx)))
        return bool(parser.parse_from_file(str(onnx)))

    def _input_shape(self, network: Any, onnx: Path) -> tuple[int, int, int]:
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        if [tensor.name for tensor in tensors] != [INPUT] or len(tensors[0].shape) != 4:
            names = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors)
            raise ExportError(f"{onnx.name} needs one input {INPUT!r} [batch, C, H, W], got {names}; export it again")
        _, channels, height, width = tensors[0].shape
        return int(channels), int(height), int(width)

    def _config(self, builder: Any, shape: tuple[int, int, int]) -> Any:
        trt, options = self._trt, self._options
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would not be fp32
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector says little without it
        if options.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
        if options.level is not None:
            config.builder_optimization_level = options.level
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *((batch, *shape) for batch in options.batches))
        config.add_optimization_profile(profile)
        if options.gpus:
            config.num_compute_capabilities = len(options.gpus)
            for index, gpu in enumerate(options.gpus):
                config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index)
        self._load_timings(config)
        return config

    def _load_timings(self, config: Any) -> None:
        # RTX would ask for a GPU; it has no timings to keep.
        cache = self._options.timing_cache
        if cache is not None and self._target.runtime == "trt":
            known = cache.read_bytes() if cache.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known), False)  # ignores timings of another device

    def _keep_timings(self, config: Any) -> None:
        cache = self._options.timing_cache
        if cache is not None and self._target.runtime == "trt":
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic(cache, ExportError) as temporary:
                temporary.write_bytes(bytes(config.get_timing_cache().serialize()))

    def _monitor(self) -> Any:
        trt, cancelled, tell = self._trt, self._cancelled, self._on_progress

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
            """Called from TensorRT's threads: it must not raise."""

            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.sizes: dict[str, int] = {}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                self.sizes[phase_name] = num_steps

            def phase_finish(self, phase_name: str) -> None:
                self.sizes.pop(phase_name, None)

            def step_complete(self, phase_name: str, step: int) -> bool:
                if tell is not None:
                    tell(phase_name, step + 1, self.sizes.get(phase_name, step + 1))
                return not cancelled.is_set()

        return Monitor()
