"""Norms that treat every channel alone."""

from __future__ import annotations

from torch.fx import Node

from chipdeploy.graph.labels import Flow
from chipdeploy.graph.rules.base import Tracing, rule


@rule("batch_norm")
def batch_norm(tracing: Tracing, node: Node) -> Flow:
    """Per channel, with its own statistics: labels pass, four tensors are sliced."""
    labels = tracing.flow(node.args[0], 1)
    for tensor in node.args[1:5]:  # weight, bias, running mean, running variance
        if tensor is not None:
            tracing.bind(node, tensor, 0, labels)
    path, module = tracing.owner(node)
    if hasattr(module, "num_features"):
        tracing.count(path, "num_features", labels)
    return Flow(1, labels)
