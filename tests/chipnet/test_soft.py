"""The soft phase on a small network that really learns: the budget is met before the cut, and the cut loses nothing."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import chipdeploy as cd
from chipdeploy import checkpoint
from chipdeploy.chipnet.schedule import PAPER
from chipdeploy.chipnet.soft import ChipNet
from chipdeploy.errors import BudgetError, UsageError
from chipdeploy.graph.plan import group_widths
from chipdeploy.training.models import build_model

STEPS = 120
EXAMPLE = torch.zeros(2, 3, 16, 16)


def batches(count, seed=0):
    """Four classes, told apart by the quadrant that is bright."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, 4, (32,), generator=generator)
        images = 0.5 * torch.randn(32, 3, 16, 16, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 8 * (label // 2), 8 * (label % 2)
            image[:, row : row + 8, column : column + 8] += 1.0
        yield images, labels


def network():
    torch.manual_seed(0)
    return build_model("resnet20", num_classes=4, in_channels=3, image_size=16)


def soft_prune(kind="flops", keep=0.3, steps=STEPS, **options):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    chip = ChipNet(model, EXAMPLE, cd.Budget(kind, keep), steps=steps, **options)
    for images, labels in batches(steps):
        chip.train()
        loss = chip.loss(F.cross_entropy(chip(images), labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        chip.step()
    return chip


@pytest.fixture(scope="module")
def pruned():
    return soft_prune()


def test_the_soft_network_meets_the_budget_before_any_threshold(pruned):
    assert pruned.progress == 1.0
    assert abs(pruned.soft_share() - 0.3) <= 0.02
    assert pruned.crisp() >= 0.99


def test_the_plan_is_never_over_the_budget(pruned):
    widths = group_widths(pruned.graph, pruned.plan().mask(pruned.graph))
    share = pruned.cost.count(widths) / pruned.cost.dense
    assert 0.98 * 0.3 <= share <= 0.3


def test_the_cut_loses_nothing_against_the_soft_network(pruned):
    images, labels = next(batches(1, seed=1))
    pruned.eval()
    small = cd.hard_prune(pruned.folded(), pruned.graph, pruned.plan()).eval()
    with torch.no_grad():
        soft, cut = pruned(images), small(images)
    assert float((soft - cut).abs().max() / soft.abs().max()) < 0.02
    assert torch.equal(soft.argmax(1), cut.argmax(1))
    assert float((cut.argmax(1) == labels).float().mean()) > 0.8  # 0.25 by chance


def test_folding_leaves_the_model_as_it_is(pruned):
    before = copy.deepcopy(pruned.model.state_dict())
    pruned.folded()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.model.state_dict().items())


@pytest.mark.parametrize("kind", ["params", "channels", "volume"])
def test_every_budget_is_met_softly_and_after_the_cut(kind):
    chip = soft_prune(kind, 0.5, steps=60)
    share = chip.cost.count(group_widths(chip.graph, chip.plan().mask(chip.graph))) / chip.cost.dense
    assert abs(chip.soft_share() - 0.5) <= 0.02
    assert share <= 0.5


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_even_the_shortest_phase_ends_under_the_budget(steps):
    chip = soft_prune(steps=steps)
    assert chip.cost.count(group_widths(chip.graph, chip.plan().mask(chip.graph))) <= 0.3 * chip.cost.dense


def test_all_gates_are_open_while_they_listen():
    chip = ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=100)
    images, _ = next(batches(1))
    chip.eval()
    with torch.no_grad():
        assert torch.equal(chip(images), chip.model(images))
    assert chip.loss(torch.tensor(1.5)).item() == 1.5


def test_one_seed_one_plan():
    first, second = soft_prune(steps=30), soft_prune(steps=30)
    assert first.plan() == second.plan()
    assert torch.equal(first.logits, second.logits)


def test_a_checkpoint_holds_all_that_the_gates_need(pruned):
    other = ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=STEPS)
    tensors = checkpoint.pack("chip", pruned) | checkpoint.pack("logits", pruned.optimizer)
    checkpoint.unpack("chip", tensors, other)
    checkpoint.unpack("logits", tensors, other.optimizer)
    assert other.progress == 1.0
    assert torch.equal(other.gates(), pruned.gates())
    assert other.plan() == pruned.plan()


def test_a_copy_in_the_middle_of_training_goes_on_like_the_original():
    chip = soft_prune(steps=30)
    copied = copy.deepcopy(chip)
    assert torch.equal(copied.gates(), chip.gates())
    assert copied.plan() == chip.plan()
    images, _ = next(batches(1))
    assert torch.equal(copied.eval()(images), chip.eval()(images))


def test_crisp_gates_are_counted_as_they_will_be_deployed(pruned):
    fresh = ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=100)
    assert fresh.soft_share() == pytest.approx(1.0, abs=1e-5)  # all gates are open
    deployed = pruned.cost.count(group_widths(pruned.graph, pruned.plan().mask(pruned.graph))) / pruned.cost.dense
    assert pruned.soft_share() == pytest.approx(deployed, abs=2e-3)


