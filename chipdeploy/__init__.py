"""chipdeploy: prune a CNN to a budget with ChipNet, cut it for real, export it, and measure the speedup."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chipdeploy.chipnet.soft import Budget, ChipNet
    from chipdeploy.export.onnx import export_onnx
    from chipdeploy.graph.plan import PrunePlan
    from chipdeploy.graph.surgery import hard_prune
    from chipdeploy.graph.trace import trace
    from chipdeploy.latency.profile import LatencyProfile
    from chipdeploy.result import load

_HOMES = {
    "Budget": "chipdeploy.chipnet.soft",
    "ChipNet": "chipdeploy.chipnet.soft",
    "LatencyProfile": "chipdeploy.latency.profile",
    "PrunePlan": "chipdeploy.graph.plan",
    "export_onnx": "chipdeploy.export.onnx",
    "hard_prune": "chipdeploy.graph.surgery",
    "load": "chipdeploy.result",
    "trace": "chipdeploy.graph.trace",
}

__all__ = [
    "Budget",
    "ChipNet",
    "LatencyProfile",
    "PrunePlan",
    "__version__",
    "export_onnx",
    "hard_prune",
    "load",
    "trace",
]


def __getattr__(name: str) -> Any:
    # Loaded late: the command line answers --help without importing torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'chipdeploy' has no attribute {name!r}")
