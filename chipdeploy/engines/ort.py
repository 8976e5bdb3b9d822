"""ONNX Runtime on the CPU and on CUDA, set up so that its times mean something."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from chipdeploy.engines.base import Images, LayerTime, check_images, check_options, check_threads, engine
from chipdeploy.engines.cuda import current_gpu
from chipdeploy.engines.target import CPU, Target
from chipdeploy.errors import ExportError, MissingError, UsageError

if TYPE_CHECKING:
    from torch import nn

ERRORS_ONLY = 3  # ONNX Runtime's severities: 2 warning, 3 error, 4 fatal
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
EXTRAS = {CPU_PROVIDER: "cpu", CUDA_PROVIDER: "gpu"}
# In the metadata of a file that only runs right with a session of this entry, `key=value`.
ENTRY = "chipdeploy.onnxruntime"
GRAPH_RUNS = 3  # the first ones allocate, then one is captured
# TF32 is ONNX Runtime's default: an fp32 baseline would have 10 bits of mantissa.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}


class OrtEngine:
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: the ONNX file; one input of images, one output of logits.
        target: an `ort` target; its precision is the file's own and is only carried along.
        threads: intra-op threads. Nothing else may run beside them: inter-op is 1, execution is sequential.

    Raises:
        UsageError: fewer than 1 thread.
        MissingError: ONNX Runtime is absent, installed twice, or gave another execution provider.
        ExportError: the file is missing, damaged, or has more than one input or output.
    """

    def __init__(self, path: Path, target: Target | None = None, *, threads: int = 1) -> None:
        check_threads(threads)
        self.path = path
        self.threads = threads
        self.target = target or Target("ort", CPU)
        self._provider = CPU_PROVIDER if self.target.device == CPU else CUDA_PROVIDER
        self._session = open_session(path, threads, self._provider)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ExportError(f"{path.name} takes {len(inputs)} inputs; export a network that takes images only")
        outputs = self._session.get_outputs()
        if len(outputs) != 1:
            raise ExportError(f"{path.name} gives {len(outputs)} outputs; an engine runs networks that give one")
        self._input: str = inputs[0].name
        self._output: str = outputs[0].name
        self.input_shape: tuple[int | str, ...] = tuple(inputs[0].shape)
        self._graphed: tuple[Any, Any] | None = None

    @property
    def name(self) -> str:
        return self.target.name

    def run(self, images: Images) -> Images:
        """Images [N, C, H, W] float32 to logits [N, classes] float32.

        Raises:
            InputError: images of another type or shape than the network takes.
        """
        check_images(self.path.name, images, self.input_shape)
        logits: Images = self._session.run([self._output], {self._input: images})[0]
        return logits

    def stopwatch(self, images: Images) -> Callable[[], float] | None:
        """On CUDA: images and logits stay on the device; from the call to the end of the work, without copies."""
        if self._provider == CPU_PROVIDER:
            return None
        check_images(self.path.name, images, self.input_shape)
        # A session that replays a graph takes nothing but bound buffers, so it is not the one of `run`.
        self._graphed = self._with_graph(images)
        session, binding = self._graphed or (self._session, self._bound(self._session, images))

        def once() -> float:
            before = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return time.perf_counter() - before

        return once

    def _bound(self, session: Any, images: Images) -> Any:
        """Images and logits in fixed places of the device's memory."""
        import numpy as np
        import onnxruntime as ort

        binding, gpu = session.io_binding(), current_gpu()
        binding.bind_ortvalue_input(self._input, ort.OrtValue.ortvalue_from_numpy(images, "cuda", gpu))
        shape = (len(images), *session.get_outputs()[0].shape[1:])
        binding.bind_ortvalue_output(
            self._output, ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", gpu)
        )
        return binding

    def _with_graph(self, images: Images) -> tuple[Any, Any] | None:
        """A session that replays a CUDA graph, with its buffers; None where the network cannot be captured."""
        try:
            session = open_session(self.path, self.threads, self._provider, graph=True)
            binding = self._bound(session, images)
            for _ in range(GRAPH_RUNS):
                session.run_with_iobinding(binding)
        except Exception:  # a node on the CPU, an op that allocates: ONNX Runtime has many reasons and no base class
            return None
        return session, binding

    def layer_times(self, images: Images, runs: int) -> list[LayerTime]:
        """Median kernel times of the nodes, from ONNX Runtime's own profile of `runs` inferences after three others."""
        check_images(self.path.name, images, self.input_shape)
        warm_up = 3
        with tempfile.TemporaryDirectory() as folder:
            session = open_session(self.path, self.threads, self._provider, profile=Path(folder) / "profile")
            for _ in range(warm_up + runs):
                session.run([self._output], {self._input: images})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _median_times(events, warm_up)

    def describe(self) -> dict[str, Any]:
        """Runtime, version, provider, threads and shapes; JSON values only."""
        import onnxruntime

        facts: dict[str, Any] = {
            "name": self.name,
            "file": self.path.name,
            "onnxruntime": onnxruntime.__version__,
            "providers": list(self._session.get_providers()),
            "threads": self.threads,
            "spinning": False,
            "input": list(self.input_shape),
        }
        if self._provider == CUDA_PROVIDER:
            facts |= {"tf32": False, "cuda_graph": self._graphed is not None}
        return facts


