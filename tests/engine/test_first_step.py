"""What a user's method or network returns is checked against the contract, and named in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.models import MODELS

from ..conftest import TinyNet, refused

Train = Callable[..., int]


@DISTILLERS.register("faulty_method")
class Faulty(Distiller):
    """Returns what the test says."""

    needs = Needs(teacher="none")
    returns: Callable[[Signals], Any] = staticmethod(lambda signals: {})

    def __init__(self, student: Any, teacher: Any, data: Any, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        return type(self).returns(signals)


class Reshaped(TinyNet):
    """A network whose output in training is what the test says; in evaluation it is fine."""

    change: Callable[[Tensor], Any] = staticmethod(lambda logits: logits)

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return type(self).change(logits) if self.training else logits


@MODELS.register("reshaped_net")
def reshaped_net(num_classes: int) -> Reshaped:
    return Reshaped(num_classes, 8)


@MODELS.register("fixed_net")
def fixed_net(num_classes: int) -> nn.Module:
    return TinyNet(num_classes, 8).requires_grad_(False)


@pytest.fixture
def faulty(student_cfg: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Faulty, "returns", Faulty.returns)
    monkeypatch.setattr(Reshaped, "change", Reshaped.change)
    student_cfg.write_text(student_cfg.read_text().replace("vanilla, ce_weight: 1.0", "faulty_method, ce_weight: 1.0"))
    return student_cfg


RETURNS: dict[str, tuple[Callable[[Signals], Any], str]] = {
    "nothing": (lambda signals: None, "should return a dictionary of scalar tensors, found None, a NoneType"),
    "a scalar": (
        lambda signals: signals.student_logits.mean(),
        "dictionary of scalar tensors, found a tensor of shape ()",
    ),
    "a vector": (
        lambda signals: {"mine": signals.student_logits.mean(dim=1)},
        "the term 'mine' should be a scalar tensor, found a tensor of shape (2,) in torch.float32",
    ),
    "a float": (lambda signals: {"mine": 1.5}, "the term 'mine' should be a scalar tensor, found 1.5, a float"),
    "a whole number": (
        lambda signals: {"mine": signals.target.sum()},
        "the term 'mine' should be a scalar tensor, found a tensor of shape () in torch.int64",
    ),
    "a name that is taken": (
        lambda signals: {"ce": signals.student_logits.mean()},
        "Faulty.task: 'ce' is no name of its own for a term",
    ),
    "a name that is none": (
        lambda signals: {7: signals.student_logits.mean()},
        "Faulty.distillation: 7 is no name of its own for a term",
    ),
}


@pytest.mark.parametrize("what", RETURNS)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_what_a_method_returns_is_named_in_one_line(
    what: str, flags: tuple[str, ...], train: Train, faulty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Faulty.returns = staticmethod(RETURNS[what][0])
    line = refused(capsys, train(faulty, *flags))
    assert "Faulty." in line
    assert RETURNS[what][1] in line


def test_a_loss_without_a_term_is_refused(train: Train, faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, train(faulty, "distiller.ce_weight=0"))
    assert line == "error: Faulty returned no term at all, so there is no loss"


def test_terms_whose_names_change_are_named(train: Train, faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = iter(["one", "one", "two"])
    Faulty.returns = staticmethod(lambda signals: {next(names): signals.student_logits.square().mean()})
    line = refused(capsys, train(faulty))
    assert "the loss terms of this step are ce, two; they were ce, one" in line


CHANGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "another width": (lambda logits: logits[:, :7], "(2, 10), found a tensor of shape (2, 7)"),
    "maps": (lambda logits: logits[:, :, None, None], "(2, 10), found a tensor of shape (2, 10, 1, 1)"),
    "a tuple": (lambda logits: (logits, logits), "(2, 10), found (tensor("),
    "whole numbers": (lambda logits: logits.long(), "(2, 10), found a tensor of shape (2, 10) in torch.int64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_logits_of_another_form_are_named_with_their_network(
    change: str, train: Train, faulty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Reshaped.change = staticmethod(CHANGES[change][0])
    line = refused(capsys, train(faulty, "student.name=reshaped_net"))
    assert line.startswith("error: Reshaped should turn 2 images into logits of shape (2, 10), found ")
    assert CHANGES[change][1] in line


def test_a_network_without_trainable_parameters_is_named(
    train: Train, faulty: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(capsys, train(faulty, "student.name=fixed_net"))
    assert line == "error: student.name: 'fixed_net' has no trainable parameters"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("students", "message"),
    [
        (lambda self: self.student, "found Tiny"),
        (lambda self: {}, "found {}"),
        (lambda self: {"student": self.student, "../up": self.student}, "'../up' is no such name"),
        (lambda self: {"last": self.student}, "'last' is no such name"),
        (lambda self: {"EMA": self.student}, "'EMA' is no such name"),
        (lambda self: {"wide": self.student, "Wide": self.student}, "'wide' is no such name"),
        (lambda self: {"student": self.student, "ema": self.student}, "'ema' is no such name"),
        (lambda self: {"student": "student"}, "found {'student': 'student'}"),
    ],
)
def test_networks_to_export_need_names_of_their_own(
    students: Callable[[Distiller], Any],
    message: str,
    train: Train,
    faulty: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Faulty, "students", students)
    line = refused(capsys, train(faulty))
    assert line.startswith("error: distiller.name: students() of 'faulty_method' should return networks by name")
    assert message in line


WEIGHT = nn.Parameter(torch.zeros(2))
GROUPS: list[Any] = [
    None,
    [],
    [{}],
    [3],
    [{"params": []}],
    [{"params": [torch.zeros(1)]}],
    [{"params": WEIGHT}],
    [{"params": [WEIGHT]}, {"params": [WEIGHT]}],
    [{"params": [WEIGHT], "lr_scale": "x"}],
]


@pytest.mark.parametrize("groups", GROUPS)
def test_parameter_groups_that_no_optimiser_takes_are_named(
    groups: Any, train: Train, faulty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "param_groups", lambda self: groups)
    line = refused(capsys, train(faulty))
    assert line.startswith("error: distiller.name: param_groups() of 'faulty_method' should return a list of groups")


def test_the_step_that_is_tried_leaves_no_trace(
    train: Train, faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has gradients, as a method may ask for them, and it is in training mode; buffers are as before."""
    seen: list[tuple[int, bool, bool, float]] = []

    def returns(signals: Signals) -> dict[str, Tensor]:
        (gradient,) = torch.autograd.grad(signals.student_logits.sum(), signals.student_logits, retain_graph=True)
        seen.append((len(signals.target), module.training, gradient is not None, float(module.counter)))
        module.counter += 1
        return {
            "mine": signals.student_logits.square().mean(),
            **({"more": 0 * gradient.sum()} if module.training else {}),
        }

    original = Faulty.__init__

    def with_a_counter(self: Faulty, *arguments: Any, **shared: Any) -> None:
        nonlocal module
        original(self, *arguments, **shared)
        self.register_buffer("counter", torch.zeros(()))
        module = self

    module: Any = None
    monkeypatch.setattr(Faulty, "__init__", with_a_counter)
    Faulty.returns = staticmethod(returns)
    assert train(faulty, "solver.epochs=1") == 0
    assert seen[0] == (2, True, True, 0.0)
    assert seen[1] == (64, True, True, 0.0)
    assert train(faulty, "--resume") == 0


