"""SGD that moves convolutions by orthogonal matrices: short trainings learn more in the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from chipdeploy.training.autocast import autocast

SINGULAR_STEPS, QUINTIC = 5, (3.4445, -4.7750, 2.0315)  # of Muon: all singular values to about 1
LENGTH_PACE = 8.0  # a gradient is mostly across the weights; without norms, lengths learn too little at 1
LEAST = 1e-12  # length by which nothing is divided

Moves = list[tuple[Tensor, Tensor]]  # parameters, and where their momentum goes


class OrthogonalSGD(Optimizer):
    """SGD with Nesterov momentum; what moves a convolution is made orthogonal first.

    A kernel is a matrix W, [out, in · height · width]. Its momentum step becomes the nearest matrix O of orthogonal
    rows or columns, by Newton-Schulz iterations (Muon: Jordan et al., 2024, kellerjordan.github.io/posts/muon), and as
    long as a share η of the weights (as in Fromage: Bernstein et al., 2020, arXiv 2002.03432): W turns to
    W − η ‖W‖ O / ‖O‖. Its length is moved by the gradient G alone, by the factor exp(−8 η cos(G, W)), so it stays where
    a norm follows. All directions of a kernel learn at one pace, whatever the scale of its weights, which need no
    decay. Other parameters, depthwise kernels among them, are moved by plain SGD.

    Args:
        model: whose parameters are trained.
        lr: learning rate of plain SGD; its group may hold a tensor, [], in its place.
        pace: η is this share of the learning rate.
        momentum, weight_decay: as in `torch.optim.SGD`; the decay is of the other parameters alone.
    """

    def __init__(self, model: nn.Module, *, lr: float, pace: float, momentum: float, weight_decay: float) -> None:
        kernels = {id(one) for one in _kernels(model)}
        groups: list[dict[str, Any]] = [
            {"params": [], "pace": 0.0, "weight_decay": weight_decay},
            {"params": [], "pace": pace, "weight_decay": 0.0},
        ]
        for parameter in model.parameters():
            groups[id(parameter) in kernels]["params"].append(parameter)
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all parameters that have a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [one for one in group["params"] if one.grad is not None]
            if not moved:
                continue
            directions = self._directions(moved, group)
            if group["pace"]:
                _turn(list(zip(moved, directions, strict=True)), group["lr"] * group["pace"])
            else:
                _move(moved, directions, group["lr"])
        return loss

    def _directions(self, moved: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Nesterov's steps, as `torch.optim.SGD` takes them; all at once, for a GPU waits for every launch."""
        gradients = [one.grad for one in moved if one.grad is not None]
        gradients = list(torch._foreach_add(gradients, moved, alpha=group["weight_decay"]))
        for parameter in moved:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in moved]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))


def _kernels(model: nn.Module) -> Iterator[Tensor]:
    """Kernels that are matrices; a depthwise one is a filter for each channel."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and (module.groups == 1 or module.weight.shape[1] > 1):
            yield module.weight


def _move(moved: list[Tensor], directions: list[Tensor], rate: float | Tensor) -> None:
    """The last part of a step of SGD."""
    if isinstance(rate, Tensor):  # it is not known to the host
        torch._foreach_mul_(directions, rate)
        rate = 1.0
    torch._foreach_sub_(moved, directions, alpha=rate)


def _turn(moves: Moves, share: float | Tensor) -> None:
    """Turn kernels by a share of their own length; those of one shape together, for a GPU's sake."""
    for alike in _by_shape(moves):
        kernels = _matrices(kernel for kernel, _ in alike)
        gradients = _matrices(kernel.grad for kernel, _ in alike if kernel.grad is not None)
        turned = _unit(orthogonal(_matrices(direction for _, direction in alike)))
        lengths = _lengths(kernels)
        # The gradient's own, without momentum: steps of before are of other weights, and lengthen these.
        along = (_unit(kernels) * _unit(gradients)).sum(dim=(1, 2), keepdim=True)
        # Weights that are all 0 have no length to take a share of, and get one.
        some = lengths > 0
        kernels -= turned * torch.where(some, lengths, 1.0) * share
        kernels = torch.where(some, _unit(kernels) * lengths * torch.exp(-along * LENGTH_PACE * share), kernels)
        shape = alike[0][0].shape
        torch._foreach_copy_([kernel for kernel, _ in alike], list(kernels.reshape(-1, *shape)))


def _matrices(tensors: Iterable[Tensor]) -> Tensor:
    """Kernels of one shape as matrices [N, out, in · height · width], a copy."""
    return torch.stack([tensor.flatten(1) for tensor in tensors])


def _unit(matrices: Tensor) -> Tensor:
    return matrices / _lengths(matrices).clamp(min=LEAST)


def _lengths(matrices: Tensor) -> Tensor:
    """Frobenius norms of matrices [N, rows, columns], as [N, 1, 1]."""
    found: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return found


def _by_shape(moves: Moves) -> Iterable[Moves]:
    found: dict[torch.Size, Moves] = {}
    for move in moves:
        found.setdefault(move[0].shape, []).append(move)
    return found.values()


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices [N, rows, columns] whose singular values are all 1, float32.

    They come out between 0.5 and 1.5, by a quintic iteration that is steep at 0, which is as good for training.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=LEAST)
    a, b, c = QUINTIC
    with autocast(matrices.device):
        for _ in range(SINGULAR_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
