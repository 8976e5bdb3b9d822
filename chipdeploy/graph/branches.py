"""Which branches of a network can disappear as a whole, and what stands in for their modules when they do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from chipdeploy.graph.labels import Ints
from chipdeploy.graph.rules.base import Tracing, argument, keeps_zero, nodes_of, op_name, shape
from chipdeploy.graph.rules.elementwise import UNARY
from chipdeploy.graph.stubs import Geometry

JOINS = frozenset({"add", "cat"})
# These kernels refuse tensors with no channels, and a view of nothing cannot infer a size.
NOT_ON_EMPTY = frozenset(
    [
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "view",
        "reshape",
        "flatten",
        "mean",
        "softmax",
    ]
)
PADS = frozenset({"pad", "constant_pad_nd"})
STUBBED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.modules.batchnorm._BatchNorm)
LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
# With these, a forward states sizes: stubs of single layers would give it tensors that it cannot take.
SIZED = frozenset(
    [
        "view",
        "reshape",
        "unflatten",
        "expand",
        "split",
        "chunk",
        "unbind",
        "select",
        "matmul",
        "scaled_dot_product_attention",
    ]
)
PRODUCTS = frozenset({"matmul", "mm", "bmm", "einsum", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
MOVES = frozenset(
    ["permute", "transpose", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "roll", "slice"]
)


@dataclass(frozen=True)
class BranchUse:
    """A removable branch, before labels become channel numbers."""

    nodes: frozenset[Node]
    inside: frozenset[int]  # roots of the labels made inside
    stubs: tuple[tuple[str, str], ...]
    tail: tuple[str, ...]
    end: str
    folds: tuple[tuple[str, float], ...] = ()


class _Makers:
    """The free channels, as roots, that each layer makes."""

    def __init__(self, tracing: Tracing) -> None:
        outputs: dict[Node, list[Ints]] = {}
        for layer in tracing.layers:
            if not layer.mult:
                outputs.setdefault(layer.node, []).append(layer.out_labels.reshape(-1))
        made = {node: np.unique(tracing.labels.roots(np.concatenate(labels))) for node, labels in outputs.items()}
        self._made = {node: roots[tracing.labels.free(roots)] for node, roots in made.items()}
        self._times = np.bincount(self._all(self._made))  # how many layers make a channel

    def inside(self, dead: frozenset[Node]) -> frozenset[int]:
        """Roots of the free channels that only layers of a branch make."""
        roots, times = np.unique(self._all(dead), return_counts=True)
        return frozenset(roots[times == self._times[roots]].tolist())

    def _all(self, nodes: Iterable[Node]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *(self._made[node] for node in nodes if node in self._made)])


def find_branches(tracing: Tracing, output: Node, banned: Collection[str] = ()) -> list[BranchUse]:
    """Every branch that can go, innermost first; of overlapping ones only the smallest is kept.

    `banned` names the ends of branches that a trial has shown not to run without their inside.
    """
    candidates = [node for node in tracing.flows if node.users and all(op_name(user) in JOINS for user in node.users)]
    alive = _ancestors([output], without=set())
    dead_sets = [
        (node, frozenset(alive - _ancestors([output], without={node})))
        for node in candidates
        if node in alive and node.name not in banned
    ]
    makers = _Makers(tracing)
    found: list[BranchUse] = []
    ends: set[Node] = set()
    for node, dead in sorted(dead_sets, key=lambda pair: len(pair[1])):
        if any(dead & branch.nodes for branch in found):
            continue
        # The input must reach the output even when every branch is gone.
        if not any(_is_input(tracing, member) for member in _ancestors([output], without=ends | {node})):
            continue
        branch = _describe(tracing, makers, node, dead)
        if branch is not None:
            found.append(branch)
            ends.add(node)
    return [*found, *_scalers(tracing, makers, alive, found, output, banned)]


def _scalers(
    tracing: Tracing,
    makers: _Makers,
    alive: set[Node],
    found: list[BranchUse],
    output: Node,
    banned: Collection[str],
) -> Iterator[BranchUse]:
    """Modules that multiply their input by what they squeeze out of it, outside of branches that go anyway."""
    taken = frozenset().union(*(branch.nodes for branch in found))
    for end in tracing.flows:
        users = [user for user in end.users if op_name(user) == "mul"]
        if end in alive and end.name not in banned and len(end.users) == len(users) == 1:
            dead = frozenset(alive - _ancestors([output], without={end}))
            branch = None if dead & taken else _scaler(tracing, makers, end, users[0], dead)
            if branch is not None:
                yield branch


def _scaler(tracing: Tracing, makers: _Makers, end: Node, product: Node, dead: frozenset[Node]) -> BranchUse | None:
    """A squeeze-and-excitation module as a branch: without its inside it scales by a constant, which the layers that
    read its output take into their weights."""
    path = tracing.owner(product)[0]
    last, factor = _constant(end, dead)
    readers = list(product.users)
    calls = {node for node in dead if node.op == "call_function"}
    if not path or nodes_of(tracing, path) != calls | {product} or last is None or not factor:
        return None
    if any(op_name(reader) not in LAYERS or not tracing.is_parameter(reader.args[1]) for reader in readers):
        return None
    weights = tuple(tracing.tensor_name(reader.args[1]) for reader in readers)
    bias = argument(last, 2, "bias")
    tail = () if bias is None else (tracing.tensor_name(bias),)
    elsewhere = {name for user, names in tracing.tensors_of.items() if user not in dead for name in names}
    shared = [name for user, names in tracing.tensors_of.items() if user not in readers for name in names]
    inside = makers.inside(dead)
    if not inside or elsewhere & set(tail) or set(shared) & set(weights) or len(set(weights)) < len(weights):
        return None
    return BranchUse(dead, inside, ((path, "pass"),), tail, end.name, tuple((name, factor) for name in weights))


def _constant(end: Node, dead: frozenset[Node]) -> tuple[Node | None, float]:
    """The last layer before a chain of activations, and what the chain makes of zero."""
    chain: list[Node] = []
    node = end
    while node in dead and op_name(node) in UNARY and len(node.all_input_nodes) == 1:
        chain.append(node)
        node = node.all_input_nodes[0]
    if node not in dead or op_name(node) not in LAYERS or len(node.users) != 1:
        return None, 0.0
    value = torch.zeros(1, dtype=torch.float64)
    for step in reversed(chain):
        value = cast("Callable[..., Tensor]", step.target)(value.clone(), *step.args[1:], **step.kwargs)
    return node, float(value)


def _ancestors(roots: Iterable[Node], *, without: set[Node]) -> set[Node]:
    """All nodes that the roots need, when those in `without` yield nothing."""
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in without or node in seen:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return seen


def _is_input(tracing: Tracing, node: Node) -> bool:
    return node.op == "placeholder" and node.name in tracing.inputs


def _describe(tracing: Tracing, makers: _Makers, end: Node, dead: frozenset[Node]) -> BranchUse | None:
    """The branch that ends in `end`, or None when it cannot be removed exactly."""
    inside = makers.inside(dead)
    if not inside:
        return None
    summed = any(op_name(user) == "add" for user in end.users)
    tail = _tail(tracing, end, dead) if summed else ((), None)
    if tail is None:
        return None
    affine, last = tail
    stubs = None
    if last is not None and any(op_name(node) in SIZED for node in dead):
        stubs = _still(tracing, dead, last)
    if stubs is None:
        stubs = _stubs(tracing, dead, inside, end, last)
    if stubs is None and last is not None:
        stubs = _still(tracing, dead, last)
    return None if stubs is None else BranchUse(dead, inside, stubs, affine, end.name)


def _tail(tracing: Tracing, end: Node, dead: frozenset[Node]) -> tuple[tuple[str, ...], Node] | None:
    """The affine tensors that make a summed branch's constant, and the layer that its last channels come from."""
    node = end
    while node in dead and (keeps_zero(node) or op_name(node) in MOVES or op_name(node) == "mul"):
        node = next((arg for arg in node.all_input_nodes if not _weighs(tracing, arg)), node.all_input_nodes[0])
    affine: tuple[str, ...] = ()
    if op_name(node) in ("batch_norm", "layer_norm", "group_norm") and node in dead:
        first = 1 if op_name(node) == "batch_norm" else 2
        weight, bias = (argument(node, first + i, name) for i, name in enumerate(("weight", "bias")))
        if weight is None or bias is None:
            return None
        affine = (tracing.tensor_name(weight), tracing.tensor_name(bias))
        node = node.all_input_nodes[0]
        while node in dead and op_name(node) in MOVES:
            node = node.all_input_nodes[0]
    if op_name(node) not in LAYERS or node not in dead or len(node.users) != 1:
        return None
    bias = argument(node, 2, "bias")
    if not affine:
        # Its weight, too: beside the empty inside, something living may enter (values under talking heads).
        own = [tensor for tensor in (node.args[1], bias) if tensor is not None]
        if not all(tracing.is_parameter(tensor) for tensor in own):
            return None
        affine = tuple(tracing.tensor_name(tensor) for tensor in own)
    elsewhere = {name for user, names in tracing.tensors_of.items() if user not in dead for name in names}
    return None if elsewhere & set(affine) else (affine, node)