def test_an_evaluation_that_is_not_finite_ends_the_run_and_no_line_is_written(
    train: Train, faulty: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(faulty, "solver.epochs=1") == 0
    monkeypatch.setattr(
        TinyNet, "forward", lambda self, x: self.forward_features(x).logits / (1.0 if self.training else 0.0)
    )
    folder = tmp_path / "runs/tiny/faulty_method/tiny_net/seed0"
    before = (folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    line = refused(capsys, train(faulty, "--resume"), expected=1)
    assert "the cross-entropy on test is nan: TinyNet has logits that are not finite; " in line
    assert line.endswith("last.pt keeps the last good state")
    assert (folder / "metrics.jsonl").read_text() == before


def test_an_error_in_the_user_s_code_shows_the_user_s_frames(
    train: Train, student_cfg: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "broken_method.py"
    path.write_text(
        "from mdistill import DISTILLERS, Distiller, Needs\n"
        "@DISTILLERS.register('broken_method')\n"
        "class Broken(Distiller):\n"
        "    needs = Needs(teacher='none')\n"
        "    def distillation(self, signals):\n"
        "        return {'mine': signals.student_logits @ signals.student_logits}\n"
    )
    text = student_cfg.read_text().replace("vanilla", "broken_method")
    student_cfg.write_text(f"imports: [broken_method]\n{text}")
    assert train(student_cfg) == 1
    first, place, *rest, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last), in your code:"
    assert place == f'  File "{path}", line 6, in distillation'
    assert len(rest) <= 2
    assert last.startswith("RuntimeError: ")
    assert "shapes cannot be multiplied" in last
