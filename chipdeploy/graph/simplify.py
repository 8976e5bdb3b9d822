"""Takes the leftovers of removed branches out of an exported program, so that no op of them is deployed."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from chipdeploy.graph.branches import MOVES
from chipdeploy.graph.rules.base import keeps_zero, op_name

ATTENTION = f"{nn.MultiheadAttention.__module__}.{nn.MultiheadAttention.__qualname__}"
ZEROS = frozenset({"new_zeros", "zeros", "zeros_like"})


def remove_dead_branches(program: ExportedProgram) -> ExportedProgram:
    """Drop sums with zeros, empty parts of concatenations and pads by nothing, then all that nobody reads.

    Works in place, but for a program that writes to tensors: that one is made free of side effects first.
    """
    if not any(_leftover(node) for node in program.graph.nodes):
        return program
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    zeros: set[Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name in ZEROS or _zero_again(node, zeros):
            zeros.add(node)
        elif (other := _same_as(node, name, zeros)) is not None:
            node.replace_all_uses_with(other)
        elif name == "cat":
            _drop_empty(node)
    program.graph.eliminate_dead_code(is_impure_node=_must_stay)
    program.graph_module.recompile()
    return program


def drop_mean_weights(program: ExportedProgram) -> ExportedProgram:
    """Drop what `nn.MultiheadAttention` computes and nobody reads, its weights' mean over the heads, in place.

    A cut attention has a forward of its own. Whatever else is not read runs in the cut network, too, and must follow.
    """

    def stays(node: Node) -> bool:
        kinds = [str(kind) for _, kind in (node.meta.get("nn_module_stack") or {}).values()]
        return _must_stay(node) or _writes(node) or kinds[-1:] != [ATTENTION]

    program.graph.eliminate_dead_code(is_impure_node=stays)
    program.graph_module.recompile()
    return program


def _leftover(node: Node) -> bool:
    """Whether a removed branch may have left an op; without one, the slow rewriting is not needed."""
    if node.op != "call_function":
        return False
    empty = any(0 in _shape(part) for part in node.all_input_nodes)
    nothing = op_name(node) in ("pad", "constant_pad_nd") and not any(cast("list[int]", node.args[1]))
    return op_name(node) in ZEROS or empty or nothing


def _zero_again(node: Node, zeros: set[Node]) -> bool:
    """Whether an op hands zeros on."""
    if op_name(node) == "mul":
        return any(arg in zeros for arg in node.all_input_nodes)
    return (keeps_zero(node) or op_name(node) in MOVES) and node.args[0] in zeros


def _same_as(node: Node, name: str, zeros: set[Node]) -> Node | None:
    """The operand that a node merely repeats."""
    if name == "add" and len(node.all_input_nodes) == 2:
        for zero, other in (node.all_input_nodes, reversed(node.all_input_nodes)):
            scaled = node.kwargs.get("alpha", 1) != 1 and other is node.args[1]
            if zero in zeros and _shape(other) == _shape(node) and not scaled:
                return other
    if name in ("pad", "constant_pad_nd") and not any(cast("list[int]", node.args[1])):
        return cast(Node, node.args[0])
    return None


def _drop_empty(node: Node) -> None:
    parts = [part for part in cast("list[Node]", node.args[0]) if 0 not in _shape(part)]
    if len(parts) == 1:
        node.replace_all_uses_with(parts[0])
    elif parts:
        node.args = (parts, *node.args[1:])


def _shape(node: Node) -> tuple[object, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _must_stay(node: Node) -> bool:
    return node.op in ("placeholder", "output") or (node.op == "call_function" and "assert" in op_name(node))
