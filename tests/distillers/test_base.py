"""The contract that the base class keeps for every method."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data import Batch
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals, StepOutput
from mdistill.distillers.functional import standardize
from mdistill.errors import UserError
from mdistill.models.base import Features
from mdistill.optim.solvers import SGD

from . import examples

WITH_TEACHER = [name for name in examples.METHODS if DISTILLERS.get(name).needs.teacher != "none"]


class Probe(Distiller):
    """A method whose term is the mean of the student's logits."""

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return {"probe": signals.student_logits.mean()}


class Unreachable(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        raise AssertionError("the teacher ran")


def probe(teacher: nn.Module | None = None, **settings: Any) -> Probe:
    settings = {"ce_weight": 0.5, **settings}
    return Probe(examples.network(0), teacher or examples.network(1), examples.data_info(), **settings)


class TestLabelSmoothing:
    @pytest.mark.parametrize("soft", [False, True])
    def test_mixes_the_labels_with_the_uniform_ones(self, soft: bool):
        distiller, batch = probe(label_smoothing=0.2).eval(), examples.batch()
        classes = examples.data_info().num_classes
        labels = F.one_hot(batch.target, classes).float()
        if soft:
            labels = 0.7 * labels + 0.3 * labels.roll(1, dims=0)
            batch = replace(batch, target=labels)
        logits = distiller.student(batch.image)
        smooth = 0.8 * labels + 0.2 / classes
        expected = 0.5 * -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
        output = distiller(batch, examples.epoch())
        torch.testing.assert_close(output.task["ce"], expected)
        torch.testing.assert_close(output.distillation["probe"], logits.mean())

    def test_is_in_the_cross_entropy_of_both_views(self):
        plain, smooth = (examples.build("mlkd", ce_weight=1.0, label_smoothing=each).eval() for each in (0.0, 0.2))
        batch = examples.batch()
        one, other = (each(batch, examples.epoch()).task for each in (plain, smooth))
        for name, image in (("ce", batch.image), ("ce_strong", batch.strong_image)):
            assert image is not None
            uniform = -plain.student(image).log_softmax(dim=1).mean()
            torch.testing.assert_close(other[name], 0.8 * one[name] + 0.2 * uniform)

    @pytest.mark.parametrize("name", examples.METHODS)
    def test_every_method_smooths_or_refuses(self, name: str):
        """It changes a method's cross-entropy, or it is one clear line."""
        if name in {"label_revision", "ps_kd"} or examples.SETTINGS[name]["ce_weight"] == 0:
            with pytest.raises(UserError, match=r"^distiller\.label_smoothing: [^\n]*$"):
                examples.build(name, label_smoothing=0.2)
            return
        plain, smooth = examples.build(name).eval(), examples.build(name, label_smoothing=0.2).eval()
        one, other = (each(examples.batch(), examples.epoch()) for each in (plain, smooth))
        assert all(not torch.equal(one.task[term], other.task[term]) for term in one.task)
        assert one.task.keys() == other.task.keys() != set()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"ce_weight": 0.0}, "0.1 is of the cross-entropy, which distiller.ce_weight: 0 leaves out; set it to 0"),
            ({}, "OwnTask has a loss of its own on the labels, which does not smooth them; set it to 0, found 0.1"),
        ],
    )
    def test_is_refused_where_it_would_do_nothing(self, settings: dict[str, float], message: str):
        class OwnTask(Probe):
            def task(self, signals: Signals) -> dict[str, Tensor]:
                return {}

        arguments = {"ce_weight": 0.5, "label_smoothing": 0.1, **settings}
        with pytest.raises(UserError) as caught:
            OwnTask(examples.network(0), examples.network(1), examples.data_info(), **arguments)
        assert str(caught.value) == f"distiller.label_smoothing: {message}"