def test_a_loss_before_a_forward_pass_and_no_steps_at_all_are_refused():
    chip = ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=100)
    with pytest.raises(UsageError, match="no forward pass yet"):
        chip.loss(torch.tensor(1.0))
    with pytest.raises(UsageError, match="steps must be"):
        ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=0)
    with pytest.raises(UsageError, match="alignment must be 1 or more"):
        ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), align=0)


def test_the_published_schedule_trains_and_its_cut_keeps_the_budget():
    chip = soft_prune(steps=40, schedule=PAPER)
    assert chip.cost.count(group_widths(chip.graph, chip.plan().mask(chip.graph))) <= 0.3 * chip.cost.dense


@pytest.mark.parametrize(
    ("kind", "keep"), [("flops", 0.0), ("flops", 1.0), ("flops", -1.0), ("flops", float("nan")), ("flops", "30%")]
)
def test_a_budget_outside_its_range_is_refused(kind, keep):
    with pytest.raises(UsageError, match="between 0 and 1"):
        cd.Budget(kind, keep)


def test_an_unknown_budget_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="flops, params, channels, volume"):
        cd.Budget("energy", 0.5)


def test_a_budget_below_the_smallest_network_is_refused_with_that_network():
    with pytest.raises(BudgetError, match=r"smallest connected network keeps 0\.\d+%"):
        ChipNet(network(), EXAMPLE, cd.Budget("flops", 1e-5))


def test_the_snippet_of_the_readme_runs():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- snippet:begin -->\n```python\n(.*?)```", readme, flags=re.DOTALL)
    assert match is not None
    code = match.group(1)
    assert len(code.splitlines()) < 15
    names: dict = {}
    exec(code, names)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    small = names["prune"](model, batches(40), optimizer, EXAMPLE, 40)
    assert type(small) is type(model)
    ratio = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert ratio < 0.7
    assert small(EXAMPLE).shape == (2, 4)


class Watched(torch.nn.Module):
    """Keeps an activation for heat maps."""

    def __init__(self, again=False):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)
        self.again = again

    def forward(self, x):
        self.seen = {"first": [F.relu(self.first(x))]}
        x = self.seen["first"][0]
        x = torch.utils.checkpoint.checkpoint(self.second, x, use_reentrant=False) if self.again else self.second(x)
        return x.mean((2, 3))


def test_a_model_may_keep_its_activations():
    model = Watched()
    chip = ChipNet(model, EXAMPLE, cd.Budget("flops", 0.5), steps=2, align=1)
    chip.loss(chip(EXAMPLE).square().mean()).backward()
    chip.step()
    assert model.seen["first"][0].grad_fn is not None
    for one in (chip.folded(early=True), cd.hard_prune(model, chip.graph, chip.plan()), copy.deepcopy(chip).model):
        assert one.seen["first"][0].grad_fn is None
    assert model.seen["first"][0].grad_fn is not None


def test_checkpointed_activations_are_refused_before_they_spoil_a_gradient():
    chip = ChipNet(Watched(again=True), EXAMPLE, cd.Budget("flops", 0.5), steps=2)
    chip.eval()(EXAMPLE)
    with pytest.raises(UsageError, match="checkpoints activations"):
        chip.train()(EXAMPLE)


