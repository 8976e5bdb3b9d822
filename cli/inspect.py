"""`chipdeploy inspect`: what can be pruned in a model, and what cannot, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import options
from .output import console, flags, own_images, print_json, quoted

MOST_NAMES = 4  # of layers that one reason holds; --json has all

if TYPE_CHECKING:
    from chipdeploy.graph.channels import ChannelGraph


def inspect(
    model: options.Model = None,
    classes: options.Classes = 10,
    channels: options.Channels = 3,
    image_size: options.Size = 32,
    exclude: options.Exclude = None,
    json: options.Json = False,
) -> None:
    """Show the channel groups of a model, their members, its costs, and what is pinned and why."""
    import torch

    from chipdeploy.errors import UsageError
    from chipdeploy.graph.trace import trace
    from chipdeploy.training.models import build_model

    if min(classes, channels, image_size) < 1:
        raise UsageError("--classes, --channels and --image-size must be 1 or more")
    spec = model or "resnet20"
    network = build_model(spec, num_classes=classes, in_channels=channels, image_size=image_size)
    example = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    graph = trace(network, example, exclude=exclude or ())
    facts = {"model": spec} | describe(graph)
    if json:
        print_json(facts)
        return
    _print(facts)
    console().print(_next(facts, tuple(exclude or ())))


def describe(graph: ChannelGraph) -> dict[str, Any]:
    """A channel graph as plain values."""
    from chipdeploy.chipnet.costs import COSTS, CostModel
    from chipdeploy.chipnet.project import Projector

    costs = {name: CostModel.of(graph, name) for name in COSTS}
    return {
        "input": list(graph.input_shape[1:]),
        "costs": {name: int(cost.dense) for name, cost in costs.items()},
        "smallest": (smallest := {name: Projector(graph, cost, 1).smallest for name, cost in costs.items()}),
        "prunable": {name: 1 - share for name, share in smallest.items()},
        "groups": [
            {
                "name": group.name,
                "channels": group.size,
                "unit": group.unit,
                "members": list(group.producers),
                "branch": None if group.branch is None else graph.branches[group.branch].name,
                "may_vanish": group.may_vanish,
            }
            for group in graph.groups
        ],
        "pinned": [{"name": p.name, "channels": p.size, "reason": p.reason} for p in graph.pinned],
        "branches": [branch.name for branch in graph.branches],
    }


def _by_reason(pinned: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Layers by the reason that holds them, the reasons that hold most channels first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for layer in pinned:
        found.setdefault(layer["reason"], []).append(layer)
    return dict(sorted(found.items(), key=lambda item: -sum(layer["channels"] for layer in item[1])))


def _next(facts: dict[str, Any], exclude: tuple[str, ...]) -> str:
    """The command that follows, with a budget that this model can reach."""
    smallest = facts["smallest"]["macs"]
    keep = 0.3 if smallest <= 0.3 else round((1 + smallest) / 2, 5)
    data, what_data = own_images(*facts["input"][:2])
    more = flags({"--exclude": (exclude, ()), "--data": (data, None)})
    return f"next: chipdeploy prune {quoted(facts['model'])} --flops {keep:g}{more}{what_data}"


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table

    screen = console()
    costs = facts["costs"]
    screen.print(
        f"{facts['model']} for images {facts['input']}: {costs['macs'] / 1e6:.2f} MMACs, {costs['params']:,} params, "
        f"{costs['channels']:,} channels, {costs['volume']:,} activations"
    )
    table = Table("group", "channels", "can go with", "members", box=None, pad_edge=False)
    for group in facts["groups"]:
        way = group["branch"] or ("the rest of its stream" if group["may_vanish"] else "no")
        width = str(group["channels"]) if group["unit"] == 1 else f"{group['channels']} x {group['unit']}"
        table.add_row(group["name"], width, way, ", ".join(group["members"]))
    screen.print(table)
    for reason, layers in _by_reason(facts["pinned"]).items():
        channels = sum(layer["channels"] for layer in layers)
        names = ", ".join(layer["name"] for layer in layers[:MOST_NAMES])
        more = f" and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
        screen.print(f"pinned: {names}{more} ({channels} channels): {reason}")
    for word, shares in (("can be pruned", facts["prunable"]), ("smallest connected network", facts["smallest"])):
        screen.print(
            f"{word}: {shares['macs']:.2%} of the FLOPs, {shares['params']:.2%} of the params, "
            f"{shares['channels']:.2%} of the channels, {shares['volume']:.2%} of the volume"
        )
