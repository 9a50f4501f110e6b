"""The contract that the base class keeps for every method."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals, StepOutput
from mdistill.distillers.functional import standardize
from mdistill.errors import UserError
from mdistill.models.base import Features

from . import examples

WITH_TEACHER = [name for name in examples.METHODS if DISTILLERS.get(name).needs.teacher != "none"]


class Probe(Distiller):
    """A method that keeps what it was shown and returns the mean of the student's logits."""

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        self.seen = signals
        return {"probe": signals.student_logits.mean()}


class Unreachable(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        raise AssertionError("the teacher ran")


def probe(teacher: nn.Module | None = None, **settings: Any) -> Probe:
    settings = {"ce_weight": 0.5, **settings}
    return Probe(examples.network(0), teacher or examples.network(1), examples.data_info(), **settings)


class TestSignals:
    def test_show_the_method_logits_labels_and_epoch(self):
        distiller, batch = probe().eval(), examples.batch()
        distiller(batch, examples.epoch(3))
        seen = distiller.seen
        torch.testing.assert_close(seen.student_logits, distiller.student(batch.image))
        torch.testing.assert_close(seen.teacher_logits, distiller.teacher(batch.image))
        assert seen.target is batch.target
        assert seen.index is batch.index
        assert seen.epoch == 3
        assert seen.student_logits.requires_grad
        assert not seen.teacher_logits.requires_grad

    def test_are_standardised_when_asked_and_raw_beside(self):
        distiller, batch = probe(standardize_logits=True).eval(), examples.batch()
        distiller(batch, examples.epoch())
        seen, student, teacher = distiller.seen, distiller.student(batch.image), distiller.teacher(batch.image)
        torch.testing.assert_close(seen.raw_student_logits, student)
        torch.testing.assert_close(seen.raw_teacher_logits, teacher)
        torch.testing.assert_close(seen.student_logits, standardize(student))
        torch.testing.assert_close(seen.teacher_logits, standardize(teacher))

    def test_use_the_batch_s_teacher_logits_without_running_the_teacher(self):
        given = torch.randn(examples.BATCH, examples.CLASSES, generator=torch.Generator().manual_seed(0))
        distiller = probe(Unreachable())
        distiller(examples.batch(teacher_logits=given), examples.epoch())
        assert torch.equal(distiller.seen.teacher_logits, given)
        with pytest.raises(AssertionError, match="the teacher ran"):
            distiller(examples.batch(), examples.epoch())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_are_float32_or_wider(self, dtype):
        distiller = probe().eval()
        distiller.student.to(dtype)
        distiller.teacher.to(dtype)
        output = distiller(examples.batch(dtype=dtype), examples.epoch())
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert distiller.seen.student_logits.dtype == distiller.seen.teacher_logits.dtype == wide
        assert {term.dtype for term in output.terms.values()} == {wide}


class TestTerms:
    def test_total_is_the_sum_of_all_terms(self):
        output = StepOutput(
            torch.zeros(1, 2),
            torch.zeros(1),
            {"ce": torch.tensor(1.0)},
            {"a": torch.tensor(2.0), "b": torch.tensor(4.0)},
        )
        assert output.total == 7
        assert list(output.terms) == ["ce", "a", "b"]

    def test_task_is_weighted_cross_entropy_on_raw_logits(self):
        distiller, batch = probe(standardize_logits=True).eval(), examples.batch()
        expected = 0.5 * F.cross_entropy(distiller.student(batch.image), batch.target)
        torch.testing.assert_close(distiller(batch, examples.epoch()).task, {"ce": expected})
        assert probe(ce_weight=0.0)(batch, examples.epoch()).task == {}

    @pytest.mark.parametrize(("epoch", "factor"), [(1, 0.05), (10, 0.5), (20, 1.0), (240, 1.0)])
    def test_warm_up_multiplies_distillation_terms_only(self, epoch, factor):
        batch = examples.batch()
        plain = probe().eval()(batch, examples.epoch(epoch))
        warm = probe(warmup_epochs=20).eval()(batch, examples.epoch(epoch))
        torch.testing.assert_close(warm.distillation["probe"], factor * plain.distillation["probe"])
        assert warm.task == plain.task

    def test_logits_are_the_student_s(self):
        distiller, batch = probe(standardize_logits=True).eval(), examples.batch()
        torch.testing.assert_close(distiller(batch, examples.epoch()).logits, distiller.student(batch.image))


class TestTeacher:
    def test_stays_frozen_and_in_eval_mode(self):
        distiller = probe()
        before = {key: value.clone() for key, value in distiller.teacher.state_dict().items()}
        assert distiller.train() is distiller
        assert distiller.student.training
        assert not any(module.training for module in distiller.teacher.modules())
        assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
        examples.step(distiller, examples.batch(), lr=0.1)
        torch.testing.assert_close(dict(distiller.teacher.state_dict()), before, rtol=0, atol=0)
        assert not distiller.eval().student.training

    def test_is_not_trained(self):
        distiller = probe()
        trained = {id(parameter) for group in distiller.param_groups() for parameter in group["params"]}
        assert trained == {id(parameter) for parameter in distiller.student.parameters()}

    def test_is_not_in_the_training_state(self):
        distiller, other = probe(), probe()
        state = distiller.training_state()
        assert state
        assert all(key.startswith("student.") for key in state)
        examples.step(distiller, examples.batch(), lr=0.1)
        other.teacher = examples.network(2)
        kept = {key: value.clone() for key, value in other.teacher.state_dict().items()}
        other.load_training_state(distiller.training_state())
        torch.testing.assert_close(other.training_state(), distiller.training_state())
        torch.testing.assert_close(dict(other.teacher.state_dict()), kept)

    def test_state_of_another_network_is_refused(self):
        state = probe().training_state()
        state["student.9.weight"] = state.pop("student.4.weight")
        with pytest.raises(UserError, match=r"missing \['student.4.weight'\], unexpected \['student.9.weight'\]"):
            probe().load_training_state(state)


class TwoViews(Probe):
    needs = Needs(views=2)


class TestSecondView:
    def build(self, **settings: Any) -> TwoViews:
        return TwoViews(examples.network(0), examples.network(1), examples.data_info(), ce_weight=0.5, **settings)

    def test_is_shown_like_the_first(self):
        distiller, batch = self.build(standardize_logits=True).eval(), examples.batch()
        distiller(batch, examples.epoch(3))
        seen, strong = distiller.seen, distiller.seen.strong
        for view, image in ((seen, batch.image), (strong, batch.strong_image)):
            torch.testing.assert_close(view.raw_student_logits, distiller.student(image))
            torch.testing.assert_close(view.raw_teacher_logits, distiller.teacher(image))
            torch.testing.assert_close(view.teacher_logits, standardize(distiller.teacher(image)))
        assert strong.target is batch.target
        assert strong.epoch == 3
        assert strong.strong is None

    def test_runs_by_itself_after_the_first(self):
        """BatchNorm sees the weak view, then the strong one: its statistics are those of two passes in this order."""
        distiller, twin, batch = self.build().train(), examples.network(0).train(), examples.batch()
        distiller(batch, examples.epoch())
        twin(batch.image)
        twin(batch.strong_image)
        torch.testing.assert_close(distiller.student.state_dict(), twin.state_dict(), rtol=0, atol=0)

    def test_supplied_logits_belong_to_the_first(self):
        distiller, batch = self.build().eval(), examples.batch()
        supplied = torch.full((examples.BATCH, examples.CLASSES), 7.0)
        distiller(replace(batch, teacher_logits=supplied), examples.epoch())
        assert distiller.seen.teacher_logits is supplied
        torch.testing.assert_close(distiller.seen.strong.teacher_logits, distiller.teacher(batch.strong_image))

    def test_is_left_alone_by_a_method_of_one_view(self):
        distiller = probe().eval()
        distiller(examples.batch(), examples.epoch())
        assert distiller.seen.strong is None


class TestMixedImages:
    def shares(self) -> Tensor:
        return torch.rand(examples.BATCH, examples.CLASSES, generator=torch.Generator().manual_seed(4)).softmax(dim=1)

    def test_cross_entropy_weighs_classes_by_their_share(self):
        distiller, batch = probe().eval(), replace(examples.batch(), target=self.shares())
        output = distiller(batch, examples.epoch())
        log_probs = distiller.student(batch.image).log_softmax(dim=1)
        expected = -sum((self.shares()[i] * log_probs[i]).sum() for i in range(examples.BATCH)) / examples.BATCH
        torch.testing.assert_close(output.task["ce"], 0.5 * expected)
        assert output.target is batch.target

    @pytest.mark.parametrize("name", [n for n in examples.METHODS if DISTILLERS.get(n).needs.labels != "hard"])
    def test_methods_that_take_shares_of_classes_train_on_them(self, name):
        """A share of 1 is a class: both give the same loss."""
        batch = examples.batch()
        one_hot = F.one_hot(batch.target, examples.CLASSES).float()
        hard = examples.step(examples.build(name), batch)
        torch.testing.assert_close(examples.step(examples.build(name), replace(batch, target=one_hot)), hard)
        assert examples.step(examples.build(name), replace(batch, target=self.shares())).isfinite()

    def test_the_images_of_which_the_teacher_is_least_certain_are_kept(self):
        distiller, batch = probe().eval(), replace(examples.batch(), target=self.shares(), kept=3)
        output = distiller(batch, examples.epoch())
        probs = distiller.teacher(batch.image).softmax(dim=1)
        entropy = [-sum(p * p.log() for p in row).item() for row in probs]
        kept = sorted(sorted(range(examples.BATCH), key=lambda i: -entropy[i])[:3])
        assert torch.equal(distiller.seen.index, batch.index[kept])
        assert torch.equal(output.target, batch.target[kept])
        torch.testing.assert_close(output.logits, distiller.student(batch.image[kept]))
        torch.testing.assert_close(distiller.seen.teacher_logits, distiller.teacher(batch.image)[kept])


class TestAverages:
    def run(self, steps: int, **settings: Any) -> tuple[Probe, list[dict[str, Tensor]]]:
        """A few steps, one an epoch; the student's states after each."""
        distiller, states = probe(**settings), []
        for number in range(1, steps + 1):
            distiller.train()
            distiller.zero_grad()
            distiller(examples.batch(number), examples.epoch(number)).total.backward()
            with torch.no_grad():
                for parameter in distiller.student.parameters():
                    parameter -= 0.1 * parameter.grad
                distiller.finish_step()
            states.append({key: value.clone() for key, value in distiller.student.state_dict().items()})
        return distiller, states

    @pytest.mark.parametrize("first", [1, 3])
    def test_the_plain_one_is_the_mean_of_all_states_from_its_first_epoch_on(self, first):
        distiller, states = self.run(5, average_from=first)
        found = distiller.students()["average"].state_dict()
        for key, value in found.items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    value, torch.stack([state[key] for state in states[first - 1 :]]).mean(dim=0)
                )
            else:
                assert value == states[-1][key]

    def test_the_plain_one_is_the_student_before_its_first_epoch(self):
        distiller, states = self.run(2, average_from=3)
        torch.testing.assert_close(dict(distiller.students()["average"].state_dict()), states[-1])

    def test_the_exponential_one_forgets_by_its_decay(self):
        """By hand: the mean of two steps, then 3/5 of it and 2/5 of the third, and so on (1/3 is below 2/5)."""
        distiller, states = self.run(4, ema_decay=0.6)
        found = distiller.students()["ema"].state_dict()
        for key in (key for key, value in found.items() if value.is_floating_point()):
            expected = (states[0][key] + states[1][key]) / 2
            for state in states[2:]:
                expected = 0.6 * expected + 0.4 * state[key]
            torch.testing.assert_close(found[key], expected)

    def test_they_change_nothing_else_and_are_not_trained(self):
        both, states = self.run(3, ema_decay=0.9, average_from=1)
        plain, expected = self.run(3)
        torch.testing.assert_close(states, expected, rtol=0, atol=0)
        assert list(both.students()) == ["student", "ema", "average"]
        assert len(both.param_groups()[0]["params"]) == len(plain.param_groups()[0]["params"])
        assert list(plain.students()) == ["student"]

    def test_they_are_part_of_the_state(self):
        whole, _ = self.run(4, ema_decay=0.9, average_from=2)
        other = probe(ema_decay=0.9, average_from=2)
        other.load_training_state(whole.training_state())
        torch.testing.assert_close(other.training_state(), whole.training_state(), rtol=0, atol=0)
        assert other.average.count == 3

    def test_a_dry_run_leaves_them_alone(self):
        distiller, _ = self.run(2, average_from=1)
        before = {key: value.clone() for key, value in distiller.average.state_dict().items()}
        with torch.no_grad():
            distiller(examples.batch(9), examples.epoch(3))
            distiller.finish_step()
        torch.testing.assert_close(dict(distiller.average.state_dict()), before, rtol=0, atol=0)


