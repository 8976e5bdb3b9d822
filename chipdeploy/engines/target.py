"""Targets: the runtime, device and precision in which a network is to run, by one name such as `trt-fp16`."""

from __future__ import annotations

from dataclasses import dataclass

from chipdeploy.errors import UsageError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
CPU, CUDA = "cpu", "cuda"
# Devices of every runtime, the default first.
RUNTIMES = {"ort": (CPU, CUDA), "torch": (CPU, CUDA), "trt": (CUDA,), "rtx": (CUDA,)}
TENSORRT = ("trt", "rtx")
MODES = ("eager", "graph", "compile")  # of torch: op by op, a replayed CUDA graph, inductor


@dataclass(frozen=True)
class Target:
    """Where a network runs. `mode` is torch's own, empty for the others."""

    runtime: str
    device: str
    precision: str = "fp32"
    mode: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """RUNTIME[-DEVICE][-PRECISION][-MODE], e.g. `ort-cpu`, `trt-fp16`, `torch-cuda-fp16-compile`.

        Raises:
            UsageError: a part that is unknown, given twice, or that the runtime does not have.
        """
        runtime, *parts = text.strip().split("-")
        if runtime not in RUNTIMES:
            raise UsageError(
                f"unknown target {text!r}; a target begins with {', '.join(RUNTIMES)}, e.g. ort-cpu or trt-fp16"
            )
        found: dict[str, str] = {}
        for part in parts:
            kind = _kind(part, runtime)
            if not kind or kind in found:
                raise UsageError(
                    f"target {text!r}: {part!r} is {'one too many' if kind else 'unknown'}; "
                    f"{runtime} has the devices {', '.join(RUNTIMES[runtime])}, the precisions {', '.join(PRECISIONS)}"
                    + (f", the modes {', '.join(MODES)}" if runtime == "torch" else "")
                )
            found[kind] = part
        device = found.get("device", RUNTIMES[runtime][0])
        if runtime != "torch":
            return cls(runtime, device, found.get("precision", "fp32"))
        return cls._torch(text, device, found)

    @classmethod
    def _torch(cls, text: str, device: str, found: dict[str, str]) -> Target:
        mode = found.get("mode", "graph" if device == CUDA else "eager")
        precision = found.get("precision", "fp32")
        if mode == "graph" and device == CPU:
            raise UsageError(f"target {text!r}: only a GPU replays graphs; use torch-cpu or torch-cpu-compile")
        if precision in ("int8", "fp8"):
            raise UsageError(f"target {text!r}: torch runs fp32, fp16 and bf16 here; use ort-cpu-int8 or trt-int8")
        return cls("torch", device, precision, mode)

    @property
    def name(self) -> str:
        """The shortest name that parses to this target; also part of file names."""
        parts = [self.runtime]
        if len(RUNTIMES[self.runtime]) > 1:
            parts.append(self.device)
        if self.precision != "fp32" or self.runtime in TENSORRT:
            parts.append(self.precision)
        if self.mode not in ("", "graph" if self.device == CUDA else "eager"):
            parts.append(self.mode)
        return "-".join(parts)

    @property
    def on_gpu(self) -> bool:
        return self.device == CUDA

    @property
    def builds(self) -> bool:
        """Whether an engine file is built before it can run."""
        return self.runtime in TENSORRT

    def check_threads(self, threads: int) -> None:
        """Raises UsageError for a number of threads where there is none to choose: on a GPU."""
        if self.on_gpu and threads != 1:
            raise UsageError(
                f"{self.name} runs on a GPU, the number of threads is the CPU's, got {threads}; leave --threads out"
            )


def _kind(part: str, runtime: str) -> str:
    if part in RUNTIMES[runtime]:
        return "device"
    if part in PRECISIONS:
        return "precision"
    return "mode" if runtime == "torch" and part in MODES else ""
