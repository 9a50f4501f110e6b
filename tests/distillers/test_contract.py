"""What holds for every method; a new one is covered by its settings in ``examples.py``."""

import copy
import inspect
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS, Distiller
from mdistill.errors import UserError
from mdistill.models import MODELS

from ..host_reads import NoHostReads
from . import examples, hooks

METHODS = examples.METHODS
every_published_method = pytest.mark.parametrize("name", METHODS)
every_method = pytest.mark.parametrize("name", [*METHODS, *examples.PHASES, *examples.HOOKS])
LEFT_OUT = {"simkd": ("student.4.weight", "student.4.bias")}  # the student's own classifier is in none of its networks
ONE_LOSS = {"pesf_kd": {"variant": "paper"}}  # where two sides, each held still for the other, have no common loss
EQUAL_DEPTHS = {"reviewkd", "fsp"}  # they take networks of as many stages alone
SHARED = {"warmup_epochs", "standardize_logits", "label_smoothing"}


def own_state(distiller: Distiller) -> dict[str, Tensor]:
    """What the method holds beside its networks."""
    state = distiller.state_dict()
    return {key: value.clone() for key, value in state.items() if not key.startswith(("student.", "teacher."))}


def statistics(distiller: Distiller) -> set[str]:
    """The buffers of all BatchNorms, which a pass in training mode writes."""
    norms = [
        (path, each) for path, each in distiller.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)
    ]
    return {f"{path}.{name}" for path, norm in norms for name, _ in norm.named_buffers()}


def attributes(distiller: Distiller) -> dict[tuple[str, ...], Any]:
    """Every attribute of every module, parameters and buffers one by one."""
    objects: dict[tuple[str, ...], Any] = {}
    for path, module in distiller.named_modules():
        for key, value in vars(module).items():
            inner = value if key in ("_parameters", "_buffers", "_modules") else {"": value}
            objects |= {(path, key, name): entry for name, entry in inner.items()}
    return objects


def assert_same_objects(left: dict[tuple[str, ...], Any], right: dict[tuple[str, ...], Any]) -> None:
    assert left.keys() == right.keys()
    assert [key for key, value in left.items() if value is not right[key] and not isinstance(value, bool)] == []


def test_there_are_example_settings_for_every_method():
    assert sorted(examples.SETTINGS) == sorted([*METHODS, *examples.HOOKS])
    assert {"vanilla", "kd", "bd_kd", "taid", "dkd", "rld", "mcld"} <= set(METHODS)


@every_published_method
def test_module_class_and_registered_name_agree(name):
    """A file is of one paper; it is named as its method, or as the paper's where it holds several variants."""
    builder = DISTILLERS.get(name)
    module = sys.modules[builder.__module__]
    package, _, file = module.__name__.rpartition(".")
    variants = [other for other in METHODS if DISTILLERS.get(other).__module__ == module.__name__]
    assert package == "mdistill.distillers"
    assert file in variants or (len(variants) > 1 and all(each.startswith(f"{file}_") for each in variants))
    assert builder.__name__.lower() == name.replace("_", "")
    assert module.__doc__.partition(":")[0].lower() == file.replace("_", "")


@every_published_method
def test_settings_have_types_and_no_hidden_defaults(name):
    """Every value that a YAML may set is annotated; only what the base gives to all may be left out."""
    arguments = DISTILLERS.arguments(name)
    assert all(argument.annotation is not inspect.Parameter.empty for argument in arguments.values())
    assert {key for key, argument in arguments.items() if argument.default is not inspect.Parameter.empty} == SHARED
    complete, problems = DISTILLERS.check(name, examples.SETTINGS[name])
    assert not problems
    assert set(complete) == set(arguments)


