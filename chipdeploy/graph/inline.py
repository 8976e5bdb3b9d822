"""Makes an exported program plain for the rules: blocks of `no_grad` and `autocast` in place, weights as they are."""

from __future__ import annotations

from operator import getitem
from typing import cast

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from chipdeploy.graph.rules.base import op_name

# Arguments before the block's graph.
_BLOCKS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
# Ops that give their operand itself where it is of the wanted type already; not a copy that the forward may write to.
_CONVERSIONS = frozenset({"contiguous", "to", "type_as"})
_DARK = "chipdeploy_without_gradients"


def inline_blocks(program: ExportedProgram) -> ExportedProgram:
    """Put the ops of such blocks in their places, in place; those without gradients are marked, see `is_dark`.

    What the program would compute under autocast may change with that: it is for reading only.
    """
    _inline(program.graph_module, dark=False)
    program.graph_module.recompile()
    return program


def drop_conversions(program: ExportedProgram) -> ExportedProgram:
    """Let who reads `weight.to(x.dtype)` read the weight itself, in place, where that is of its own type."""
    weights = program.graph_signature.inputs_to_parameters
    for node in list(program.graph.nodes):
        if node.op != "call_function" or op_name(node) not in _CONVERSIONS:
            continue
        weight = node.args[0]
        if not isinstance(weight, Node) or weight.op != "placeholder" or weight.name not in weights:
            continue
        got, own = node.meta["val"], weight.meta["val"]
        if (got.dtype, got.shape) == (own.dtype, own.shape):
            node.replace_all_uses_with(weight)
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def is_dark(node: Node) -> bool:
    """Whether an op runs where no gradient comes: its gates would learn nothing."""
    return bool(node.meta.get(_DARK))


def hidden_graphs(node: Node) -> list[GraphModule]:
    """The graphs that an op takes as arguments, such as the two ways of `torch.cond`."""
    home = node.graph.owning_module
    assert home is not None
    held = (getattr(home, str(arg.target), None) for arg in node.all_input_nodes if arg.op == "get_attr")
    return [graph for graph in held if isinstance(graph, GraphModule)]


def _inline(home: GraphModule, *, dark: bool) -> None:
    for node in list(home.graph.nodes):
        if dark:
            node.meta[_DARK] = True
        before = _BLOCKS.get(str(node.target).rpartition(".")[2]) if node.op == "call_function" else None
        if before is None:
            continue
        held = cast(Node, node.args[before])
        block = cast(GraphModule, getattr(home, str(held.target)))
        _inline(block, dark=dark or node.args[0] is False)
        _move_in(home, node, block, list(node.args[before + 1 :]))
        home.graph.erase_node(node)
        if not held.users:
            home.graph.erase_node(held)


def _move_in(home: GraphModule, node: Node, block: GraphModule, operands: list[object]) -> None:
    """Copy the ops of `block` before `node`, and give its results to who reads those of `node`."""
    places = (inner for inner in block.graph.nodes if inner.op == "placeholder")
    values = dict(zip(places, cast("list[Node]", operands), strict=True))
    for inner in block.graph.nodes:
        if inner.op == "get_attr":  # a graph inside the block
            name = f"{node.name}_{inner.target}"
            home.add_module(name, getattr(block, str(inner.target)))
            inner.target = name
    with home.graph.inserting_before(node):
        results = home.graph.graph_copy(block.graph, values)
    for reader in list(node.users):
        assert reader.target is getitem
        reader.replace_all_uses_with(cast("list[Node]", results)[cast(int, reader.args[1])])
        home.graph.erase_node(reader)
