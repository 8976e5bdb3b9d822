"""Which branches of a network can disappear as a whole, and what stands in for their modules when they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from chipdeploy.graph.rules.base import Tracing, keeps_zero, op_name, shape
from chipdeploy.graph.rules.elementwise import UNARY
from chipdeploy.graph.stubs import Geometry

JOINS = frozenset({"add", "cat"})
# These kernels refuse tensors with no channels, and a view of nothing cannot infer a size: such branches stay.
NOT_ON_EMPTY = frozenset(
    {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "view", "reshape"}
)
PADS = frozenset({"pad", "constant_pad_nd"})
STUBBED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.modules.batchnorm._BatchNorm)
LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


@dataclass(frozen=True)
class BranchUse:
    """A removable branch, before labels become channel numbers."""

    nodes: frozenset[Node]
    inside: frozenset[int]  # roots of the labels made inside
    stubs: tuple[tuple[str, str], ...]
    tail: tuple[str, ...]


def find_branches(tracing: Tracing, output: Node) -> list[BranchUse]:
    """Every branch that can go, innermost first; of overlapping ones only the smallest is kept."""
    candidates = [node for node in tracing.flows if node.users and all(op_name(user) in JOINS for user in node.users)]
    alive = _ancestors([output], without=set())
    dead_sets = [
        (node, frozenset(alive - _ancestors([output], without={node}))) for node in candidates if node in alive
    ]
    found: list[BranchUse] = []
    ends: set[Node] = set()
    for node, dead in sorted(dead_sets, key=lambda pair: len(pair[1])):
        if any(dead & branch.nodes for branch in found):
            continue
        # The input must reach the output even when every branch is gone.
        if not any(_is_input(tracing, member) for member in _ancestors([output], without=ends | {node})):
            continue
        branch = _describe(tracing, node, dead)
        if branch is not None:
            found.append(branch)
            ends.add(node)
    return found


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
    return node.op == "placeholder" and node.name not in tracing.tensors


def _describe(tracing: Tracing, end: Node, dead: frozenset[Node]) -> BranchUse | None:
    """The branch that ends in `end`, or None when it cannot be removed exactly."""
    layers = [layer for layer in tracing.layers if layer.node in dead]
    outside = {
        int(root)
        for layer in tracing.layers
        if layer.node not in dead
        for root in tracing.labels.roots(layer.out_labels)
    }
    inside = frozenset(
        int(root)
        for layer in layers
        for root in tracing.labels.roots(layer.out_labels)
        if int(root) not in outside and tracing.labels.reason(int(root)) is None
    )
    calls = [node for node in dead if node.op == "call_function"]
    if not inside or any(not _runs_empty(tracing, node) for node in calls):
        return None
    summed = any(op_name(user) == "add" for user in end.users)
    tail = _tail(tracing, end, dead) if summed else ((), None)
    if tail is None:
        return None
    stubs = _stubs(tracing, dead, inside, tail[1])
    return None if stubs is None else BranchUse(dead, inside, stubs, tail[0])


def _tail(tracing: Tracing, end: Node, dead: frozenset[Node]) -> tuple[tuple[str, ...], Node] | None:
    """The affine tensors that make a summed branch's constant, and the layer that its last channels come from."""
    node = end
    while keeps_zero(node) and node in dead:
        node = node.all_input_nodes[0]
    affine: tuple[str, ...] = ()
    if op_name(node) == "batch_norm" and node in dead:
        weight, bias = node.args[1:3]
        if weight is None or bias is None:
            return None
        affine = (tracing.tensor_name(weight), tracing.tensor_name(bias))
        node = node.all_input_nodes[0]
    if op_name(node) not in LAYERS or node not in dead or len(node.users) != 1:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is not None and not affine:
        affine = (tracing.tensor_name(bias),)
    elsewhere = {name for user, names in tracing.tensors_of.items() if user not in dead for name in names}
    return None if elsewhere & set(affine) else (affine, node)


def _stubs(
    tracing: Tracing, dead: frozenset[Node], inside: frozenset[int], last: Node | None
) -> tuple[tuple[str, str], ...] | None:
    """What replaces each module: `none` gives no channels, `zero` gives zeros, `pass` its input; None if unsure."""
    stubs: dict[str, str] = {}
    for node, path in _modules(tracing, dead):
        if op_name(node) in LAYERS:
            kind = _layer_stub(tracing, node, inside, last)
        elif op_name(node) == "batch_norm":
            kind = "pass" if last is not None and last in node.all_input_nodes else "none"
        else:
            kind = None
        if (
            kind is None
            or stubs.get(path, kind) != kind
            or _used_outside(tracing, path, dead)
            or not _stub_fits(tracing, node)
        ):
            return None
        stubs[path] = kind
    return tuple(stubs.items())


def _runs_empty(tracing: Tracing, node: Node) -> bool:
    """Whether an op between the stubs takes a tensor with no channels. A layer's own ops vanish with it."""
    if isinstance(tracing.owner(node)[1], STUBBED):
        return True
    mirrored = op_name(node) in PADS and len(node.args) > 2 and node.args[2] != "constant"
    return not mirrored and op_name(node) not in NOT_ON_EMPTY


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
    for node in tracing.flows:
        if node in dead and any(
            arg.op == "placeholder" and arg.name in tracing.tensors for arg in node.all_input_nodes
        ):
            yield node, tracing.owner(node)[0]


def _layer_stub(tracing: Tracing, node: Node, inside: frozenset[int], last: Node | None) -> str | None:
    layer = next((layer for layer in tracing.layers if layer.node is node), None)
    if layer is None:
        return None
    outputs = set(tracing.labels.roots(layer.out_labels).tolist())
    if node is last:
        reads = set(tracing.labels.roots(layer.in_labels).tolist())
        return "zero" if reads <= inside and not outputs & inside else None
    return "none" if outputs <= inside else None


def _used_outside(tracing: Tracing, path: str, dead: frozenset[Node]) -> bool:
    return any(node not in dead and tracing.owner(node)[0] == path for node in tracing.flows)