def loop(passes, steps=20, **options):
    """A phase that ends while the gates listen; `passes(chip, images, labels)` makes the gradients of a step."""
    model = network()
    model.eval()  # norms by their stored statistics: halves of a batch add up to the whole
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    chip = ChipNet(model, EXAMPLE, cd.Budget("flops", 0.3), steps=steps * 20, **options)
    for images, labels in batches(steps):
        optimizer.zero_grad()
        passes(chip, images, labels)
        optimizer.step()
        chip.step()
    return chip


def once(chip, images, labels):
    chip.loss(F.cross_entropy(chip(images), labels)).backward()


def halves(chip, images, labels):
    for part in (slice(0, 16), slice(16, 32)):
        chip.loss(F.cross_entropy(chip(images[part]), labels[part]) / 2).backward()


def logged(chip, images, labels):
    once(chip, images, labels)
    with torch.no_grad():
        chip(images).argmax(1)


def test_what_is_heard_adds_up_over_the_passes_of_a_step():
    heard = loop(once)._heard
    assert heard.sum() > 0
    torch.testing.assert_close(loop(halves)._heard, heard, rtol=1e-3, atol=1e-6)
    assert torch.equal(loop(logged)._heard, heard)


def test_a_gradient_that_is_not_finite_teaches_nothing():
    def overflowing(chip, images, labels):
        once(chip, images, labels)
        if chip._step in (3, 60):
            for leaf in (chip._open, chip.logits):
                if leaf is not None and leaf.grad is not None:
                    leaf.grad[0] = float("inf")
            for weight in chip.model.parameters():
                weight.grad = None  # as GradScaler skips the optimizer's step

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    chip = ChipNet(model, EXAMPLE, cd.Budget("flops", 0.3), steps=STEPS)
    for images, labels in batches(STEPS):
        optimizer.zero_grad()
        overflowing(chip, images, labels)
        optimizer.step()
        chip.step()
    assert chip._heard.isfinite().all()
    assert chip.logits.isfinite().all()
    assert abs(chip.soft_share() - 0.3) <= 0.02


@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_step_without_a_gradient_is_refused(steps):
    chip = ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=steps)
    with torch.no_grad():
        chip(EXAMPLE)
    with pytest.raises(UsageError, match=r"call step\(\) after backward\(\)"):
        chip.step()
    chip(EXAMPLE)
    with pytest.raises(UsageError, match=r"call step\(\) after backward\(\)"):
        chip.step()


def test_a_loop_that_ends_early_is_cut_by_what_was_heard_and_warned():
    chip = loop(once)
    assert chip.listening
    assert not np.allclose(chip.scores(), chip.scores()[0])
    with pytest.warns(UserWarning, match="after 20 of 400 steps.*steps=…"):
        chip.folded()


def test_what_is_no_number_of_steps_and_what_is_wrapped_is_refused():
    for steps in (0, 2.5, "x"):
        with pytest.raises(UsageError, match="steps must be"):
            ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=steps)
    with pytest.raises(UsageError, match="inside DataParallel; make the ChipNet of the model"):
        ChipNet(torch.nn.DataParallel(network()), EXAMPLE, cd.Budget("flops", 0.3))
    assert cd.Budget("flops", np.float32(0.25)).keep == 0.25


WORKER = """
import sys
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path.insert(0, sys.argv[3])
import chipdeploy as cd
from test_soft import EXAMPLE, batches, network

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
chip = cd.ChipNet(network(), EXAMPLE, cd.Budget("flops", 0.3), steps=30)
optimizer = torch.optim.SGD(chip.model.parameters(), lr=0.01)
both = DDP(chip)
for images, labels in batches(30, seed=rank):
    optimizer.zero_grad()
    chip.loss(F.cross_entropy(both(images), labels)).backward()
    optimizer.step()
    chip.step()
print(chip.plan().digest, chip.logits.sum().item(), chip.soft_share())
"""


def test_processes_that_train_together_make_one_plan(tmp_path):
    arguments = [str(tmp_path / "store"), str(Path(__file__).parent)]
    each = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in each)
    assert [process.returncode for process in each] == [0, 0]
    assert first == second != ""
