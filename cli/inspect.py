"""`chipdeploy inspect`: what can be pruned in a model, and what cannot, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .output import console, print_json

if TYPE_CHECKING:
    from chipdeploy.graph.channels import ChannelGraph


def inspect(
    model: options.Model = None,
    classes: Annotated[int, typer.Option("--classes", help="Number of classes.")] = 10,
    channels: Annotated[int, typer.Option("--channels", help="Channels of an image.")] = 3,
    image_size: Annotated[int, typer.Option("--image-size", help="Height and width of the images, pixels.")] = 32,
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
    graph = trace(network, example)
    facts = {"model": spec} | describe(graph)
    if json:
        print_json(facts)
    else:
        _print(facts)


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
        table.add_row(group["name"], str(group["channels"]), way, ", ".join(group["members"]))
    screen.print(table)
    for pinned in facts["pinned"]:
        screen.print(f"pinned: {pinned['name']} ({pinned['channels']} channels): {pinned['reason']}")
    low = facts["smallest"]
    screen.print(
        f"smallest connected network: {low['macs']:.2%} of the FLOPs, {low['params']:.2%} of the params, "
        f"{low['channels']:.2%} of the channels, {low['volume']:.2%} of the volume"
    )
    screen.print(f"next: chipdeploy prune {facts['model']} --flops 0.3")