class TestNeeds:
    def test_a_missing_teacher_is_refused(self):
        with pytest.raises(UserError, match="Probe needs a teacher"):
            Probe(examples.network(0), None, examples.data_info(), ce_weight=1.0)

    def test_a_teacher_too_many_is_refused(self):
        class Alone(Probe):
            needs = Needs(teacher="none")

        with pytest.raises(UserError, match="Alone takes no teacher"):
            Alone(examples.network(0), examples.network(1), examples.data_info(), ce_weight=1.0)
        distiller = Alone(examples.network(0), None, examples.data_info(), ce_weight=1.0, standardize_logits=True)
        distiller(examples.batch(), examples.epoch())
        assert distiller.seen.teacher_logits.shape == (examples.BATCH, 0)

    @pytest.mark.parametrize(
        ("needs", "student", "teacher"),
        [
            (Needs(), False, False),
            (Needs(student="features"), True, False),
            (Needs(teacher="features"), True, True),
            (Needs(teacher="none", student="features"), True, False),
        ],
    )
    def test_features_are_shown_where_they_are_asked_for(self, needs, student, teacher):
        class Reader(Probe):
            pass

        Reader.needs = needs
        given_teacher = None if needs.teacher == "none" else examples.network(1)
        distiller = Reader(examples.network(0), given_teacher, examples.data_info(), ce_weight=1.0).eval()
        distiller(examples.batch(), examples.epoch())
        assert (distiller.seen.student_features is not None) == student == needs.student_features
        assert (distiller.seen.teacher_features is not None) == teacher
        if student:
            torch.testing.assert_close(distiller.seen.student_features.logits, distiller.seen.raw_student_logits)

    def test_a_loss_without_terms_is_refused(self):
        with pytest.raises(UserError, match=r"^distiller: Probe has nothing to train on: ce_weight, a, b all 0"):
            probe(ce_weight=0.0).require_a_term(a=0.0, b=False)
        probe(ce_weight=0.0).require_a_term(a=0.0, b=True)
        probe().require_a_term(a=0.0)

    def test_students_are_what_is_evaluated(self):
        distiller = probe()
        assert distiller.students() == {"student": distiller.student}