@every_published_method
def test_every_loss_lists_its_arguments_and_the_shape_of_its_result(name):
    module = sys.modules[DISTILLERS.get(name).__module__]
    for function in vars(module).values():
        if not (
            inspect.isfunction(function) and function.__module__ == module.__name__ and "loss" in function.__name__
        ):
            continue
        text = inspect.getdoc(function)
        assert "\nDiffers from the " in text or "differs" not in text.lower(), function.__name__
        listed = re.search(r"\nArgs:\n(.*)\n\nReturns:\n    \(", text, flags=re.DOTALL)
        assert listed, function.__name__
        parameters = inspect.signature(function).parameters
        assert re.findall(r"^    (\w+): ", listed[1], flags=re.MULTILINE) == list(parameters), function.__name__
        shapes = dict(re.findall(r"^    (\w+): (\([A-Z, ]*\))", listed[1], flags=re.MULTILINE))
        tensors = {key for key, parameter in parameters.items() if parameter.annotation is Tensor}
        assert shapes.keys() == tensors, function.__name__


@every_method
@pytest.mark.slow
def test_a_training_step_never_waits_for_the_device(name):
    """Forward, solver and the method's own state."""
    examples.steps_without_host_reads(examples.build(name), (8, 8, 8, 8, 8, 5))