def _median_times(events: list[Mapping[str, Any]], warm_up: int) -> list[LayerTime]:
    """Of every node, the median over all runs but the first `warm_up`, in the order of the first run."""
    found: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = name.removesuffix("_kernel_time"), str(event.get("args", {}).get("op_name", ""))
            found.setdefault(key, []).append(float(event["dur"]) / 1e3)  # microseconds
    return [LayerTime(name, kind, median(times[warm_up:] or times)) for (name, kind), times in found.items()]


@engine("ort")
def open_ort(artifact: Path | nn.Module, target: Target, /, **options: int) -> OrtEngine:
    """Open an ONNX file in ONNX Runtime; the only option is `threads` (default 1)."""
    check_options(target, options, ("threads",))
    if not isinstance(artifact, Path):
        raise UsageError(f"{target.name} runs an ONNX file, got a {type(artifact).__name__}; export it first")
    return OrtEngine(artifact, target, **options)


def open_session(path: Path, threads: int, provider: str, *, profile: Path | None = None, graph: bool = False) -> Any:
    """An `onnxruntime.InferenceSession` that runs on `provider` and nowhere else."""
    check_installed()
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingError(
            f"onnxruntime is not installed; run: pip install 'chipdeploy[{EXTRAS[provider]}]'"
        ) from error
    if not path.is_file():
        raise ExportError(f"there is no ONNX file {path.name!r} in {path.parent}; export the network first")
    if provider not in ort.get_available_providers():
        raise MissingError(
            f"this ONNX Runtime has no {provider}; run: pip uninstall -y onnxruntime && pip install 'chipdeploy[gpu]'"
        )
    if provider == CUDA_PROVIDER:
        ort.preload_dlls()  # CUDA and cuDNN from pip's packages, where they are not the system's
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = ERRORS_ONLY
    # Threads that spin while they wait steal the cores of whatever else runs: times then depend on the neighbours.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    wanted: list[Any] = [provider]
    if provider == CUDA_PROVIDER:
        place = {"device_id": str(current_gpu()), "enable_cuda_graph": str(int(graph))}
        wanted = [(provider, CUDA_OPTIONS | place)]
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=wanted)
        if entry := session.get_modelmeta().custom_metadata_map.get(ENTRY):
            options.add_session_config_entry(*entry.split("="))
            session = ort.InferenceSession(str(path), sess_options=options, providers=wanted)
    except Exception as error:  # ONNX Runtime's errors share no base class.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"{path.name} is not a network that ONNX Runtime can load: {reason}; export again") from error
    # ONNX Runtime falls back to another provider without a word. The CPU's own stands behind CUDA in any case.
    if (got := session.get_providers())[0] != provider:
        raise MissingError(
            f"asked ONNX Runtime for {provider}, got {', '.join(got)}; see 'chipdeploy doctor' for what is missing"
        )
    return session


def check_installed() -> None:
    """Refuse the two distributions of ONNX Runtime side by side: they unpack into the same folder.

    Raises:
        MissingError: both are there.
    """
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise MissingError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'chipdeploy[cpu]' (or [gpu] on a GPU)"
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
