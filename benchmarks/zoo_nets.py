"""The networks of the zoo: the committed list and how it was made, and how each is built.

The list holds all of torchvision's classifiers, and of timm the smallest network of every model file, and MORE.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIST = Path(__file__).with_name("zoo_models.json")
SOURCES = ("torchvision", "timm")
CLASSES = 10
SIZES = (64, 96, 128, 160, 192, 224, 256)  # pixels, the smallest that runs is taken
GIANT = 180_000_000  # parameters, from which a narrow replica is computed, and the network itself traced by shapes only
GAINS = (1.4, 2.0, 1.0, 3.0, 4.0, 0.7)  # of random weights; the first at which the output hears everything is taken
# Kinds of blocks that the smallest member of their file does not have.
MORE = (
    "beitv2_base_patch16_224",
    "botnet26t_256",
    "caformer_s18",
    "coatnet_pico_rw_224",
    "convformer_s18",
    "convnextv2_atto",
    "darknet17",
    "ecaresnet26t",
    "efficientnet_lite0",
    "fbnetc_100",
    "fbnetv3_b",
    "gcresnext26ts",
    "gernet_s",
    "ghostnetv2_100",
    "gmixer_12_224",
    "lambda_resnet26t",
    "mixnet_s",
    "mobilenetv4_conv_small",
    "mobilevitv2_050",
    "nf_resnet26",
    "poolformer_s12",
    "regnety_002",
    "regnetz_b16",
    "repvgg_a0",
    "resmlp_12_224",
    "resnet26d",
    "seresnext26t_32x4d",
    "skresnext50_32x4d",
    "tinynet_e",
    "twins_svt_small",
)


@dataclass(frozen=True)
class Net:
    """A network of the list.

    Args:
        image: height and width that it is tested at, pixels.
        options: of its constructor.
        replica: options of the narrow copy that stands in for a giant; empty for all others.
        note: what is special about it.
    """

    name: str
    source: str
    image: int
    options: dict[str, Any] = field(default_factory=dict)
    replica: dict[str, Any] = field(default_factory=dict)
    note: str = ""


# Giants: all their blocks, but a fraction of their width.
REPLICAS: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"image": 56, "img_size": 56, "embed_dim": 256},
    "convnext_large": {"image": 64, "widths": [24, 48, 96, 192]},
    "regnet_y_128gf": {"image": 64, "w_0": 56, "w_a": 20.0, "group_width": 16},
    "vit_h_14": {"image": 56, "hidden_dim": 160, "mlp_dim": 320},
    "vit_l_16": {"image": 64, "hidden_dim": 128, "mlp_dim": 256},
    "vit_l_32": {"image": 128, "hidden_dim": 128, "mlp_dim": 256},
}


def read_list() -> list[Net]:
    """The committed list."""
    return [Net(**entry) for entry in json.loads(LIST.read_text())]


def write_list() -> None:
    """Make the list anew; takes some minutes."""
    nets = [*_torchvision(), *_timm()]
    lines = [json.dumps({key: value for key, value in asdict(net).items() if value}) for net in nets]
    LIST.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def build(net: Net, *, replica: bool = False) -> nn.Module:
    """The network with CLASSES outputs and its own initial weights, in eval mode, on the device in effect."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if replica and net.source == "torchvision":
            return _narrow(net).eval()
        return _make(net.name, net.source, {**net.options, **(net.replica if replica else {})}).eval()


def _make(name: str, source: str, options: dict[str, Any]) -> nn.Module:
    kept = {key: value for key, value in options.items() if key != "image"}
    if source == "timm":
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **kept)
        return model
    import torchvision

    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **slow, **kept)
    return network


def _narrow(net: Net) -> nn.Module:
    """The replica of a torchvision giant."""
    from torchvision.models import convnext, regnet, vision_transformer

    options = net.replica
    if net.name == "convnext_large":
        one, two, three, four = options["widths"]
        blocks = [
            convnext.CNBlockConfig(one, two, 3),
            convnext.CNBlockConfig(two, three, 3),
            convnext.CNBlockConfig(three, four, 27),
            convnext.CNBlockConfig(four, None, 3),
        ]
        model: nn.Module = convnext.ConvNeXt(blocks, num_classes=CLASSES)
    elif net.name == "regnet_y_128gf":
        sizes = regnet.BlockParams.from_init_params(
            depth=27,
            w_0=options["w_0"],
            w_a=options["w_a"],
            w_m=2.52,
            group_width=options["group_width"],
            se_ratio=0.25,
        )
        model = regnet.RegNet(sizes, num_classes=CLASSES)
    else:
        whole = build_on_meta(net)
        model = vision_transformer.VisionTransformer(
            image_size=options["image"],
            patch_size=whole.patch_size,
            num_layers=len(whole.encoder.layers),
            num_heads=whole.encoder.layers[0].num_heads,
            hidden_dim=options["hidden_dim"],
            mlp_dim=options["mlp_dim"],
            num_classes=CLASSES,
        )
    return model


def build_on_meta(net: Net) -> Any:
    """The network without any memory for its weights."""
    try:
        with torch.device("meta"):
            return build(net)
    except NotImplementedError:  # its constructor computes widths with tensors
        return build(net).to("meta")


def images(size: int, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def _torchvision() -> Iterator[Net]:
    import torchvision

    for name in sorted(torchvision.models.list_models(module=torchvision.models)):
        sized = "image_size" if name.startswith("vit_") else None
        own = {"inception_v3": 299, "vit_h_14": 224}.get(name, 224)
        yield _listed(name, "torchvision", sized, own)


def _timm() -> Iterator[Net]:
    import timm

    for name in sorted({*_smallest_of_files(), *MORE}):
        own = timm.create_model(name).default_cfg["input_size"][-1]
        yield _listed(name, "timm", "img_size", own)


def _smallest_of_files() -> list[str]:
    """Of every file of timm's models, the network with the fewest parameters; timm's own test networks left out."""
    import timm
    from timm.models import _registry

    files: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        if not name.startswith("test_") and not name.endswith("_enc"):  # the latter have no classifier
            size = parameters(build_on_meta(Net(name, "timm", 0)))
            file = _registry._model_to_module[name]
            files[file] = min(files.get(file, (size, name)), (size, name))
    return [name for _, name in files.values()]


def _listed(name: str, source: str, sized: str | None, own: int) -> Net:
    """The network at the smallest image that it takes."""
    whole = Net(name, source, own)
    if parameters(build_on_meta(whole)) > GIANT:
        return Net(name, source, own, replica=REPLICAS.get(name, {}), note="shapes only; computed on a narrow replica")
    for size in [size for size in SIZES if size < own]:
        for options in ({}, {sized: size}) if sized else ({},):
            if runs(lambda size=size, options=options: Net(name, source, size, options)):  # type: ignore[misc]
                return Net(name, source, size, options)
    return whole


def runs(make: Callable[[], Net]) -> bool:
    """Whether a network takes its images and classifies them."""
    try:
        net = make()
        with torch.no_grad():
            output = build(net)(images(net.image))
    except Exception:  # networks refuse a size in many ways
        return False
    return isinstance(output, Tensor) and output.shape == (2, CLASSES) and bool(output.isfinite().all())


def parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    write_list()
