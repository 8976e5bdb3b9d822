"""How channels pass each op, one file an op family. Importing this package fills the registry."""

from chipdeploy.graph.rules import attention, elementwise, linear, norm, pick, reduce, shape
from chipdeploy.graph.rules.base import RULES, Denied, Tracing

__all__ = ["RULES", "Denied", "Tracing", "attention", "elementwise", "linear", "norm", "pick", "reduce", "shape"]
