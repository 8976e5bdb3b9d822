"""torch itself as an engine: eager, a replayed CUDA graph, or compiled by inductor; on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chipdeploy.engines.base import Images, LayerTime, check_images, check_options, check_threads, engine
from chipdeploy.engines.cuda import Replay, require_gpu
from chipdeploy.engines.target import CPU, Target
from chipdeploy.errors import MissingError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class TorchEngine:
    """A module in eval mode, channels last, in the target's precision; a copy, the caller's module stays as it is.

    Args:
        model: takes images [N, C, H, W].
        target: a `torch` target. fp32 is fp32: TF32 is off.
        threads: of the CPU; torch has one number for the whole process.

    Raises:
        UsageError: fewer than 1 thread.
        MissingError: no GPU, or no compiler for inductor.
    """

    def __init__(self, model: nn.Module, target: Target, *, threads: int = 1) -> None:
        import torch

        from chipdeploy.copying import copied, in_mode

        check_threads(threads)
        if target.on_gpu:
            require_gpu(target.name)
        self.target, self.threads = target, threads
        self._type = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[target.precision]
        network = in_mode(copied(model).to(target.device, self._type))
        self._network: Callable[[Tensor], Tensor] = network.to(memory_format=torch.channels_last)
        if target.mode == "compile":
            self._network = torch.compile(self._network, mode="max-autotune-no-cudagraphs" if target.on_gpu else None)
        self._replays: dict[tuple[int, ...], Replay] = {}

    @property
    def name(self) -> str:
        return self.target.name

    def run(self, images: Images) -> Images:
        """Images [N, C, H, W] float32 to logits [N, classes] float32.

        Raises:
            InputError: images of another type.
        """
        import torch

        check_images(self.name, images, ("batch", "channels", "height", "width"))
        values = torch.from_numpy(images)
        if self.target.on_gpu:
            logits: Images = self._replay(values)(values).numpy()
            return logits
        with self._settings():
            output: Images = self._network(self._placed(values)).float().numpy()
        return output

    def stopwatch(self, images: Images) -> Callable[[], float] | None:
        """On CUDA: seconds between two events around the network, images on the device."""
        import torch

        if not self.target.on_gpu:
            return None
        values = torch.from_numpy(images)
        return self._replay(values).stopwatch(values)

    def layer_times(self, images: Images, runs: int) -> list[LayerTime]:
        """torch tells ops, not layers.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.name} does not tell the times of layers; use an ort or trt target")

    def describe(self) -> dict[str, Any]:
        """Version, precision, mode, threads; JSON values only."""
        import torch

        facts: dict[str, Any] = {"name": self.name, "torch": torch.__version__, "mode": self.target.mode, "tf32": False}
        if self.target.on_gpu:
            return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        return facts | {"threads": self.threads}

    def _placed(self, values: Tensor) -> Tensor:
        import torch

        return values.to(self.target.device, self._type).contiguous(memory_format=torch.channels_last)

    def _replay(self, values: Tensor) -> Replay:
        """The work for one shape; captured anew where the shape is new."""
        key = tuple(values.shape)
        if key not in self._replays:
            source = self._placed(values)
            with self._settings():
                self._replays[key] = Replay(lambda: self._forward(source), source, graph=self.target.mode != "eager")
        return self._replays[key]

    def _forward(self, source: Tensor) -> Tensor:
        with self._settings():
            return self._network(source)

    def _settings(self) -> _Settings:
        return _Settings(self.threads if self.target.device == CPU else None)


class _Settings:
    """Inference mode with the engine's own threads and without TF32; the process gets its own settings back."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
        if self._threads is not None and self._threads != self._before[0]:
            torch.set_num_threads(self._threads)
        torch.backends.cudnn.allow_tf32 = False
        self._mode = torch.inference_mode()
        self._mode.__enter__()

    def __exit__(self, *error: object) -> None:
        import torch

        self._mode.__exit__(None, None, None)
        threads, torch.backends.cudnn.allow_tf32 = self._before
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@engine("torch")
def open_torch(artifact: Path | nn.Module, target: Target, /, **options: int) -> TorchEngine:
    """Make an engine of a module; the only option is `threads` (default 1)."""
    check_options(target, options, ("threads",))
    if isinstance(artifact, Path):
        raise UsageError(f"{target.name} runs a torch module, got the file {artifact.name}; use an ort target for it")
    if target.mode == "compile":
        _check_compiler()
    return TorchEngine(artifact, target, **options)


def _check_compiler() -> None:
    import shutil

    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise MissingError("torch.compile needs a C++ compiler and none is here; install g++, or leave -compile out")