class TestSignals:
    def test_hold_logits_labels_samples_epoch_and_seed(self):
        distiller, batch = probe().eval(), examples.batch()
        distiller.seed = 5
        signals = distiller(batch, examples.epoch(3)).signals
        torch.testing.assert_close(signals.student_logits, distiller.student(batch.image))
        torch.testing.assert_close(signals.teacher_logits, distiller.teacher(batch.image))
        assert signals.target is batch.target
        assert signals.index is batch.index
        assert (signals.epoch, signals.seed) == (3, 5)
        assert signals.student_logits.requires_grad
        assert not signals.teacher_logits.requires_grad

    def test_hold_standardised_logits_on_demand_and_the_raw_ones_beside(self):
        distiller, batch = probe(standardize_logits=True).eval(), examples.batch()
        signals = distiller(batch, examples.epoch()).signals
        student, teacher = distiller.student(batch.image), distiller.teacher(batch.image)
        torch.testing.assert_close(signals.raw_student_logits, student)
        torch.testing.assert_close(signals.raw_teacher_logits, teacher)
        torch.testing.assert_close(signals.student_logits, standardize(student))
        torch.testing.assert_close(signals.teacher_logits, standardize(teacher))

    def test_hold_the_batch_s_teacher_logits_and_the_teacher_does_not_run(self):
        given = torch.randn(examples.BATCH, examples.CLASSES, generator=torch.Generator().manual_seed(0))
        distiller = probe(Unreachable())
        signals = distiller(examples.batch(teacher_logits=given), examples.epoch()).signals
        assert torch.equal(signals.teacher_logits, given)
        with pytest.raises(AssertionError, match="the teacher ran"):
            distiller(examples.batch(), examples.epoch())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_are_float32_or_wider(self, dtype):
        distiller = probe().eval()
        distiller.student.to(dtype)
        distiller.teacher.to(dtype)
        output = distiller(examples.batch(dtype=dtype), examples.epoch())
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert output.signals.student_logits.dtype == output.signals.teacher_logits.dtype == wide
        assert {term.dtype for term in output.terms.values()} == {wide}


