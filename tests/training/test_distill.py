"""Knowledge distillation, against numbers written out and on a real epoch."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipdeploy.training.distill import Teacher
from chipdeploy.training.loop import Silent, evaluate, train_epoch
from chipdeploy.training.splits import MemorySplit

LABELS = torch.tensor([0, 1])


def test_the_loss_is_the_labels_and_the_teachers_answers():
    logits, told = torch.zeros(2, 2), torch.tensor([[4 * log(3.0), 0.0], [0.0, 4 * log(3.0)]])
    teacher = Teacher(nn.Identity(), 0.7, 4.0)
    # At T = 4 the teacher says 3/4 and 1/4, the student 1/2 each.
    apart = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    assert float(teacher.loss(logits, LABELS, told)) == pytest.approx(0.3 * log(2) + 0.7 * 16 * apart, rel=1e-6)


def test_a_student_that_agrees_learns_from_the_labels_alone():
    logits = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    loss = Teacher(nn.Identity(), 0.7, 4.0).loss(logits, LABELS, logits)
    assert float(loss) == pytest.approx(0.3 * float(F.cross_entropy(logits, LABELS)), rel=1e-6)


class Bright(nn.Module):
    """Says 1 for bright images, for certain."""

    def forward(self, images):
        bright = images.mean((1, 2, 3)) * 20
        return torch.stack([-bright, bright], dim=1)


def test_with_all_weight_on_the_teacher_wrong_labels_teach_nothing():
    labels = torch.arange(256) % 2
    images = (labels * 200 + 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 1).contiguous()
    right, wrong = (MemorySplit(images, chosen, (0.5,), (0.5,)) for chosen in (labels, 1 - labels))
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    optimizer, cpu = torch.optim.SGD(student.parameters(), lr=1.0), torch.device("cpu")
    settings = {"batch": 16, "seed": 0, "device": cpu, "watcher": Silent()}
    train_epoch(student, wrong, optimizer, lambda _: 0.5, **settings, teacher=Teacher(Bright().eval(), 1.0, 4.0))
    assert evaluate(student, right, cpu) == 1.0
    train_epoch(student, wrong, optimizer, lambda _: 0.5, **settings)
    assert evaluate(student, right, cpu) == 0.0
