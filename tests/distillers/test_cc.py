"""CC against published values, a plain loop and finite differences; its embeddings."""

import pytest
import torch
from torch import nn

from mdistill.distillers.cc import cc_loss

from . import examples, golden_features


@pytest.mark.parametrize("row", golden_features.cases("cc"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    embedded = []
    for side in ("student", "teacher"):
        layer = nn.Linear(given[f"{side}_pooled"].shape[1], int(golden_features.arguments(row)["dim"]))
        given |= golden_features.fill(layer, given, f"{side}_embed.")
        embedded.append(layer(given[f"{side}_pooled"]))
    golden_features.check(row, cc_loss(*embedded), given)


def test_equals_a_loop():
    student, teacher = examples.logits(0, 5, 3), examples.logits(1, 5, 3)
    gaps = [
        [abs(s - t) for s, t in zip(*pair, strict=True)]
        for pair in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    expected = sum(gaps[b][k] * gaps[b + 1][k] for b in range(4) for k in range(3)) / 4
    assert cc_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_equals_finite_differences():
    pair = (examples.logits(seed, 4, 3).requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(cc_loss, tuple(pair))


def test_a_batch_of_1_has_no_neighbours():
    student = examples.logits(0, 1, 3).requires_grad_()
    value = cc_loss(student, examples.logits(1, 1, 3))
    value.backward()
    assert value == 0
    assert student.grad.abs().max() == 0


def test_both_embeddings_are_trained_and_left_out_at_inference():
    distiller = examples.build("cc")
    trained = {id(parameter) for group in distiller.param_groups() for parameter in group["params"]}
    own = [*distiller.student_embed.parameters(), *distiller.teacher_embed.parameters()]
    assert [tuple(parameter.shape) for parameter in own] == [(3, 5), (3,), (3, 5), (3,)]
    assert {id(parameter) for parameter in own} < trained
    assert distiller.students() == {"student": distiller.student}
