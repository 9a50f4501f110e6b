"""What teacher logits are stored as: rows against plain loops, and what comes back of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistill.config import RunConfig
from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.la import la_loss
from mdistill.distillers.nkd import nkd_loss
from mdistill.distillers.rld import rld_loss
from mdistill.engine.logit_cache import LogitCache
from mdistill.engine.logit_formats import Dense, LogitFormat, Sparse, format_of
from mdistill.errors import UserError

from ..host_reads import NoHostReads

CLASSES = 40


def drawn(images: int, classes: int = CLASSES, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits, and true classes of which some are likely and some are not."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator)
    likely = torch.rand(images, generator=generator) < 0.5
    target = torch.where(likely, logits.argmax(dim=1), torch.randint(classes, (images,), generator=generator))
    return logits, target


def returned(form: LogitFormat, logits: Tensor, target: Tensor) -> Tensor:
    return form.decode(form.encode(logits, target), target).float()


def half(value: float) -> float:
    return float(np.float16(max(value, -65504.0)))


def plain_pseudo_logits(logits: list[float], target: int, top_k: int) -> list[float]:
    """Of one image, class by class in float64."""
    largest = max(logits)
    total = sum(math.exp(value - largest) for value in logits)
    log_probs = [value - largest - math.log(total) for value in logits]
    stored = set(sorted(range(len(logits)), key=lambda number: (-logits[number], number))[:top_k]) | {target}
    others = [number for number in range(len(logits)) if number not in stored]
    if not others:
        return [half(value) for value in log_probs]
    share = half(math.log(sum(math.exp(log_probs[number]) for number in others))) - math.log(len(others))
    return [half(value) if number in stored else share for number, value in enumerate(log_probs)]


@pytest.mark.parametrize("top_k", [1, 2, 7, 38, 39, 40])
def test_pseudo_logits_are_those_of_a_plain_loop(top_k: int) -> None:
    """Also with one class left, and none; the true class inside and outside of the top."""
    logits, target = drawn(24)
    expected = [plain_pseudo_logits(*row, top_k) for row in zip(logits.double().tolist(), target.tolist(), strict=True)]
    found = returned(Sparse(CLASSES, top_k), logits, target)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2**-10, atol=2**-20)
    inside = (logits >= logits.gather(1, target[:, None])).sum(dim=1) <= top_k
    assert inside.any()
    assert (~inside).any() or top_k > 30


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 50.0])
def test_the_mass_is_1_to_the_precision_of_float16(scale: float) -> None:
    logits, target = drawn(64, scale=scale)
    mass = returned(Sparse(CLASSES, 6), logits, target).double().exp().sum(dim=1)
    assert ((mass - 1).abs() < 2**-8).all()


def test_with_all_classes_the_log_probabilities_come_back_rounded() -> None:
    logits, target = drawn(16)
    rounded = F.log_softmax(logits, dim=1).half().float()
    assert torch.equal(returned(Sparse(CLASSES, CLASSES), logits, target), rounded)


def test_of_equal_logits_the_lower_classes_are_kept() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 1.0], [0.0] * 6])
    form = Sparse(6, 3)
    rows = form.encode(logits, torch.tensor([0, 5]))
    assert rows[:, 3:6].tolist() == [[1, 3, 4], [0, 1, 2]]
    found = form.decode(rows, torch.tensor([0, 5]))
    assert found[0, 2] == found[0, 5]  # the two that are left share
    torch.testing.assert_close(found[1], torch.full((6,), -math.log(6)), rtol=1e-3, atol=0)


def test_classes_up_to_the_last_of_16_bits_are_told_apart() -> None:
    logits = torch.zeros(3, 2**16)
    best = torch.tensor([32_767, 32_768, 65_535])
    logits[torch.arange(3), best] = 30.0
    assert returned(Sparse(2**16, 2), logits, torch.zeros(3, dtype=torch.int64)).argmax(dim=1).tolist() == best.tolist()


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e30])
def test_logits_of_any_size_come_back_finite_with_their_best_class(scale: float) -> None:
    logits, target = drawn(32, scale=scale)
    found = returned(Sparse(CLASSES, 5), logits, target)
    assert found.isfinite().all()
    assert torch.equal(found.argmax(dim=1), logits.argmax(dim=1))
    loss = rld_loss(logits.clamp(-1e4, 1e4), found, target, alpha=1.0, beta=1.0, temperature=1.0)
    assert loss.isfinite()


LOSSES: dict[str, Any] = {
    "kd": lambda student, teacher, target: kd_loss(student, teacher, temperature=1.0),
    "la": lambda student, teacher, target: la_loss(student, teacher, target, temperature=1.0),
    "dkd": lambda *given: dkd_loss(*given, alpha=1.0, beta=0.5, temperature=1.0),
    "nkd": lambda *given: nkd_loss(*given, gamma=1.0, temperature=1.0),
    "rld": lambda *given: rld_loss(*given, alpha=1.0, beta=0.5, temperature=1.0),
}


def gradient(loss: str, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(LOSSES[loss](student, teacher, target), student)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_losses_at_temperature_1_hardly_change_for_sharp_logits(loss: str) -> None:
    """About 0.3 % of the mass is outside the 50 largest of 1,000 classes."""
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(64, 1000, generator=generator).argsort(dim=1)
    teacher = -2.6 * (1.0 + torch.arange(1000.0)).log().expand(64, -1) + 0.5 * torch.randn(
        64, 1000, generator=generator
    )
    teacher = teacher.gather(1, places)
    target = torch.where(torch.rand(64, generator=generator) < 0.8, teacher.argmax(dim=1), places.argmin(dim=1))
    student = 0.7 * teacher + torch.randn(64, 1000, generator=generator)
    exact = gradient(loss, student, teacher, target)

    def error(form: LogitFormat) -> float:
        return float((gradient(loss, student, returned(form, teacher, target), target) - exact).norm() / exact.norm())

    assert error(Sparse(1000, 50)) < 0.05
    assert error(Sparse(1000, 50)) < error(Sparse(1000, 10)) / 1.5
    assert error(Dense(1000, torch.float16)) < 0.01


@pytest.mark.parametrize("form", [Sparse(CLASSES, 5), Dense(CLASSES, torch.float16)])
def test_nothing_is_read_on_the_host_and_rows_are_independent(form: LogitFormat) -> None:
    logits, target = drawn(9)
    with NoHostReads():
        rows = form.encode(logits, target)
        found = form.decode(rows, target)
    assert rows.shape == (9, form.width)
    assert rows.dtype == form.dtype
    assert found.shape == logits.shape
    for number in range(9):
        one = slice(number, number + 1)
        assert torch.equal(form.encode(logits[one], target[one]), rows[one])
        assert torch.equal(form.decode(rows[one], target[one]), found[one])


def test_rows_come_back_from_files(tmp_path: Path) -> None:
    form = Sparse(CLASSES, 5)
    logits, target = drawn(50)
    rows = form.encode(logits, target)
    shape: dict[str, Any] = {"entries": 80, "width": form.width, "dtype": form.dtype}
    cache = LogitCache(tmp_path, form.identity, **shape)
    ids = np.random.default_rng(0).permutation(80)[:50].astype(np.int64)
    cache.write(ids, rows, np.zeros(50, np.bool_))
    again = LogitCache(tmp_path, form.identity, **shape)
    assert torch.equal(again.read(ids), rows)
    assert torch.equal(form.decode(again.read(ids), target), form.decode(rows, target))
    assert LogitCache(tmp_path, Sparse(CLASSES + 1, 5).identity, **shape).filled == 0  # rows of the same width
    assert LogitCache.size(1, form.width, form.dtype) == 4 * 5 + 4 + 9


def test_what_cannot_be_stored_is_one_line() -> None:
    sparse = RunConfig(teacher_logits="sparse", teacher_top_k=10)
    assert isinstance(format_of(sparse, 11), Sparse)
    assert format_of(RunConfig(), 10).name == "float16"
    with pytest.raises(UserError) as caught:
        format_of(sparse, 10)
    assert str(caught.value) == (
        "run.teacher_top_k: should be below the number of classes, 10, found 10; run.teacher_logits=float16 keeps all"
        " classes and takes less"
    )
    with pytest.raises(UserError, match=r"'sparse' holds at most 65,536 classes, found 65,537; take float16"):
        format_of(sparse, 2**16 + 1)