@every_method
@pytest.mark.parametrize("standardize_logits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_small_step_down_the_gradient_lowers_the_loss(name, standardize_logits):
    distiller = examples.build(name, standardize_logits=standardize_logits, **ONE_LOSS.get(name, {})).train()
    for number in range(3):
        examples.step(distiller, examples.batch(number))
    batch, epoch = examples.batch(9), examples.epoch(5)
    before = distiller(batch, epoch).total
    before.backward()
    with torch.no_grad():
        for parameter in distiller.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
        after = distiller(batch, epoch).total
    assert after < before


@every_method
def test_the_gradient_reaches_the_student_and_the_method_s_own_modules_alone(name):
    distiller = examples.build(name).train()
    examples.step(distiller, examples.batch(0))
    distiller.zero_grad()
    distiller(examples.batch(1), examples.epoch()).total.backward()
    with_gradient = {key: value for key, value in distiller.named_parameters() if value.grad is not None}
    own = {key for key, value in distiller.named_parameters() if value.requires_grad}
    assert with_gradient.keys() == own - set(LEFT_OUT.get(name, ()))
    if distiller.phases:
        of_phase = [value for module in distiller.trained(distiller.phase) for value in module.parameters()]
        assert {id(value) for value in with_gradient.values()} == {id(value) for value in of_phase}
    else:
        assert own == {key for key, _ in distiller.named_parameters() if not key.startswith("teacher.")}
    trained = {id(parameter) for group in distiller.param_groups() for parameter in group["params"]}
    assert trained == {id(value) for key, value in distiller.named_parameters() if key in own}
    assert all(parameter.grad.isfinite().all() for parameter in with_gradient.values())
    assert any(parameter.grad.abs().max() > 0 for parameter in with_gradient.values())
    if distiller.phase is None:
        assert distiller.student[1 if name in LEFT_OUT else -1].weight.grad.abs().max() > 0


@every_method
def test_a_step_s_output_holds_the_signals_that_distillation_saw(name, monkeypatch):
    distiller, seen = examples.build(name).train(), []
    loss = "distillation" if distiller.phase is None else "first_phase"
    terms = getattr(distiller, loss)

    def recorded(*arguments: Any) -> dict[str, Tensor]:
        seen.append(arguments[-1])
        return terms(*arguments)

    monkeypatch.setattr(distiller, loss, recorded)
    signals = distiller(examples.batch(), examples.epoch()).signals
    assert len(seen) == 1
    assert seen[0] is signals


@every_method
def test_a_step_leaves_no_attribute_behind(name):
    """Neither the forward pass nor ``after_step`` binds anything anew: state is written into the buffers."""
    distiller = examples.build(name).train()
    before = attributes(distiller)
    output = distiller(examples.batch(), examples.epoch())
    assert_same_objects(before, attributes(distiller))
    output.total.backward()
    with torch.no_grad():
        distiller.after_step(output.signals)
    assert_same_objects(before, attributes(distiller))
    with torch.no_grad():
        distiller.eval()(examples.batch(), examples.epoch())
    assert_same_objects(before, attributes(distiller))


@every_method
def test_only_after_step_writes_the_method_s_state(name):
    distiller = examples.build(name).train()
    examples.step(distiller, examples.batch(0))
    before = own_state(distiller)
    with torch.no_grad():
        distiller(examples.batch(1), examples.epoch())
    distiller.eval()(examples.batch(2), examples.epoch())
    after = own_state(distiller)  # evaluation has written nothing; below, BatchNorm has its own way
    distiller.train()(examples.batch(3), examples.epoch()).total.backward()  # a dry run: no after_step
    changing = statistics(distiller)
    for state in (after, own_state(distiller)):
        assert state.keys() == before.keys()
        for key in before.keys() - changing:
            torch.testing.assert_close(state[key], before[key], rtol=0, atol=0)


@every_method
@pytest.mark.slow
def test_after_step_depends_on_the_signals_and_not_on_the_new_weights(name):
    """It runs after the solver: what it writes is what the step saw."""
    states = []
    for change in (0.0, 1.0):
        distiller = examples.build(name).train()
        examples.step(distiller, examples.batch(0))
        signals = distiller(examples.batch(1), examples.epoch(2)).signals
        with torch.no_grad():
            for parameter in distiller.parameters():
                parameter += change
            distiller.after_step(signals)
        trained = {key for key, _ in distiller.named_parameters()}
        states.append({key: value for key, value in own_state(distiller).items() if key not in trained})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@every_method
def test_evaluation_leaves_everything_as_it_is(name):
    distiller = examples.build(name).eval()
    before = copy.deepcopy(distiller.state_dict())
    first = distiller(examples.batch(), examples.epoch()).total
    torch.testing.assert_close(dict(distiller.state_dict()), dict(before), rtol=0, atol=0)
    assert distiller(examples.batch(), examples.epoch()).total == first


@pytest.mark.parametrize("name", [name for name in every_method.args[1] if examples.build(name).teacher])
@pytest.mark.slow
def test_the_teacher_stays_as_it_is_in_every_mode(name):
    distiller = examples.build(name)
    before = copy.deepcopy(distiller.teacher.state_dict())
    for mode in (True, False):
        distiller.train(mode)
        normalises_by_batch = [module for module in distiller.teacher.modules() if module.training]
        assert all(isinstance(module, nn.BatchNorm1d) for module in normalises_by_batch)
        assert bool(normalises_by_batch) == distiller.needs.teacher_batch_statistics
        distiller(examples.batch(), examples.epoch()).total.backward()
    examples.step(distiller, examples.batch(1), lr=0.1)
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    torch.testing.assert_close(dict(distiller.teacher.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*METHODS, *(name for name in examples.PHASES if name.split(":")[0] in METHODS)])
def test_an_epoch_may_end_in_a_single_image(name):
    """Where the networks can be trained on one; what the method adds, BatchNorm on a pixel among it, can."""
    distiller = examples.build(name).train()
    assert examples.step(distiller, examples.batch(size=1), lr=0.05).isfinite()
    assert all(value.isfinite().all() for value in distiller.state_dict().values())


@every_published_method
def test_a_method_that_reads_pooled_features_alone_leaves_them_to_the_cache(name):
    needs = DISTILLERS.get(name).needs
    assert needs.features != ("pooled",) or needs.teacher != "features"


@every_method
@pytest.mark.slow
def test_a_restored_method_continues_bit_for_bit(name):
    unbroken, restored = examples.build(name), examples.build(name)
    for number in range(6):  # enough for a queue of all samples to wrap around
        examples.step(unbroken, examples.batch(number), lr=0.01)
    restored.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    for number in range(6, 9):
        losses = [examples.step(distiller, examples.batch(number), 3, lr=0.01) for distiller in (unbroken, restored)]
        assert losses[0] == losses[1]
    torch.testing.assert_close(dict(restored.state_dict()), dict(unbroken.state_dict()), rtol=0, atol=0)


@every_method
def test_terms_are_named_finite_scalars(name):
    distiller = examples.build(name)
    smallest = 2 if distiller.needs.teacher_batch_statistics else 1
    for number, size in enumerate((8, smallest)):
        output = distiller.eval()(examples.batch(number, size), examples.epoch())
        assert output.terms
        assert not set(output.task) & set(output.distillation)
        assert all(
            term.shape == () and term.isfinite() and term.dtype == torch.float32 for term in output.terms.values()
        )
        assert output.logits.shape == (size, examples.CLASSES)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_losses_of_narrow_networks_are_float32(name, dtype):
    distiller = examples.build(name).eval()
    distiller.student.to(dtype)
    if distiller.teacher is not None:
        distiller.teacher.to(dtype)
    output = distiller(examples.batch(dtype=dtype), examples.epoch())
    assert {term.dtype for term in output.terms.values()} == {torch.float32}
    assert output.total.isfinite()


@every_method
def test_logits_of_1e4_give_finite_terms_and_gradients(name):
    distiller = examples.build(name).train()
    with torch.no_grad():
        for network in (distiller.student, distiller.teacher):
            if network is not None:
                network[-1].weight.mul_(1e4)
    for number in range(3):
        assert examples.step(distiller, examples.batch(number)).isfinite()
        gradients = [each.grad for each in distiller.parameters() if each.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", examples.HOOKS)
def test_the_methods_of_the_tests_run_on_networks_of_the_zoo(name):
    student, teacher = (MODELS.build("resnet8", examples.CLASSES) for _ in range(2))
    data = examples.data_info(image_size=32)
    distiller = DISTILLERS.build(name, student, teacher, data, **hooks.SETTINGS[name])
    batch = examples.batch(size=4, image=torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert examples.step(distiller, batch, lr=0.1).isfinite()
    for network in distiller.students().values():
        assert network.eval()(batch.image).shape == (4, examples.CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if DISTILLERS.get(name).needs.teacher == "features"])
def test_stages_of_other_numbers_and_sizes_are_matched_or_refused_in_a_line(name):
    """The student's are 32, 16 and 8 pixels high, the teacher's 16, 8, 4 and 4."""
    student, teacher = MODELS.build("resnet8", examples.CLASSES), MODELS.build("vgg8", examples.CLASSES)
    arguments = name, student, teacher, examples.data_info(image_size=32)
    if name in EQUAL_DEPTHS:
        with pytest.raises(UserError, match=r"^[^\n]*the student has (3 and|4 with the stem,) the teacher [45][^\n]*$"):
            DISTILLERS.build(*arguments, **examples.SETTINGS[name])
        return
    distiller = DISTILLERS.build(*arguments, **examples.SETTINGS[name])
    batch = examples.batch(size=2, image=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert examples.step(distiller, batch).isfinite()


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: bool(x.sum() > 0), id="if"),
        pytest.param(lambda x: x[x > 0], id="mask"),
        pytest.param(lambda x: x.index_put_((x > 0,), torch.tensor(0.0)), id="mask-write"),
        pytest.param(lambda x: x.masked_select(x > 0), id="masked_select"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: torch.where(x > 0), id="where"),
        pytest.param(lambda x: x.unique(), id="unique"),
        pytest.param(lambda x: x.unique_consecutive(), id="unique_consecutive"),
        pytest.param(lambda x: torch.equal(x, x), id="equal"),
        pytest.param(lambda x: F.one_hot(x.long().abs()), id="one_hot"),
        pytest.param(lambda x: x.tolist(), id="tolist"),
        pytest.param(lambda x: x.numpy(), id="numpy"),
        pytest.param(lambda x: x.repeat_interleave(x.long().abs()), id="repeat_interleave"),
        pytest.param(lambda x: [x for _ in range(x.long().abs().sum())], id="range"),
    ],
)
def test_host_reads_are_noticed(read):
    with pytest.raises(AssertionError), NoHostReads():
        read(torch.tensor([1.0, -1.0, 2.0]))


def test_other_operations_pass():
    x = torch.randn(4, 3, requires_grad=True)
    with NoHostReads():
        nn.functional.cross_entropy(x[torch.tensor([0, 2])], torch.tensor([0, 1])).backward()
        x.where(x > 0, 0.0).repeat_interleave(2, dim=0).masked_fill(torch.ones(8, 3).bool(), 0.0)