def _weighs(tracing: Tracing, node: Node) -> bool:
    """Whether a value is a parameter or made of parameters alone, such as a layer scale in another shape."""
    inputs = node.all_input_nodes
    return tracing.is_tensor(node) or (bool(inputs) and all(_weighs(tracing, each) for each in inputs))


def _stubs(
    tracing: Tracing, dead: frozenset[Node], inside: frozenset[int], end: Node, last: Node | None
) -> tuple[tuple[str, str], ...] | None:
    """What replaces each module of a branch, None if unsure.

    `one` gives one channel of zeros to what is to run on, `none` no channels to a concatenation, `zero` zeros to a
    sum, `pass` the module's input.
    """
    ending = _ending(end, dead) if last is None else frozenset()
    if any(op_name(node) in NOT_ON_EMPTY for node in ending):
        return None
    stubs: dict[str, str] = {}
    for node, path in _modules(tracing, dead):
        if _stays(tracing, node, path, dead):
            continue
        if op_name(node) in LAYERS:
            kind = _layer_stub(tracing, node, inside, last, ending)
        elif op_name(node) in NORMS or _keeps_shape(tracing, path, dead):
            kind = "pass"
        else:
            kind = None
        if kind is None or stubs.get(path, kind) != kind or _used_outside(tracing, path, dead):
            return None
        if (kind != "pass" and not _stub_fits(tracing, node)) or (
            kind == "pass" and not _keeps_shape(tracing, path, dead)
        ):
            return None
        stubs[path] = kind
    return tuple(stubs.items())


