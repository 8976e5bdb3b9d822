"""Orthogonal steps: against plain SGD, against the formula with an exact singular value decomposition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipdeploy.training.orthogonal import OrthogonalSGD, orthogonal


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def images(seed):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def backward(model, seed):
    model.zero_grad()
    model(images(seed)).square().mean().backward()


@pytest.mark.parametrize("shape", [(3, 4, 30), (2, 30, 4), (1, 8, 8)])
def test_singular_values_come_to_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e3
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert orthogonal(matrices).dtype == torch.float32
    assert values.min() > 0.4 and values.max() < 1.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    alike = torch.nn.functional.cosine_similarity(orthogonal(matrices).flatten(1), (left @ right).flatten(1))
    assert alike.min() > 0.95


def test_matrices_of_a_batch_do_not_touch_each_other():
    matrices = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    scaled = matrices * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1)
    torch.testing.assert_close(orthogonal(scaled), orthogonal(matrices), rtol=0.02, atol=0.02)


def test_all_but_mixing_kernels_move_as_in_sgd():
    model, other = network(), network()
    ours = OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for step in range(3):
        backward(other, step)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.grad = theirs.grad.clone()
        # Both see the same gradients, though their first kernels part.
        ours.step()
        sgd.step()
    kernel, *rest = zip(model.parameters(), other.parameters(), strict=True)
    assert not torch.allclose(*kernel)
    for mine, theirs in rest:
        torch.testing.assert_close(mine, theirs)


def test_a_stem_of_one_channel_is_no_depthwise_kernel():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2))
    optimizer = OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=0.01)
    others, kernels = (group["params"] for group in optimizer.param_groups)
    assert [one is kernel for one, kernel in zip(kernels, (model[0].weight, model[2].weight), strict=True)] == [
        True
    ] * 2
    assert model[1].weight in set(others)


def test_a_kernel_goes_a_share_of_its_length():
    model = network()
    kernel = model[0].weight
    before = kernel.detach().clone()
    backward(model, 0)
    OrthogonalSGD(model, lr=0.5, pace=0.2, momentum=0.9, weight_decay=0.01).step()
    left, _, right = torch.linalg.svd(kernel.grad.flatten(1), full_matrices=False)
    step = -(left @ right).reshape(kernel.shape) * before.norm() / (left @ right).norm()
    expected = before + 0.1 * step
    expected *= before.norm() / expected.norm()
    moved = kernel.detach() - before
    assert float(moved.norm() / before.norm()) == pytest.approx(0.1, rel=0.05)
    assert float(F.cosine_similarity(moved.flatten(), (expected - before).flatten(), dim=0)) > 0.95


def test_a_kernel_before_a_norm_keeps_its_length():
    """The steps point away from it: lengthened by a factor each time, a network overflows in 25,000 of them."""
    model = network()
    kernel = model[0].weight
    length = float(kernel.detach().norm())
    optimizer = OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=0.0)
    for step in range(300):
        backward(model, step)
        optimizer.step()
    assert float(kernel.detach().norm()) == pytest.approx(length, rel=0.01)


def test_without_a_norm_the_gradient_moves_a_kernels_length():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False))
    kernel = model[0].weight
    optimizer = OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=0.0)
    for sign in (1.0, -1.0):
        length = float(kernel.detach().norm())
        kernel.grad = sign * kernel.detach().clone()
        optimizer.step()
        assert float(kernel.detach().norm()) == pytest.approx(length * math.exp(-8 * 0.1 * 0.3 * sign), rel=1e-4)


def test_weights_of_any_scale_go_alike():
    """A norm follows the kernel: its scale changes nothing in the network, nor may it in the training."""
    outputs = []
    for scale in (1.0, 8.0):
        model = network().double()
        with torch.no_grad():
            model[0].weight *= scale
            model[1].eps = 1e-12
        optimizer = OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=0.0)
        for step in range(3):
            model.zero_grad()
            model(images(step).double()).square().mean().backward()
            optimizer.step()
        outputs.append(model(images(9).double()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.01)


def test_weights_and_gradients_of_zero_are_survived():
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = OrthogonalSGD(model, lr=0.1, pace=0.3, momentum=0.9, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not model[0].weight.any()
    model[0].weight.grad.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert model[0].weight.isfinite().all() and model[0].weight.any()
