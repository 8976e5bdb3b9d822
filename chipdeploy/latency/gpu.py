"""What the GPU does while it is timed: clocks, power, temperature, why it slows down, and who else uses it (NVML)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from chipdeploy.engines.target import Target
from chipdeploy.latency.environment import environment

# Bits of NVML's clock event reasons that mean the GPU is slower than it could be. Idling and clocks that somebody set
# are no slowdown of the moment.
SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
ENERGY_S = 1.0


def slowdowns(bits: int) -> list[str]:
    """The names of the slowdowns in NVML's bit field."""
    return [name for bit, name in SLOWDOWNS.items() if bits & bit]


def environment_of(target: Target) -> dict[str, Any]:
    """`environment`, and the GPU where the target runs on one: there the machine is named after it."""
    facts, watch = environment(), GpuWatch.open() if target.on_gpu else None
    if watch:
        gpu = watch.facts()
        facts |= {"gpu": gpu, "machine": f"{gpu['name']}, {facts['cpu']}"}
    return facts


class GpuWatch:
    """NVML's view of one GPU; it reads and changes nothing."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls) -> GpuWatch | None:
        """The watch of PyTorch's current GPU; None where there is no driver, no GPU or no nvidia-ml-py."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml, _current(pynvml))
        except Exception:  # the library, the driver or the GPU is missing: all the same to us
            return None

    def facts(self) -> dict[str, Any]:
        """Name, driver, clocks in MHz, power in W, temperature in °C, slowdowns, other processes; what NVML tells."""
        nvml, handle = self._nvml, self._handle
        readers: dict[str, Callable[[], Any]] = {
            "name": lambda: _text(nvml.nvmlDeviceGetName(handle)),
            "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "slowdowns": self.slowdowns,
            "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        found = {}
        for key, read in readers.items():
            with suppress(nvml.NVMLError):  # a container or an older driver does not tell everything
                found[key] = read()
        return found

    def slowdowns(self) -> list[str]:
        """Why the clocks are lower than they could be, now; empty where they are not."""
        nvml = self._nvml
        newer = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        read = newer or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        with suppress(nvml.NVMLError):
            return slowdowns(int(read(self._handle)))
        return []

    def throttled(self) -> bool:
        """Whether the GPU slows itself down, now."""
        return bool(self.slowdowns())

    def joules(self, once: Callable[[], object], seconds: float = ENERGY_S) -> float | None:
        """Energy of one call of `once`, in J, by the GPU's own counter over about `seconds`; None where it has none."""
        nvml, runs = self._nvml, 0
        try:
            before = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)  # millijoules
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                once()
                runs += 1
            after = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError:
            return None
        return float(after - before) / 1e3 / runs


def _current(nvml: Any) -> Any:
    """NVML's handle of the GPU that PyTorch takes: NVML counts in another order, and hidden ones too."""
    import torch

    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties('cuda').uuid}")
    except Exception:  # no CUDA for PyTorch, or a part of a GPU, which has a name of its own
        return nvml.nvmlDeviceGetHandleByIndex(0)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
