"""PS-KD against a plain loop over epochs, a case worked by hand, and its properties."""

import copy
from math import log

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.ps_kd import refined_targets, trust
from mdistill.errors import UserError

from . import examples
from . import golden_more as golden


def test_the_share_grows_linearly_up_to_the_last_epoch():
    weights = [trust(torch.tensor(epoch), alpha=0.8, epochs=4).item() for epoch in (1, 2, 3, 4, 9)]
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_labels_by_hand():
    """alpha_t = 1/4, class 2 of (1/2, 1/4, 1/4): (1/8, 1/16, 1/16 + 3/4). Without a past: the hard label."""
    past = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]], dtype=torch.float64)
    labels = refined_targets(torch.tensor([2, 1]), past, torch.tensor(0.25))
    assert labels.tolist() == [[0.125, 0.0625, 0.8125], [0.0, 1.0, 0.0]]


def test_loss_by_hand():
    """Epoch 1 of 2 with a past of (1/2, 1/4, 1/4), alpha_T = 1/2: labels as above against a uniform student: ln 3."""
    past = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    labels = refined_targets(torch.tensor([2]), past, trust(torch.tensor(1), alpha=0.5, epochs=2))
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    assert F.cross_entropy(uniform, labels).item() == pytest.approx(log(3), rel=1e-12)
    twice = torch.tensor([[0.0, 0.0, log(2)]], dtype=torch.float64)  # (1/4, 1/4, 1/2)
    assert F.cross_entropy(twice, labels).item() == pytest.approx((3 / 16) * log(4) + (13 / 16) * log(2), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labels_are_distributions(share):
    past, target = examples.logits(0, 6, 5).softmax(dim=1), examples.targets(1, 6, 5)
    labels = refined_targets(target, past, torch.tensor(share).double())
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(6).double())
    hard = F.one_hot(target, 5).double()
    torch.testing.assert_close(labels, hard + share * (past - hard))


@pytest.mark.parametrize("case", golden.cases("ps_kd"))
def test_equals_the_released_code(case):
    """Refined labels, loss and gradient; the first epoch has no past."""
    given, epoch = case.tensors("student"), case.arguments["epoch"]
    past = given["past"] if epoch > 1 else torch.zeros_like(given["past"])
    share = trust(
        torch.tensor(epoch, dtype=torch.float64), alpha=case.arguments["alpha"], epochs=case.arguments["epochs"]
    )
    labels = refined_targets(given["target"], past, share)
    golden.close(labels, case.results()["soft_target"])
    golden.close(given["student"].detach().softmax(dim=1), case.results()["past_after"])
    golden.check(case, F.cross_entropy(given["student"], labels), given)


def epochs_of_samples():
    """Three epochs over all samples, each in an order of its own, in batches of 8, 8, 8, 8, 5 and 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(examples.SAMPLES, 3, 2, 2, generator=generator)
    targets = torch.randint(examples.CLASSES, (examples.SAMPLES,), generator=generator)
    for epoch in (1, 2, 3):
        order = torch.randperm(examples.SAMPLES, generator=generator)
        for index in order.split([8, 8, 8, 8, 5, 3]):
            yield epoch, examples.batch(len(index), len(index), image=images[index], target=targets[index], index=index)


def test_three_epochs_equal_a_loop_with_a_dictionary():
    """Each sample's prediction of the epoch before, in Python floats; the buffer rounds it to float16."""
    distiller, past = examples.build("ps_kd", ce_weight=0.5, alpha=0.6, epochs=4), {}
    for epoch, batch in epochs_of_samples():
        loss = examples.step(distiller, batch, epoch)  # at a rate of 0: the weights stay
        share, expected, new = 0.6 * epoch / 4, 0.0, {}
        log_probs = distiller.train().student(batch.image).double().log_softmax(dim=1).tolist()
        for row, target, index in zip(log_probs, batch.target.tolist(), batch.index.tolist(), strict=True):
            hard = [float(c == target) for c in range(examples.CLASSES)]
            labels = [(1 - share) * h + share * p for h, p in zip(hard, past.get(index, hard), strict=True)]
            expected -= sum(label * value for label, value in zip(labels, row, strict=True)) / len(log_probs)
            new[index] = torch.tensor(row).exp().tolist()
        past.update(new)
        assert loss.item() == pytest.approx(0.5 * expected, rel=2e-3 if epoch > 1 else 1e-5)
    torch.testing.assert_close(
        distiller.past, torch.tensor([past[i] for i in sorted(past)]).half(), rtol=2e-3, atol=1e-7
    )


def test_the_first_epoch_is_on_hard_labels():
    distiller = examples.build("ps_kd")
    for epoch, batch in epochs_of_samples():
        logits = distiller.train().student(batch.image)
        hard = F.cross_entropy(logits, batch.target)
        loss = examples.step(distiller, batch, epoch)
        assert (abs(loss - hard) < 1e-6) == (epoch == 1)


def test_a_step_writes_the_rows_of_its_batch_alone():
    distiller, batch = examples.build("ps_kd"), examples.batch(0, 5)
    expected = distiller.train().student(batch.image).softmax(dim=1).half()
    examples.step(distiller, batch)
    torch.testing.assert_close(distiller.past[batch.index], expected)
    rest = [row for row in range(examples.SAMPLES) if row not in batch.index.tolist()]
    assert distiller.past[rest].abs().max() == 0


@pytest.mark.parametrize("stop", [3, 6, 8, 13])
@pytest.mark.slow
def test_resumes_exactly_within_an_epoch_and_between_two(stop):
    steps = list(epochs_of_samples())
    unbroken, resumed = examples.build("ps_kd"), examples.build("ps_kd")
    for epoch, batch in steps[:stop]:
        examples.step(unbroken, batch, epoch, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    for epoch, batch in steps[stop:]:
        losses = [examples.step(distiller, batch, epoch, lr=0.1) for distiller in (unbroken, resumed)]
        assert losses[0] == losses[1]
    torch.testing.assert_close(dict(resumed.state_dict()), dict(unbroken.state_dict()), rtol=0, atol=0)


def test_the_past_has_no_gradient_and_leaves_cross_entropy_s_with_soft_labels():
    distiller, batch = examples.build("ps_kd"), examples.batch()
    examples.step(distiller, batch)
    distiller.eval().zero_grad()
    past = distiller.past[batch.index].float()
    distiller(batch, examples.epoch(5)).total.backward()
    gradient = distiller.student.classifier.weight.grad.clone()
    distiller.zero_grad()
    labels = 0.6 * F.one_hot(batch.target, examples.CLASSES) + 0.4 * past
    F.cross_entropy(distiller.student(batch.image), labels).backward()
    torch.testing.assert_close(gradient, distiller.student.classifier.weight.grad)


def test_a_certain_student_of_1e4_stays_finite():
    distiller, batch = examples.build("ps_kd"), examples.batch()
    with torch.no_grad():
        distiller.student.classifier.weight.mul_(1e4)
    for epoch in (1, 2, 10):
        assert examples.step(distiller, batch, epoch).isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in distiller.student.parameters())
    assert distiller.past.isfinite().all()


def test_holds_two_bytes_a_sample_and_class():
    past = examples.build("ps_kd").past
    assert past.shape == (examples.SAMPLES, examples.CLASSES)
    assert past.element_size() == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha: .*less than or equal to 1, found 1.5"),
        ({"epochs": 0}, r"epochs: .*greater than 0, found 0"),
        ({"ce_weight": 0.0}, r"^distiller: PSKD has nothing to train on: ce_weight all 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        examples.build("ps_kd", **settings)
