"""TensorRT and TensorRT-RTX: one code for both, and for the versions 10, 11 and RTX 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chipdeploy.engines.base import Images, LayerTime, check_images, check_options, engine
from chipdeploy.engines.cuda import Replay, require_gpu, this_gpu
from chipdeploy.engines.target import Target
from chipdeploy.errors import ExportError, InputError, MissingError, RunError, UsageError
from chipdeploy.files import atomic, digest

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

SCHEMA = 1
PACKAGES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
INPUT, OUTPUT = "images", "logits"  # what export_onnx calls them
CACHE, DIGEST_BYTES = ".cache", 32


@dataclass(frozen=True)
class EngineManifest:
    """What an engine file is; it lies beside the file. An engine is executable code: only our digest protects it.

    Args:
        runtime: `tensorrt` or `tensorrt_rtx`; runtime_version: that built it.
        precision: of the ONNX graph that was built.
        gpus: compute capabilities, e.g. `sm86`; gpu_name: of the device that built it, if one did.
        input_shape: [C, H, W]; batches: smallest, most frequent and largest batch.
        onnx_sha256, engine_sha256: of the two files. bytes: of the engine. seconds: that the build took.
        io_type: of images and logits, `float32`, `float16` or `bfloat16`.
    """

    runtime: str
    runtime_version: str
    precision: str
    gpus: tuple[str, ...]
    gpu_name: str
    input_shape: tuple[int, int, int]
    batches: tuple[int, int, int]
    onnx_sha256: str
    engine_sha256: str
    bytes: int
    seconds: float
    io_type: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"schema": SCHEMA, **facts}

    @classmethod
    def read(cls, engine_file: Path) -> EngineManifest:
        """The manifest beside an engine file, once the file's digest agrees with it.

        Raises:
            ExportError: a file is missing or damaged, or the engine is not the one that was built.
        """
        path = manifest_path(engine_file)
        if not engine_file.is_file() or not path.is_file():
            missing = path if engine_file.is_file() else engine_file
            raise ExportError(f"there is no {missing.name} in {missing.parent}; build the engine first")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            manifest = cls(**facts)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExportError(f"{path.name} is damaged ({error}); build the engine again") from error
        if digest(engine_file) != manifest.engine_sha256:
            raise ExportError(f"{engine_file.name} was edited since it was built; build the engine again")
        return manifest

    def check_batch(self, batch: int, what: str) -> None:
        """Raises InputError for a batch that the engine `what` was not built for."""
        low, _, high = self.batches
        if not low <= batch <= high:
            raise InputError(f"{what} takes batches of {low} to {high}, got {batch}; build it with another --batch")

    def check_gpu(self, gpu: str, what: str) -> None:
        """Raises ExportError where the engine `what` was built for other GPUs than `gpu`, e.g. `sm90`."""
        if gpu not in self.gpus:
            raise ExportError(f"{what} was built for {', '.join(self.gpus)}, this GPU is {gpu}; build it here")


def manifest_path(engine_file: Path) -> Path:
    """`x.engine` ▶ `x.engine.json`."""
    return engine_file.with_name(engine_file.name + ".json")


@cache
def tensorrt(runtime: str) -> Any:
    """The module of `trt` or `rtx`.

    Raises:
        MissingError: the package is not there or does not load.
    """
    name = PACKAGES[runtime]
    try:
        return import_module(name)
    except Exception as error:  # a package that is there may fail in many ways: a library, a driver, a version
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load: {_first(error)}"
        raise MissingError(f"{name} {reason}; run: pip install 'chipdeploy[{runtime}]'") from error


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@cache
def logger(runtime: str) -> Any:
    """The process's one logger: it keeps the errors for our own messages and prints nothing."""
    trt = tensorrt(runtime)

    class Quiet(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

        def take(self) -> str:
            """The first error since the last call, in one line."""
            found, self.errors = self.errors, []
            return " ".join(found[0].split()) if found else "no reason given"

    return Quiet()


class TrtEngine:
    """An engine file in an execution context, with torch tensors as its buffers.

    Args:
        path: the engine; its manifest lies beside it.
        target: a `trt` or `rtx` target; precision and runtime must be the manifest's.
        graph: replay a captured CUDA graph (1) or enqueue anew every time (0).

    Raises:
        MissingError: no GPU, or no TensorRT of that kind.
        ExportError: the engine was edited, was built for another GPU or version, or is of another precision.
    """

    def __init__(self, path: Path, target: Target, *, graph: int = 1) -> None:
        self.manifest = EngineManifest.read(path)
        self.path, self.target, self._graph = path, target, bool(graph)
        expected = (PACKAGES[target.runtime], target.precision)
        if (self.manifest.runtime, self.manifest.precision) != expected:
            raise ExportError(
                f"{path.name} is a {self.manifest.runtime} engine in {self.manifest.precision}, "
                f"asked for {' in '.join(expected)}; build it for {target.name}"
            )
        require_gpu(target.name)
        self.manifest.check_gpu(this_gpu()[0], path.name)
        self._trt, self._log = tensorrt(target.runtime), logger(target.runtime)
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._deserialized()
        self._cache: Any = None
        self._context = self._new_context()
        self._replays: dict[int, Replay] = {}

    @property
    def name(self) -> str:
        return self.target.name

    def run(self, images: Images) -> Images:
        """Images [N, C, H, W] float32 to logits [N, classes] float32.

        Raises:
            InputError: another shape, or a batch outside the range that the engine was built for.
        """
        import torch

        logits: Images = self._replay(images)(torch.from_numpy(images)).numpy()
        return logits

    def stopwatch(self, images: Images) -> Callable[[], float] | None:
        """Seconds between two events around the engine, images on the device."""
        import torch

        return self._replay(images).stopwatch(torch.from_numpy(images))

    def layer_times(self, images: Images, runs: int) -> list[LayerTime]:
        """Mean times of the fused layers, from TensorRT's own profiler, without a graph."""
        trt = self._trt

        class Profiler(trt.IProfiler):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.ms: dict[str, float] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms

        self._check(images)
        context = self._new_context()
        source, result = self._buffers(images, context)
        source.copy_(self._torch().from_numpy(images))
        stream = self._torch().cuda.Stream()
        context.execute_async_v3(stream.cuda_stream)  # the first run loads and chooses kernels
        stream.synchronize()
        profiler = context.profiler = Profiler()
        for _ in range(runs):
            context.execute_async_v3(stream.cuda_stream)
            stream.synchronize()
        del result
        kinds = self._layer_kinds()
        return [LayerTime(name, kinds.get(name, ""), ms / runs) for name, ms in profiler.ms.items()]

    def describe(self) -> dict[str, Any]:
        """The manifest, the GPU and whether graphs are replayed; JSON values only."""
        torch = self._torch()
        return {
            "name": self.name,
            "file": self.path.name,
            "gpu": torch.cuda.get_device_name(),
            "cuda_graph": self._graph,
            "device_memory_bytes": int(self._engine.device_memory_size_v2),
            **self.manifest.to_dict(),
        }

    def _torch(self) -> Any:
        import torch

        return torch

    def _deserialized(self) -> Any:
        content = self.path.read_bytes()
        if self.target.runtime == "rtx":
            validity, reasons = self._runtime.get_engine_validity(content)
            if validity == self._trt.EngineValidity.INVALID:
                raise ExportError(
                    f"{self.path.name} cannot run on this GPU ({reasons}); it was built for "
                    f"{', '.join(self.manifest.gpus)}: build it here, or with --gpu"
                )
        loaded = self._runtime.deserialize_cuda_engine(content)
        if loaded is None:
            raise ExportError(
                f"{self.path.name} does not load ({self._log.take()}); it was built by {self.manifest.runtime} "
                f"{self.manifest.runtime_version} on {self.manifest.gpu_name or ', '.join(self.manifest.gpus)}: "
                "build it here"
            )
        return loaded

    def _new_context(self) -> Any:
        if self.target.runtime != "rtx":
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        # Lazily specialised kernels would be timed as their slower fallbacks at first.
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        config.set_runtime_cache(self._runtime_cache(config))
        return self._engine.create_execution_context(config)

    def _runtime_cache(self, config: Any) -> Any:
        """Kernels that RTX compiled for this GPU, from the last time on: they lie beside the engine."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            path = self.path.with_name(self.path.name + CACHE)
            content = path.read_bytes() if path.is_file() else b""
            key, kernels = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            # Kernels are code: those of another engine, or damaged ones, are compiled anew.
            if key == self._cache_key(kernels):
                self._cache.deserialize(kernels)
        return self._cache

    def _keep_runtime_cache(self) -> None:
        if self._cache is None:
            return
        kernels = bytes(self._cache.serialize())
        with suppress(RunError), atomic(self.path.with_name(self.path.name + CACHE)) as temporary:  # a help, no need
            temporary.write_bytes(self._cache_key(kernels) + kernels)

    def _cache_key(self, kernels: bytes) -> bytes:
        return hashlib.sha256(self.manifest.engine_sha256.encode() + kernels).digest()

    def _check(self, images: Images) -> None:
        check_images(self.path.name, images, ("batch", *self.manifest.input_shape))
        self.manifest.check_batch(len(images), self.path.name)

    def _replay(self, images: Images) -> Replay:
        """The work for one batch size; captured anew where the size is new."""
        self._check(images)
        if len(images) not in self._replays:
            torch, context = self._torch(), self._new_context()  # a context is bound to one shape and its addresses
            source, result = self._buffers(images, context)

            def enqueue() -> Tensor:
                context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
                return result

            self._replays[len(images)] = Replay(enqueue, source, graph=self._graph)
            self._keep_runtime_cache()
        return self._replays[len(images)]

    def _buffers(self, images: Images, context: Any) -> tuple[Tensor, Tensor]:
        """Device tensors for input and output, bound to `context` by name."""
        torch = self._torch()
        for name, mode in ((INPUT, "INPUT"), (OUTPUT, "OUTPUT")):
            if self._engine.get_tensor_mode(name) != getattr(self._trt.TensorIOMode, mode):
                known = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
                raise ExportError(f"{self.path.name} has no {mode.lower()} {name!r}, only {', '.join(known)}")
        context.set_input_shape(INPUT, tuple(images.shape))
        source = torch.empty(images.shape, dtype=self._type(INPUT), device="cuda")
        result = torch.empty(tuple(context.get_tensor_shape(OUTPUT)), dtype=self._type(OUTPUT), device="cuda")
        context.set_tensor_address(INPUT, source.data_ptr())
        context.set_tensor_address(OUTPUT, result.data_ptr())
        return source, result

    def _type(self, name: str) -> dtype:
        torch, types = self._torch(), self._trt.DataType
        known: dict[Any, dtype] = {
            types.FLOAT: torch.float32,
            types.HALF: torch.float16,
            types.BF16: torch.bfloat16,
        }
        return known[self._engine.get_tensor_dtype(name)]

    def _layer_kinds(self) -> dict[str, str]:
        """Layer name ▶ kind, from the inspector's JSON; its keys differ between versions."""
        inspector = self._engine.create_engine_inspector()
        raw = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        layers = [layer for layer in json.loads(raw).get("Layers", []) if isinstance(layer, dict)]
        return {str(layer.get("Name")): str(layer.get("LayerType", layer.get("Type", ""))) for layer in layers}


@engine("trt")
def open_trt(artifact: Path | nn.Module, target: Target, /, **options: int) -> TrtEngine:
    """Open a TensorRT engine file; the only option is `graph` (default 1)."""
    check_options(target, options, ("graph", "threads"))
    if not isinstance(artifact, Path):
        raise UsageError(f"{target.name} runs an engine file, got a {type(artifact).__name__}; build it first")
    return TrtEngine(artifact, target, graph=options.get("graph", 1))


engine("rtx")(open_trt)


# Every attribute that is used of TensorRT's classes, and in which of the packages it must exist: the versions differ,
# and a test holds this table against the real bindings of all three.
ALL, TRT_ONLY, RTX_ONLY = ("trt", "rtx"), ("trt",), ("rtx",)
TRT_API: dict[str, dict[str, tuple[str, ...]]] = {
    "ILogger": {"Severity": ALL, "log": ALL},
    "Builder": {
        "create_network": ALL,
        "create_builder_config": ALL,
        "create_optimization_profile": ALL,
        "build_serialized_network": ALL,
    },
    "IBuilderConfig": {
        "add_optimization_profile": ALL,
        "set_memory_pool_limit": ALL,
        "builder_optimization_level": ALL,
        "progress_monitor": ALL,
        "profiling_verbosity": ALL,
        "clear_flag": ALL,
        "create_timing_cache": TRT_ONLY,
        "set_timing_cache": TRT_ONLY,
        "get_timing_cache": TRT_ONLY,
        "num_compute_capabilities": RTX_ONLY,
        "set_compute_capability": RTX_ONLY,
    },
    "IOptimizationProfile": {"set_shape": ALL},
    "INetworkDefinition": {"num_inputs": ALL, "get_input": ALL},
    "ITensor": {"name": ALL, "shape": ALL, "dtype": ALL},
    "OnnxParser": {"parse_from_file": ALL, "parse": RTX_ONLY, "num_errors": ALL, "get_error": ALL},
    "ParserError": {"desc": ALL, "node_name": ALL, "node_operator": ALL},
    "ITimingCache": {"serialize": TRT_ONLY},
    "IProgressMonitor": {"phase_start": ALL, "phase_finish": ALL, "step_complete": ALL},
    "Runtime": {"deserialize_cuda_engine": ALL, "get_engine_validity": RTX_ONLY},
    "ICudaEngine": {
        "create_execution_context": ALL,
        "create_runtime_config": RTX_ONLY,
        "create_engine_inspector": ALL,
        "device_memory_size_v2": ALL,
        "get_tensor_mode": ALL,
        "get_tensor_name": ALL,
        "get_tensor_dtype": ALL,
        "num_io_tensors": ALL,
    },
    "IExecutionContext": {
        "execute_async_v3": ALL,
        "set_input_shape": ALL,
        "set_tensor_address": ALL,
        "get_tensor_shape": ALL,
        "profiler": ALL,
    },
    "ComputeCapability": {"__members__": RTX_ONLY},
    "EngineValidity": {"INVALID": RTX_ONLY},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER": RTX_ONLY},
    "IRuntimeConfig": {
        "dynamic_shapes_kernel_specialization_strategy": RTX_ONLY,
        "create_runtime_cache": RTX_ONLY,
        "set_runtime_cache": RTX_ONLY,
    },
    "IRuntimeCache": {"serialize": RTX_ONLY, "deserialize": RTX_ONLY},
    "IProfiler": {"report_layer_time": ALL},
    "EngineInspector": {"get_engine_information": ALL},
}