def _still(tracing: Tracing, dead: frozenset[Node], last: Node) -> tuple[tuple[str, str], ...] | None:
    """Whole modules as stubs: the largest that lies in the branch and holds its last layer gives zeros (`still`).

    Its output must have the channels of its input. What is left of the branch must keep its input's shape, too.
    """
    for path in _downwards(tracing.owner(last)[0]):
        nodes = nodes_of(tracing, path)
        if nodes <= dead and _same_channels(tracing, nodes):
            break
    else:
        return None
    stubs = {path: "still"}
    for node, owner in _modules(tracing, dead):
        if node in nodes or _stays(tracing, node, owner, dead):
            continue
        if not owner or not _keeps_shape(tracing, owner, dead):
            return None
        stubs[owner] = "pass"
    return tuple(stubs.items())


def _stays(tracing: Tracing, node: Node, path: str, dead: frozenset[Node]) -> bool:
    """Whether an op reads a parameter of a module that stays, such as a block's own layer scale."""
    sliced = op_name(node) in LAYERS | NORMS | PRODUCTS
    return not sliced and not (path and nodes_of(tracing, path) <= dead)


def _downwards(path: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c` for `a.b.c`."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _same_channels(tracing: Tracing, nodes: frozenset[Node]) -> bool:
    """Whether the ops read one activation and give one of the same shape and channels."""
    read = {a for node in nodes for a in node.all_input_nodes if a not in nodes and not tracing.is_tensor(a)}
    given = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(read) != 1 or len(given) != 1:
        return False
    one, other = next(iter(read)), given[0]
    if not all(isinstance(node.meta.get("val"), Tensor) for node in (one, other)) or shape(one) != shape(other):
        return False
    flows = [tracing.flow(node) for node in (one, other)]
    if all(flow is None or not tracing.labels.free(flow).any() for flow in flows):
        return True
    return all(flow is not None for flow in flows) and np.array_equal(cast(Ints, flows[0]), cast(Ints, flows[1]))


def _keeps_shape(tracing: Tracing, path: str, dead: frozenset[Node]) -> bool:
    """Whether a module lies in the branch and hands on a tensor of its input's shape."""
    nodes = nodes_of(tracing, path) if path else frozenset()
    read = {a for node in nodes for a in node.all_input_nodes if a not in nodes and not tracing.is_tensor(a)}
    given = {node for node in nodes if any(user not in nodes for user in node.users)}
    if not nodes or not nodes <= dead or len(read) != 1 or len(given) != 1:
        return False
    return shape(next(iter(read))) == shape(next(iter(given)))


def _ending(end: Node, dead: frozenset[Node]) -> frozenset[Node]:
    """What lies between a branch's last layers and its end, these layers included."""
    seen: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in seen or node not in dead or node.op != "call_function":
            continue
        seen.add(node)
        if op_name(node) not in LAYERS:
            stack.extend(node.all_input_nodes)
    return frozenset(seen)


def _stub_fits(tracing: Tracing, node: Node) -> bool:
    """Whether a stub can stand in for the module that owns `node`: a subclass may do more than its layer."""
    path, module = tracing.owner(node)
    own = [other for other in tracing.flows if other.op == "call_function" and tracing.owner(other)[0] == path]
    pads = [other for other in own if op_name(other) in PADS]
    known = {op_name(node), *PADS, *UNARY}
    if not isinstance(module, STUBBED) or any(op_name(other) not in known for other in own):
        return False
    if any(op_name(user) not in LAYERS for pad in pads for user in pad.users):
        return False
    source = node.all_input_nodes[0]
    if source in pads:
        source = source.all_input_nodes[0]
    sizes = shape(node)
    return Geometry.of(module).shape(shape(source), sizes[-1 if isinstance(module, nn.Linear) else 1]) == sizes


def _modules(tracing: Tracing, dead: frozenset[Node]) -> Iterator[tuple[Node, str]]:
    """The ops of a branch that read a parameter or buffer, with the modules that own them."""
    for node in tracing.flows:
        if node in dead and any(tracing.is_tensor(arg) for arg in node.all_input_nodes):
            yield node, tracing.owner(node)[0]


def _layer_stub(
    tracing: Tracing, node: Node, inside: frozenset[int], last: Node | None, ending: frozenset[Node]
) -> str | None:
    layer = next((layer for layer in tracing.layers if layer.node is node), None)
    if layer is None:
        return None
    outputs = set(tracing.labels.roots(layer.out_labels).tolist())
    if node is last:
        reads = set(tracing.labels.roots(layer.in_labels).tolist())
        return "zero" if reads and reads <= inside and not outputs & inside else None
    if not outputs <= inside:
        return None
    return "none" if node in ending else "one"


def _used_outside(tracing: Tracing, path: str, dead: frozenset[Node]) -> bool:
    return any(node not in dead and tracing.owner(node)[0] == path for node in tracing.flows)