class TestTerms:
    def test_total_is_the_sum_of_all_terms(self):
        output = StepOutput(
            torch.zeros(1, 2),
            torch.zeros(1),
            {"ce": torch.tensor(1.0)},
            {"a": torch.tensor(2.0), "b": torch.tensor(4.0)},
            probe()(examples.batch(), examples.epoch()).signals,
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
        assert distiller.train() is distiller
        assert distiller.student.training
        assert not any(module.training for module in distiller.teacher.modules())
        assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
        assert not distiller.eval().student.training

    @pytest.mark.parametrize("training", [True, False])
    def test_normalises_by_the_batch_on_demand(self, training):
        """As in training mode, whichever mode the student is in; its statistics stay."""
        teacher, twin, batch = examples.network(1), examples.network(1).train(), examples.batch()
        data, settings = examples.data_info(), examples.SETTINGS["hooks_batch_statistics"]
        distiller = DISTILLERS.build("hooks_batch_statistics", examples.network(0), teacher, data, **settings)
        signals = distiller.train(training)(batch, examples.epoch()).signals
        torch.testing.assert_close(signals.teacher_logits, twin(batch.image), rtol=0, atol=0)
        torch.testing.assert_close(dict(teacher.state_dict()), dict(examples.network(1).state_dict()), rtol=0, atol=0)

    def test_is_not_trained(self):
        distiller = probe()
        trained = {id(parameter) for group in distiller.param_groups() for parameter in group["params"]}
        assert trained == {id(parameter) for parameter in distiller.student.parameters()}


class TwoViews(Probe):
    needs = Needs(views=2)


class TestSecondView:
    def build(self, **settings: Any) -> TwoViews:
        return TwoViews(examples.network(0), examples.network(1), examples.data_info(), ce_weight=0.5, **settings)

    def test_has_the_same_signals_as_the_first(self):
        distiller, batch = self.build(standardize_logits=True).eval(), examples.batch()
        signals = distiller(batch, examples.epoch(3)).signals
        for view, image in ((signals, batch.image), (signals.strong, batch.strong_image)):
            torch.testing.assert_close(view.raw_student_logits, distiller.student(image))
            torch.testing.assert_close(view.raw_teacher_logits, distiller.teacher(image))
            torch.testing.assert_close(view.teacher_logits, standardize(distiller.teacher(image)))
        assert signals.strong.target is batch.target
        assert signals.strong.epoch == 3
        assert signals.strong.strong is None

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
        signals = distiller(replace(batch, teacher_logits=supplied), examples.epoch()).signals
        assert signals.teacher_logits is supplied
        torch.testing.assert_close(signals.strong.teacher_logits, distiller.teacher(batch.strong_image))

    def test_is_ignored_by_a_method_of_one_view(self):
        assert probe()(examples.batch(), examples.epoch()).signals.strong is None


class TestMixedImages:
    def probs(self) -> Tensor:
        return torch.rand(examples.BATCH, examples.CLASSES, generator=torch.Generator().manual_seed(4)).softmax(dim=1)

    def test_cross_entropy_weighs_classes_by_their_probability(self):
        distiller, batch = probe().eval(), replace(examples.batch(), target=self.probs())
        output = distiller(batch, examples.epoch())
        log_probs = distiller.student(batch.image).log_softmax(dim=1)
        expected = -sum((self.probs()[i] * log_probs[i]).sum() for i in range(examples.BATCH)) / examples.BATCH
        torch.testing.assert_close(output.task["ce"], 0.5 * expected)
        assert output.target is batch.target

    @pytest.mark.parametrize("name", [n for n in examples.METHODS if DISTILLERS.get(n).needs.labels != "hard"])
    @pytest.mark.slow
    def test_methods_that_take_class_probabilities_train_on_them(self, name):
        """A probability of 1 is a class: both give the same loss."""
        batch = examples.batch()
        one_hot = F.one_hot(batch.target, examples.CLASSES).float()
        hard = examples.step(examples.build(name), batch)
        torch.testing.assert_close(examples.step(examples.build(name), replace(batch, target=one_hot)), hard)
        assert examples.step(examples.build(name), replace(batch, target=self.probs())).isfinite()

    def test_the_images_of_which_the_teacher_is_least_certain_are_trained_on(self):
        distiller, batch = probe().eval(), replace(examples.batch(), target=self.probs(), keep=3)
        output = distiller(batch, examples.epoch())
        probs = distiller.teacher(batch.image).softmax(dim=1)
        entropy = [-sum(p * p.log() for p in row).item() for row in probs]
        chosen = sorted(sorted(range(examples.BATCH), key=lambda i: -entropy[i])[:3])
        assert torch.equal(output.signals.index, batch.index[chosen])
        assert torch.equal(output.target, batch.target[chosen])
        torch.testing.assert_close(output.logits, distiller.student(batch.image[chosen]))
        torch.testing.assert_close(output.signals.teacher_logits, distiller.teacher(batch.image)[chosen])


class TestMixedImagesBeside:
    """Of KD but for the last: plain images, and mixed ones without a label."""

    def both(self, **changes: Any) -> tuple[Batch, Batch]:
        plain, mixed = examples.batch(0), examples.batch(1, **changes)
        return plain, replace(plain, mixed=replace(mixed, strong_image=None, strong_view=None))

    def test_the_method_s_terms_are_computed_on_both_and_the_task_s_on_plain_ones(self):
        plain, both = self.both()
        distiller = examples.build("kd", warmup_epochs=4).eval()
        alone, mixed = (distiller(batch, examples.epoch()) for batch in (plain, both.mixed))
        output = distiller(both, examples.epoch())
        expected = {**alone.terms, "kd_mixed": mixed.terms["kd"]}
        torch.testing.assert_close(output.terms, expected)
        torch.testing.assert_close(output.total, sum(expected.values()))
        assert list(output.task) == ["ce"]
        assert output.target is plain.target
        torch.testing.assert_close(output.logits, alone.logits)
        assert torch.equal(output.signals.index, plain.index)

    def test_known_logits_are_those_of_plain_images(self):
        _, both = self.both()
        distiller = examples.build("kd").eval()
        known = distiller.teacher(both.image)
        without, given = (distiller(batch, examples.epoch()) for batch in (both, replace(both, teacher_logits=known)))
        torch.testing.assert_close(given.terms, without.terms)

    @pytest.mark.parametrize("pick", ["teacher", "student"])
    def test_those_of_which_a_network_is_least_certain_are_trained_on(self, pick):
        _, both = self.both(keep=5, pick=pick)
        distiller = examples.build("kd").eval()
        output = distiller(both, examples.epoch())
        network = distiller.teacher if pick == "teacher" else distiller.student
        log_probs = network(both.mixed.image).log_softmax(dim=1)
        chosen = (-(log_probs.exp() * log_probs).sum(dim=1)).argsort(descending=True)[:5]
        picked = both.mixed.select(chosen, teacher_logits=None)
        torch.testing.assert_close(output.terms["kd_mixed"], distiller(picked, examples.epoch()).terms["kd"])

    def test_the_student_picks_after_the_plain_images_and_without_a_gradient(self):
        """Its statistics are those of three passes; twice: of the candidates, then of those that it picked."""
        _, both = self.both(keep=5, pick="student")
        distiller, twin = examples.build("kd").train(), examples.network(0).train()
        output = distiller(both, examples.epoch())
        twin(both.image)
        log_probs = twin(both.mixed.image).log_softmax(dim=1)
        chosen = (-(log_probs.exp() * log_probs).sum(dim=1)).argsort(descending=True)[:5].sort().values
        twin(both.mixed.image[chosen])
        torch.testing.assert_close(distiller.student.state_dict(), twin.state_dict())
        output.total.backward()
        assert all(parameter.grad is not None for parameter in distiller.student.parameters())

    @pytest.mark.parametrize("name", [n for n in examples.METHODS if examples.goes_with_images_beside(n)])
    @pytest.mark.slow
    def test_methods_that_need_no_class_train_on_both(self, name):
        """And no class reaches their terms on mixed images."""
        _, both = self.both()
        relabelled = replace(both, mixed=replace(both.mixed, target=(both.mixed.target + 1) % examples.CLASSES))
        losses = [examples.step(examples.build(name), batch) for batch in (both, relabelled)]
        assert losses[0] == losses[1]
        assert losses[0].isfinite()

    def test_a_term_that_has_the_name_of_a_mixed_one_is_refused(self):
        distiller = TwoTerms(examples.network(0), examples.network(1), examples.data_info(), ce_weight=0.0)
        with pytest.raises(UserError, match=r"TwoTerms.distillation: 'a_mixed' is no name of its own for a term"):
            distiller(self.both()[1], examples.epoch())


class TwoTerms(Distiller):
    """Names a term as one on mixed images is named."""

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return {name: signals.student_logits.mean() for name in ("a", "a_mixed")}


class TestOwnModules:
    """By the methods of ``hooks.py``."""

    def test_run_in_the_student_s_precision_and_give_float32(self):
        distiller, x = probe(), examples.logits(0, 8, 16).float()
        layer = nn.Linear(16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = layer(x)
        assert torch.equal(distiller.run_module(layer, x), layer(x))
        distiller.student_precision = "bf16"
        with torch.autocast("cpu", enabled=False):  # as losses run
            result = distiller.run_module(layer, x)
        assert result.dtype == torch.float32
        assert torch.equal(result, narrow.float())
        assert not torch.equal(result, layer(x))

    def test_have_a_learning_rate_of_their_own(self):
        distiller = examples.build("hooks_projector", projector_lr_scale=0.25).train()
        solver = SGD(distiller.param_groups(), momentum=0.0, nesterov=False, weight_decay=0.0)
        solver.set_lr(0.4)
        before = {key: value.detach().clone() for key, value in distiller.named_parameters()}
        solver.step(distiller(examples.batch(), examples.epoch()))
        for key, value in distiller.named_parameters():
            if not key.startswith("teacher."):
                rate = 0.1 if key.startswith("projector.") else 0.4
                torch.testing.assert_close(value.detach(), before[key] - rate * value.grad)

    def test_may_be_part_of_the_student_at_inference(self):
        distiller, image = examples.build("hooks_projector").eval(), examples.batch().image
        networks = distiller.students()
        assert list(networks) == ["student", "bare"]
        pooled = distiller.projector(distiller.student.forward_features(image).last_map).flatten(1)
        torch.testing.assert_close(networks["student"](image), distiller.teacher.classifier(pooled))
        examples.step(distiller, examples.batch(), lr=0.1)
        again = distiller.eval().students()["student"]
        torch.testing.assert_close(dict(networks["student"].state_dict()), dict(again.state_dict()), rtol=0, atol=0)


class TestDraws:
    def test_are_fixed_by_seed_epoch_and_sample(self):
        losses = {}
        for seed, epoch in ((0, 1), (0, 1), (1, 1), (0, 2)):
            distiller = examples.build("hooks_memory", ce_weight=0.0).eval()
            distiller.seed = seed
            loss = distiller(examples.batch(), examples.epoch(epoch)).total
            assert losses.setdefault((seed, epoch), loss) == loss
        assert len({loss.item() for loss in losses.values()}) == 3


def test_a_process_alone_gathers_its_own_rows():
    rows = torch.zeros(3, 2)
    assert probe().gather(rows) is rows


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
        assert distiller(examples.batch(), examples.epoch()).signals.teacher_logits.shape == (examples.BATCH, 0)

    @pytest.mark.parametrize(
        ("needs", "student", "teacher"),
        [
            (Needs(), False, False),
            (Needs(student="features"), True, False),
            (Needs(teacher="features"), True, True),
            (Needs(teacher="none", student="features"), True, False),
        ],
    )
    def test_features_are_there_on_demand(self, needs, student, teacher):
        class Reader(Probe):
            pass

        Reader.needs = needs
        given_teacher = None if needs.teacher == "none" else examples.network(1)
        distiller = Reader(examples.network(0), given_teacher, examples.data_info(), ce_weight=1.0).eval()
        signals = distiller(examples.batch(), examples.epoch()).signals
        assert (signals.student_features is not None) == student == needs.student_features
        assert (signals.teacher_features is not None) == teacher
        if student:
            torch.testing.assert_close(signals.student_features.logits, signals.raw_student_logits)

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
        output = distiller(batch, examples.epoch())
        networks = {
            network: {id(image): network.forward_features(image) for image in (batch.image, batch.strong_image)}
            for network in (distiller.student, distiller.teacher)
            if network
        }
    assert {term.dtype for term in output.terms.values()} == {torch.float32}
    distiller.student, distiller.teacher = (
        given(network, networks[network]) if network else None for network in (distiller.student, distiller.teacher)
    )
    torch.testing.assert_close(output.terms, distiller(batch, examples.epoch()).terms, rtol=1e-6, atol=1e-7)


def given(network: nn.Module, features: dict[int, Features]) -> nn.Module:
    """A network with the classifier of ``network`` that returns the features given for the ``id`` of the images."""

    class Given(nn.Module):
        classifier = network.classifier
        bn_before_relu = network.bn_before_relu

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