@pytest.mark.parametrize("name", examples.METHODS)
def test_losses_are_float32_under_autocast(name):
    """Autocast reaches the networks, not the losses: they equal those of the same logits outside it."""
    distiller, batch = examples.build(name).eval(), examples.batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = distiller(batch, examples.epoch())
        networks = {
            network: {id(image): network.forward_features(image) for image in (batch.image, batch.strong_image)}
            for network in (distiller.student, distiller.teacher)
            if network
        }
    assert {term.dtype for term in found.terms.values()} == {torch.float32}
    distiller.student, distiller.teacher = (
        given(network, networks[network]) if network else None for network in (distiller.student, distiller.teacher)
    )
    torch.testing.assert_close(found.terms, distiller(batch, examples.epoch()).terms, rtol=1e-6, atol=1e-7)


def given(network: nn.Module, features: dict[int, Features]) -> nn.Module:
    """A network with the classifier of ``network`` that returns the features found under the ``id`` of the images."""

    class Given(nn.Module):
        classifier = network.classifier

        def forward(self, image: Tensor) -> Tensor:
            return features[id(image)].logits

        def forward_features(self, image: Tensor) -> Features:
            return features[id(image)]

    return Given()


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_method_knows_who_supplied_the_teacher_s_logits(name):
    distiller, batch = examples.build(name).eval(), examples.batch()
    logits = distiller.teacher(batch.image).detach()
    supplied = replace(batch, teacher_logits=logits)
    expected = distiller(batch, examples.epoch()).terms
    torch.testing.assert_close(distiller(supplied, examples.epoch()).terms, expected, rtol=0, atol=0)
