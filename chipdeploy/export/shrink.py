"""A plan applied to a dense ONNX file: in milliseconds what cutting, tracing and exporting do in seconds.

A latency profile needs hundreds of cut networks that only run to be timed. The rules here know the operators of plain
CNNs and refuse all others; whoever uses the result compares its output with the cut network's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chipdeploy.errors import ExportError
from chipdeploy.graph.channels import KEPT, ChannelGraph, Mask
from chipdeploy.graph.labels import Ints
from chipdeploy.graph.plan import dead_branches, group_widths

DEAD = object()  # in place of a value's name: nothing computes it any more
Array = NDArray[Any]

# Operators that hand every channel of their first input on.
CHANNELWISE = {
    "AveragePool",
    "Cast",
    "Clip",
    "Dropout",
    "Elu",
    "Erf",
    "Flatten",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "MaxPool",
    "Mish",
    "Neg",
    "ReduceMean",
    "Relu",
    "Resize",
    "Sigmoid",
    "Slice",
    "Softplus",
    "Sqrt",
    "Tanh",
}


class Shrinker:
    """One dense network's ONNX file and its channel graph.

    Args:
        path: what `export_onnx` wrote of the dense network.

    Raises:
        ExportError: the file cannot be read.
    """

    def __init__(self, path: Path, graph: ChannelGraph) -> None:
        import onnx
        from onnx import numpy_helper

        try:
            proto = onnx.load(path)
        except Exception as error:  # protobuf and onnx raise what they like
            raise ExportError(f"cannot read {path.name}: {error}; export the network again") from error
        self.graph = graph
        self._arrays: dict[str, Array] = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        self._nodes = list(proto.graph.node)
        self._outputs = [output.name for output in proto.graph.output]
        self._head = copy.deepcopy(proto)
        for part in (self._head.graph.node, self._head.graph.initializer, self._head.graph.value_info):
            del part[:]
        self._slots: dict[str, dict[int, Ints]] = {}
        for slot in graph.slots:
            self._slots.setdefault(slot.tensor, {})[slot.dim] = slot.index
        self._counts = {(count.module, count.attribute): count.index for count in graph.counts}

    def shrink(self, mask: Mask) -> Any:
        """The dense network cut to the channels at which `mask` [channels] is true, an `onnx.ModelProto`.

        Raises:
            ExportError: an operator, or a use of one, that no rule here knows.
        """
        return _Cut(self, mask).run()


class _Cut:
    """One cut on its way through the nodes, in the order in which they run."""

    def __init__(self, shrinker: Shrinker, mask: Mask) -> None:
        self._s, self._mask = shrinker, mask
        self._nodes: list[Any] = []
        self._index: dict[str, Ints] = {}  # channels of axis 1 of a value, as numbers of gates
        self._names: dict[str, Any] = {}  # values that are now another, or DEAD
        self._made: dict[str, Array] = {}
        self._rectified: set[str] = set()  # values that a Relu made
        dead = dead_branches(shrinker.graph, group_widths(shrinker.graph, mask))
        self._folds = dict(fold for number in dead for fold in shrinker.graph.branches[number].folds)
        self._rules: dict[str, Callable[[Any], None]] = {
            "Conv": self._conv,
            "Gemm": self._gemm,
            "BatchNormalization": self._norm,
            "Add": self._join,
            "Mul": self._join,
            "Concat": self._concat,
            "Pad": self._pad,
            "Reshape": self._reshape,
        }

    def run(self) -> Any:
        from onnx import ModelProto, numpy_helper

        for node in self._s._nodes:
            if node.op_type in CHANNELWISE:
                self._channelwise(node)
            elif node.op_type in self._rules:
                self._rules[node.op_type](node)
            else:
                raise ExportError(f"no rule to cut the operator {node.op_type} in an ONNX file")
        small = ModelProto()
        small.CopyFrom(self._s._head)
        for name in self._s._outputs:
            if self._now(name) != name:
                raise ExportError(f"the cut leaves no node that makes {name}")
        self._keep_what_is_used(small.graph)
        used = {name for node in small.graph.node for name in node.input}
        arrays = {name: self._made.get(name, self._s._arrays.get(name)) for name in sorted(used)}
        small.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items() if a is not None)
        return small

    def _keep_what_is_used(self, graph: Any) -> None:
        wanted: set[str] = set(self._s._outputs)
        kept = []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= set(node.input)
        graph.node.extend(reversed(kept))

    # -- what a value has become

    def _now(self, name: str) -> Any:
        while name in self._names and self._names[name] is not DEAD:
            name = self._names[name]
        return self._names.get(name, name)

    def _copy(self, node: Any) -> Any:
        """The node with its inputs' present names; it is kept."""
        made = copy.deepcopy(node)
        for place, name in enumerate(node.input):
            made.input[place] = self._now(name) if name else name
        self._nodes.append(made)
        return made

    def _dies(self, node: Any, *inputs: str) -> bool:
        """Whether one of the inputs is gone, and with it the node."""
        if any(self._now(name) is DEAD for name in inputs):
            self._names[node.output[0]] = DEAD
            return True
        return False

    def _living(self, index: Ints) -> NDArray[np.bool_]:
        return np.asarray((index == KEPT) | self._mask[index])

    def _labels(self, tensor: str, dim: int, size: int) -> Ints:
        """Numbers of the gates along one dimension of a parameter; KEPT where there is none."""
        found = self._s._slots.get(tensor, {}).get(dim)
        return np.full(size, KEPT, dtype=np.int64) if found is None else found

    # -- rules

    def _channelwise(self, node: Any) -> None:
        if node.input[0] in self._index:
            self._index[node.output[0]] = self._index[node.input[0]]
        if self._dies(node, node.input[0]):
            return
        if node.op_type == "Relu":
            self._rectified.add(node.output[0])
            if self._now(node.input[0]) in self._rectified:  # the sum between two of them is gone
                self._names[node.output[0]] = node.input[0]
                return
        self._copy(node)

    def _conv(self, node: Any) -> None:
        made = self._weighted(node)
        group = next((a for a in made.attribute if a.name == "group"), None) if made else None
        if group is not None and group.i > 1:
            left = self._s._counts.get((node.input[1].removesuffix(".weight"), "groups"))
            group.i = group.i if left is None else int(self._living(left).sum())

    def _gemm(self, node: Any) -> None:
        if not any(a.name == "transB" and a.i == 1 for a in node.attribute):
            raise ExportError("no rule to cut a Gemm whose weight is not transposed")
        self._weighted(node)

    def _weighted(self, node: Any) -> Any:
        """The layer with its weight [out, in, ...] and bias cut; None where nothing of it is left."""
        weight = node.input[1]
        if weight not in self._s._arrays:
            raise ExportError(f"no rule to cut a {node.op_type} whose weight is computed")
        values = self._s._arrays[weight]
        out, into = (self._labels(weight, dim, values.shape[dim]) for dim in (0, 1))
        self._index[node.output[0]] = out
        cut = values[self._living(out)][:, self._living(into)]
        if cut.size == 0 or self._now(node.input[0]) is DEAD:
            self._names[node.output[0]] = DEAD
            return None
        factor = cut.dtype.type(self._folds.get(weight, 1))  # of a scaling branch that is gone
        self._made[f"{weight}:cut"] = np.ascontiguousarray(cut * factor)
        made = self._copy(node)
        made.input[1] = f"{weight}:cut"
        if len(node.input) > 2:
            made.input[2] = self._cut_vector(node.input[2], out)
        return made

    def _cut_vector(self, name: str, index: Ints) -> str:
        """A vector over channels, cut like them."""
        values = self._s._arrays.get(name)
        if values is None or values.shape != index.shape:
            raise ExportError(f"no rule to cut {name}")
        self._made[f"{name}:cut"] = values[self._living(index)]
        return f"{name}:cut"

    def _norm(self, node: Any) -> None:
        index = self._labels(node.input[1], 0, len(self._s._arrays[node.input[1]]))
        self._index[node.output[0]] = index
        if not self._living(index).any():
            self._names[node.output[0]] = DEAD
        if self._dies(node, node.input[0]) or self._now(node.output[0]) is DEAD:
            return
        made = self._copy(node)
        for place in range(1, 5):
            made.input[place] = self._cut_vector(node.input[place], index)

    def _join(self, node: Any) -> None:
        """A sum or product; of one that lacks an operand the other is left."""
        alive = [name for name in node.input if self._now(name) is not DEAD]
        known = [self._index[name] for name in node.input if name in self._index]
        if len(alive) < 2:
            self._names[node.output[0]] = alive[0] if alive else DEAD
        else:
            self._copy(node)
        if known:
            self._index[node.output[0]] = max(known, key=len)

    def _concat(self, node: Any) -> None:
        if next(a.i for a in node.attribute if a.name == "axis") != 1:
            raise ExportError("no rule to cut a Concat that does not join channels")
        alive = [name for name in node.input if self._now(name) is not DEAD]
        if len(alive) < 2:
            self._names[node.output[0]] = alive[0] if alive else DEAD
        else:
            made = copy.deepcopy(node)
            del made.input[:]
            made.input.extend(self._now(name) for name in alive)
            self._nodes.append(made)
        if all(name in self._index for name in node.input):
            self._index[node.output[0]] = np.concatenate([self._index[name] for name in node.input])

    def _pad(self, node: Any) -> None:
        if self._dies(node, node.input[0]):
            return
        pads = self._s._arrays.get(node.input[1])
        if pads is None:
            raise ExportError("no rule to cut a Pad whose widths are computed")
        made, rank = self._copy(node), len(pads) // 2
        if pads[1] or pads[1 + rank]:  # channels of zeros: how many stay says whatever they are added to
            index = self._partner(node.output[0])
            before, after = int(pads[1]), int(pads[1 + rank])
            living = self._living(index)
            cut = pads.copy()
            cut[1], cut[1 + rank] = living[:before].sum(), living[len(living) - after :].sum()
            made.input[1] = f"{node.output[0]}:pads"
            self._made[made.input[1]] = cut
            self._index[node.output[0]] = index
        elif node.input[0] in self._index:
            self._index[node.output[0]] = self._index[node.input[0]]

    def _partner(self, name: str) -> Ints:
        """Labels of what a value is added to."""
        for node in self._s._nodes:
            if node.op_type == "Add" and name in node.input:
                for other in node.input:
                    if other != name and other in self._index:
                        return self._index[other]
        raise ExportError("no rule to cut channels of zeros that are added to nothing known")

    def _reshape(self, node: Any) -> None:
        if self._dies(node, node.input[0]):
            return
        shape = self._s._arrays.get(node.input[1])
        index = self._index.get(node.input[0])
        if shape is None or index is None or len(shape) != 2 or shape[1] < 1 or shape[1] % len(index):
            raise ExportError("no rule to cut a Reshape that does more than flatten")
        times = int(shape[1]) // len(index)
        made = self._copy(node)
        made.input[1] = f"{node.output[0]}:shape"
        self._made[made.input[1]] = np.array([shape[0], times * int(self._living(index).sum())], dtype=np.int64)
        self._index[node.output[0]] = np.repeat(index, times)
