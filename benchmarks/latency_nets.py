"""What the two latency benchmarks share: the networks, their graphs, and plans that are neither trained nor chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chipdeploy.chipnet.costs import Floats
from chipdeploy.engines.target import Target
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.trace import trace
from chipdeploy.latency.gpu import environment_of
from chipdeploy.latency.rig import Setting
from chipdeploy.latency.store import file_name
from chipdeploy.training.models import build_model

PROFILES = Path(__file__).parents[1] / "profiles"
MODELS = {"resnet20": 32, "resnet56": 32, "mobilenetv2": 32, "torchvision:resnet18": 96}  # and the size of their images


@dataclass(frozen=True)
class Subject:
    """A network with random weights: a latency does not depend on them."""

    name: str
    model: nn.Module
    graph: ChannelGraph
    setting: Setting

    @property
    def slug(self) -> str:
        return self.name.replace(":", "-")


def subject(name: str, target: str, batch: int, threads: int) -> Subject:
    """One of MODELS on a target."""
    size = MODELS[name]
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, in_channels=3, image_size=size).eval()
    graph = trace(model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    return Subject(name, model, graph, Setting(Target.parse(target), batch, (3, size, size), threads))


def profile_path(one: Subject, folder: Path) -> Path:
    """Where the profile of a network on this machine is kept: those in profiles/ are shipped."""
    return folder / file_name(one.name, one.graph, one.setting, str(environment_of(one.setting.target)["machine"]))


def scores(graph: ChannelGraph, seed: int) -> Floats:
    """Random values of the channels, some groups worth more than others: a ranking that no training has made even."""
    draw = np.random.default_rng(seed)
    groups = draw.lognormal(0.0, 0.5, len(graph.groups))
    return np.asarray(draw.lognormal(0.0, 1.0, graph.channels) * groups[graph.group_of])
