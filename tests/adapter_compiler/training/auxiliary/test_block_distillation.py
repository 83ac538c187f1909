"""Block-wise distillation is the paper's cosine loss, trains the chosen tokens, and says what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError


def make() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), nn.Sequential(
        nn.Linear(4, 5), nn.Linear(5, 5)
    ).double()


X, IMAGES = torch.randn(2, 4, 6).double(), torch.randn(2, 3, 4).double()
MASK = torch.tensor([[True, True, True, False], [False, True, True, True]])


def test_the_loss_is_that_of_the_paper() -> None:
    student, teacher = make()
    distillation = ac.BlockDistillation(student, teacher, {"0": "0", "1": "1"}, width=6, teacher_width=5).double()
    student(X)
    with torch.no_grad():
        teacher(IMAGES)
    found = distillation(MASK)
    terms: list[Tensor] = []
    h, v = X, IMAGES
    for i in range(2):
        h, v = student[i](h), teacher[i](v)
        for b in range(2):
            for own, other in zip(h[b][MASK[b]], v[b], strict=True):
                projected = distillation.heads[i](own)
                terms.append(1 - projected @ other / (projected.norm() * other.norm()))
    torch.testing.assert_close(found, torch.stack(terms).mean())


def test_an_adapted_student_comes_nearer_to_its_teacher() -> None:
    student, teacher = make()
    adapted = ac.compile_with_adapters(student, (X,), config=ac.AdapterConfig(kind="lora", rank=3))
    distillation = ac.BlockDistillation(adapted, teacher, {"1": "1"}, width=6, teacher_width=5).double()
    optimizer = torch.optim.Adam([*adapted.trainable_parameters(), *distillation.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        adapted(X)
        with torch.no_grad():
            teacher(IMAGES)
        loss = distillation(MASK)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
    distillation.detach()
    adapted(X)
    with pytest.raises(ConfigError, match="the student's 1 was not called"):
        distillation(MASK)


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = make()
    with pytest.raises(ConfigError, match="expected a teacher's block for at least one block"):
        ac.BlockDistillation(student, teacher, {}, width=6, teacher_width=5)
    with pytest.raises(ConfigError, match="the teacher has no submodule '7'"):
        ac.BlockDistillation(student, teacher, {"0": "7"}, width=6, teacher_width=5)
    distillation = ac.BlockDistillation(student, teacher, {"0": "0"}, width=6, teacher_width=5).double()
    student(X)
    with pytest.raises(ConfigError, match="the teacher's 0 was not called"):
        distillation(MASK)
    teacher(IMAGES)
    with pytest.raises(ConfigError, match="the mask chooses 8 tokens of 0, 0 of the teacher has 6"):
        distillation(torch.ones_like(MASK))
