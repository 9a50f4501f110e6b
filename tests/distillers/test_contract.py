"""What holds for every registered method; a new one is covered by its settings in ``examples.py``."""

import copy
import importlib
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS, Distiller
from mdistill.engine.metrics import EpochSums
from mdistill.engine.trainer import train_step
from mdistill.optim.solvers import SGD

from ..host_reads import NoHostReads
from . import examples

METHODS = examples.METHODS
every_method = pytest.mark.parametrize("name", METHODS)
SHARED = {"warmup_epochs", "standardize_logits", "ema_decay", "average_from"}
VARIANTS = {
    "kd": {"divergence", "balance", "target", "interpolation"}
}  # off by default: the method is then as published


def own_state(distiller: Distiller) -> dict[str, Tensor]:
    """What the method keeps beside its networks."""
    state = distiller.training_state()
    return {key: value.clone() for key, value in state.items() if not key.startswith("student.")}


def test_there_are_example_settings_for_every_method():
    assert sorted(examples.SETTINGS) == METHODS
    assert {"vanilla", "kd", "dkd", "rld", "mcld"} <= set(METHODS)


@every_method
def test_module_class_and_registered_name_agree(name):
    builder = DISTILLERS.get(name)
    module = importlib.import_module(f"mdistill.distillers.{name}")
    assert builder.__module__ == module.__name__
    assert builder.__name__.lower() == name.replace("_", "")
    assert module.__doc__.startswith(builder.__name__)


@every_method
def test_method_values_have_types_and_no_hidden_defaults(name):
    """Every value that a YAML may set is annotated; only what the base gives to all, or a variant, may be left out."""
    arguments = DISTILLERS.arguments(name)
    assert all(argument.annotation is not inspect.Parameter.empty for argument in arguments.values())
    optional = {key for key, argument in arguments.items() if argument.default is not inspect.Parameter.empty}
    assert optional == SHARED | VARIANTS.get(name, set())
    complete, problems = DISTILLERS.check(name, examples.SETTINGS[name])
    assert not problems
    assert set(complete) == set(arguments)


@every_method
def test_a_training_step_never_waits_for_the_device(name):
    """The engine's own ``train_step``, whole: forward, solver, method state and metrics."""
    distiller = examples.build(name).train()
    solver = SGD(distiller.param_groups(), momentum=0.9, nesterov=False, weight_decay=5e-4)
    solver.set_lr(0.05)
    batches = [examples.batch(number, size) for number, size in enumerate((8, 8, 8, 8, 8, 5))]
    epoch, sums = examples.epoch(2), EpochSums(torch.device("cpu"))
    with NoHostReads():
        for batch in batches:
            train_step(distiller, solver, batch, epoch, sums)
    assert sums.read(epoch=2).images == 45


@every_method
@pytest.mark.parametrize("standardize_logits", [False, True])
def test_a_small_step_down_the_gradient_lowers_the_loss(name, standardize_logits):
    distiller = examples.build(name, standardize_logits=standardize_logits).train()
    for number in range(3):
        examples.step(distiller, examples.batch(number))
    batch, epoch = examples.batch(9), examples.epoch(5)
    before = distiller(batch, epoch).total
    before.backward()
    with torch.no_grad():
        for parameter in distiller.student.parameters():
            parameter -= 1e-3 * parameter.grad
        after = distiller(batch, epoch).total
    assert after < before


@every_method
def test_the_gradient_reaches_the_student_and_the_method_s_own_modules_alone(name):
    distiller = examples.build(name).train()
    examples.step(distiller, examples.batch(0))
    distiller.zero_grad()
    distiller(examples.batch(1), examples.epoch()).total.backward()
    with_gradient = {key for key, value in distiller.named_parameters() if value.grad is not None}
    assert with_gradient == {key for key, _ in distiller.named_parameters() if not key.startswith("teacher.")}
    trained = [parameter for group in distiller.param_groups() for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {
        id(value) for value in distiller.parameters() if value.grad is not None
    }
    assert all(parameter.grad.isfinite().all() for parameter in trained)
    assert distiller.student[-1].weight.grad.abs().max() > 0


@every_method
def test_only_after_step_writes_the_method_s_state(name):
    distiller = examples.build(name).train()
    examples.step(distiller, examples.batch(0))
    before = own_state(distiller)
    with torch.no_grad():
        distiller(examples.batch(1), examples.epoch())
    distiller.after_step()
    distiller.eval()(examples.batch(2), examples.epoch())
    distiller.after_step()
    distiller.train()(examples.batch(3), examples.epoch()).total.backward()  # a dry run: no after_step
    torch.testing.assert_close(own_state(distiller), before, rtol=0, atol=0)


@every_method
def test_evaluation_leaves_everything_as_it_is(name):
    distiller = examples.build(name).eval()
    before = copy.deepcopy(distiller.state_dict())
    first = distiller(examples.batch(), examples.epoch()).total
    distiller.after_step()
    torch.testing.assert_close(dict(distiller.state_dict()), dict(before), rtol=0, atol=0)
    assert distiller(examples.batch(), examples.epoch()).total == first


@every_method
def test_a_restored_method_goes_on_bit_for_bit(name):
    unbroken, restored = examples.build(name), examples.build(name)
    for number in range(7):
        examples.step(unbroken, examples.batch(number), lr=0.01)
    restored.load_training_state(copy.deepcopy(unbroken.training_state()))
    for number in range(7, 12):
        losses = [examples.step(distiller, examples.batch(number), lr=0.01) for distiller in (unbroken, restored)]
        assert losses[0] == losses[1]
    torch.testing.assert_close(restored.training_state(), unbroken.training_state(), rtol=0, atol=0)


@every_method
def test_terms_are_named_finite_scalars(name):
    distiller = examples.build(name)
    for number, size in enumerate((8, 1)):
        output = distiller.eval()(examples.batch(number, size), examples.epoch())
        assert output.terms
        assert not set(output.task) & set(output.distillation)
        assert all(
            term.shape == () and term.isfinite() and term.dtype == torch.float32 for term in output.terms.values()
        )
        assert output.logits.shape == (size, examples.CLASSES)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_narrow_networks_are_float32(name, dtype):
    distiller = examples.build(name).eval()
    distiller.student.to(dtype)
    if distiller.teacher is not None:
        distiller.teacher.to(dtype)
    output = distiller(examples.batch(dtype=dtype), examples.epoch())
    assert {term.dtype for term in output.terms.values()} == {torch.float32}
    assert output.total.isfinite()


@every_method
def test_a_network_of_a_mean_scale_does_not_break_it(name):
    """Logits of 1e4 through the whole method: finite terms and gradients."""
    distiller = examples.build(name).train()
    with torch.no_grad():
        for network in (distiller.student, distiller.teacher):
            if network is not None:
                network[-1].weight.mul_(1e4)
    for number in range(3):
        assert examples.step(distiller, examples.batch(number)).isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in distiller.student.parameters())


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
def test_the_watch_sees_host_reads(read):
    with pytest.raises(AssertionError), NoHostReads():
        read(torch.tensor([1.0, -1.0, 2.0]))


def test_the_watch_lets_the_rest_pass():
    x = torch.randn(4, 3, requires_grad=True)
    with NoHostReads():
        nn.functional.cross_entropy(x[torch.tensor([0, 2])], torch.tensor([0, 1])).backward()
        x.where(x > 0, 0.0).repeat_interleave(2, dim=0).masked_fill(torch.ones(8, 3).bool(), 0.0)
