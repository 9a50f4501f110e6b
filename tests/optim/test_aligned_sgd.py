"""AlignedSGD against the projection written out; its messages and its captured step are with DOT's in test_solvers."""

import pytest
import torch
from torch import Tensor, nn

from mdistill.optim.aligned_sgd import AlignedSGD, aligned
from mdistill.optim.solvers import SGD

from .test_solvers import SLOW, STEPS, assert_close, losses, make_groups, make_weights, output, rate, train

SETTINGS = {"momentum": 0.9, "weight_decay": 5e-4}


def numbers(*values: float | None) -> list[Tensor | None]:
    return [None if value is None else torch.tensor([value], dtype=torch.float64) for value in values]


def test_alignment_by_hand() -> None:
    """Task (1, 2, -, -), distillation (-3, -, 4, -): the product is -3, the square 5, so 3/5 of the task is added.

    (1, 2, 0) + (-3, 0, 4) + 3/5 (1, 2, 0) = (-1.4, 3.2, 4), which has the product 5 with the task that it had before.
    """
    found = aligned(numbers(1, 2, None, None), numbers(-3, None, 4, None))
    assert found[3] is None
    torch.testing.assert_close(found[:3], numbers(-1.4, 3.2, 4.0))


@pytest.mark.parametrize("distillation", [(3, None, 4), (None, None, 4), (0, None, 4)])
def test_without_conflict_gradients_are_added(distillation: tuple[float | None, ...]) -> None:
    found = aligned(numbers(1, 2, None), numbers(*distillation))
    torch.testing.assert_close(found, numbers(1 + (distillation[0] or 0), 2, 4), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e12])
def test_a_task_gradient_of_any_size_takes_no_more_than_there_is(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    task, distillation = ([torch.randn(3, 4, generator=generator) for _ in range(2)] for _ in range(2))
    product = sum((t * d).sum() for t, d in zip(task, distillation, strict=True))
    task = [-torch.sign(product) * scale * t for t in task]
    before = torch.stack(task)
    of_distillation = torch.stack([each for each in aligned(task, distillation) if each is not None]) - before
    assert of_distillation.isfinite().all()
    assert of_distillation.norm() <= (1 + 1e-6) * torch.stack(distillation).norm() + 1e-6 * before.norm()


def by_hand(lr: float, velocities: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """New velocities and weights: gradients as one vector each, zeros where a loss does not reach."""
    leaves = [weight.clone().requires_grad_() for weight in weights]
    found = losses(leaves)
    vectors = []
    for terms in (found.task, found.distillation):
        grads = torch.autograd.grad(sum(terms.values()), leaves, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
        vectors.append(torch.cat([grad.flatten() for grad in filled]))
    task, distillation = vectors
    if (product := distillation @ task) < 0:
        distillation = distillation - product / (task @ task) * task
    parts = torch.split(task + distillation, [weight.numel() for weight in weights])
    for number, part in enumerate(parts[:-1]):  # neither loss reaches the last weight
        decayed = part.view_as(weights[number]) + SETTINGS["weight_decay"] * weights[number]
        velocities[number] = SETTINGS["momentum"] * velocities[number] + decayed
        weights[number] = weights[number] - lr * (0.1 if number == SLOW else 1.0) * velocities[number]
    return velocities, weights


def test_steps_equal_the_update_written_out() -> None:
    found = make_weights()
    train(AlignedSGD(make_groups(found), **SETTINGS), found)
    weights = [weight.detach() for weight in make_weights()]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for step in range(STEPS):
        velocities, weights = by_hand(rate(step), velocities, weights)
    assert_close(found, weights)
    plain = make_weights()
    train(SGD(make_groups(plain), **SETTINGS), plain)
    assert not any(
        torch.equal(one, other) for one, other in zip(found[:3], plain[:3], strict=True)
    )  # there is conflict


def test_the_aligned_gradient_is_what_is_clipped() -> None:
    """Task 2 w, distillation -6 w from w = 1: aligned 2, no longer than 1."""
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    solver = AlignedSGD([{"params": [weight]}], momentum=0.0, weight_decay=0.0, clip_grad_norm=1.0)
    solver.set_lr(0.5)
    solver.step(output({"t": weight.square()}, {"d": -3 * weight.square()}))
    assert float(weight.detach()) == pytest.approx(0.5, rel=1e-6)
