"""Classifiers to prune, a file a family; `build_model` finds them by name."""

# Importing a family registers its names.
from chipdeploy.training.models import cifar_resnet, mobilenet, preresnet, resnet, wideresnet
from chipdeploy.training.models.cifar_resnet import PadShortcut
from chipdeploy.training.models.registry import Factory, build_model, model_names, register

__all__ = [
    "Factory",
    "PadShortcut",
    "build_model",
    "cifar_resnet",
    "mobilenet",
    "model_names",
    "preresnet",
    "register",
    "resnet",
    "wideresnet",
]
