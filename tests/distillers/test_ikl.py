import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.ikl import difference_loss, difference_per_sample, ikl_loss

from . import examples
from .golden_more import Case, cases, check


def weights(case: Case, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """q of each sample of a golden case."""
    if case.arguments.pop("class_prior"):
        del case.arguments["weight_temperature"]
        return given["prior"][given["target"]]
    return F.softmax(given["teacher"] / case.arguments.pop("weight_temperature"), dim=1)


@pytest.mark.parametrize("case", cases("dkl", "ikl"))
def test_loss_is_the_published_code_s(case):
    given = case.tensors("student")
    check(case, ikl_loss(given["student"], given["teacher"], weights(case, given), **case.arguments), given)


def test_the_difference_is_the_sum_over_pairs_of_classes():
    student, teacher, q = (examples.logits(seed, 3, 5) for seed in range(3))
    q = q.softmax(dim=1) * 2
    difference = teacher - student
    expected = [
        sum(
            float(q[b, j] * q[b, k] * (difference[b, j] - difference[b, k]) ** 2) / 4
            for j in range(5)
            for k in range(5)
        )
        for b in range(3)
    ]
    found = difference_per_sample(student, teacher, q)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert difference_loss(student, student + 7.0, q).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", ["ikl", "gkl"])
def test_the_prior_is_the_mean_prediction_of_each_class_in_the_epoch_before(method):
    distiller = examples.build(method, class_prior=True, weight_temperature=2.0)
    classes = examples.CLASSES
    before = torch.full((classes, classes), 1 / classes)  # of the first epoch; a class that is not seen keeps its row
    for number, seeds in ((1, (0, 1)), (2, (2,)), (3, (3, 4, 5))):
        predictions, targets = [], []
        for seed in seeds:
            batch = examples.batch(seed, 5)
            signals = distiller(batch, examples.epoch(number)).signals
            torch.testing.assert_close(distiller.class_weights(signals), before[batch.target])
            predictions.append((signals.teacher_logits / 2).softmax(dim=1))
            targets.append(batch.target)
            distiller.after_step(signals)
        for row in range(classes):
            own = torch.cat(predictions)[torch.cat(targets) == row]
            before[row] = own.mean(dim=0) if len(own) else before[row]


def test_without_a_prior_nothing_is_kept():
    assert not [name for name, _ in examples.build("ikl", class_prior=False).named_buffers() if "prior" in name]
    assert not [name for name, _ in examples.build("ikl", beta=0.0).named_buffers() if "prior" in name]
