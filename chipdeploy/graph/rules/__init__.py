"""How channels pass each op, one file an op family. Importing this package fills the registry."""

from chipdeploy.graph.rules import elementwise, linear, norm, shape
from chipdeploy.graph.rules.base import RULES, Denied, Tracing

__all__ = ["RULES", "Denied", "Tracing", "elementwise", "linear", "norm", "shape"]
