"""Precision: what runs in it, what stays float32, and that nothing else changes."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mdistill import precision as numerics
from mdistill.data import Batch
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine import build, trainer
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.evaluate import evaluate
from mdistill.engine.metrics import RunningMetrics
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError
from mdistill.models import MODELS
from mdistill.models.base import Features
from mdistill.precision import Precision, computing, require_precision, set_numerics

from . import runs

CPU = torch.device("cpu")
CONVOLUTIONS = torch.backends.cudnn.conv
Train = Callable[..., int]

units = pytest.mark.skipif(not numerics._cpu_has_bf16(), reason="needs a processor with bfloat16 units")


@DISTILLERS.register("feature_matching")
class FeatureMatching(Distiller):
    """A method that reads features of both networks; it remembers what it was given."""

    needs = Needs(teacher="features")

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        self.signals = signals
        student, teacher = signals.student_features, signals.teacher_features
        assert student is not None
        assert teacher is not None
        return {"pooled": (student.pooled - teacher.pooled).square().mean()}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Torch's settings are the process's: leave them as they were."""
    convolutions, products = CONVOLUTIONS.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    CONVOLUTIONS.fp32_precision, torch.backends.cuda.matmul.fp32_precision = convolutions, products
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.fixture
def conv_cfg(tmp_path: Path) -> Callable[[str], Path]:
    """Networks of the zoo under a method: two epochs of three steps, the last one smaller."""
    torch.manual_seed(5)
    torch.save({"model": MODELS.build("resnet8", 10).state_dict()}, tmp_path / "teacher.pt")

    def write(method: str) -> Path:
        settings: dict[str, Any] = {
            "data": {"name": "tiny", "images": 40, "batch_size": 16, "eval_batch_size": 30},
            "teacher": {"name": "resnet8", "checkpoint": "teacher.pt"},
            "student": {"name": "resnet8"},
            "distiller": {"name": method, "ce_weight": 0.5},
            "solver": {"name": "sgd", "epochs": 2, "lr": 0.05, "milestones": [], "gamma": 0.1}
            | {"momentum": 0.9, "weight_decay": 5e-4},
        }
        if method == "kd":
            settings["distiller"] |= {"kd_weight": 0.5, "temperature": 4.0}
        path = tmp_path / f"{method}_conv.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


class DTypes(TorchDispatchMode):
    """Notes the types of the floating-point tensors that each operation is given and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        dtypes = {
            value.dtype
            for value in pytree.tree_leaves((args, kwargs, result))
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        self.of.setdefault(func.overloadpacket.__name__, set()).update(dtypes)
        return result


def step(experiment: build.Experiment) -> tuple[DTypes, RunningMetrics]:
    """Two training steps of the first trial, the second one watched."""
    trial = ActiveTrial(experiment, experiment.trials[0])
    trial.begin_epoch(1)
    trial.run(trainer.train_step, trial.loader.fetch(0))
    with DTypes() as seen:
        trial.run(trainer.train_step, trial.loader.fetch(1))
    return seen, trial.metrics


# --- computing ---


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize("raises", [False, True])
def test_computing_puts_everything_back(precision: Precision, before: str, raises: bool) -> None:
    """The setting of convolutions and autocast, also behind an exception."""
    CONVOLUTIONS.fp32_precision = before
    inside: list[Any] = []
    try:
        with computing(precision, CPU):
            inside += [CONVOLUTIONS.fp32_precision, torch.is_autocast_enabled("cpu")]
            if raises:
                raise KeyError("in between")
    except KeyError:
        assert raises
    assert inside == ["tf32" if precision == "tf32" else "ieee", precision == "bf16"]
    assert CONVOLUTIONS.fp32_precision == before
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize("autocast", [False, True])
def test_computing_in_none_leaves_everything_alone(before: str, autocast: bool) -> None:
    CONVOLUTIONS.fp32_precision = before
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), computing(None, CPU):
        assert CONVOLUTIONS.fp32_precision == before
        assert torch.is_autocast_enabled("cpu") == autocast


def test_computing_is_nested() -> None:
    """A teacher's precision within a student's, and a caller's autocast around both."""
    CONVOLUTIONS.fp32_precision = "ieee"
    with torch.autocast("cpu", dtype=torch.bfloat16), computing("bf16", CPU):
        with computing("tf32", CPU):
            assert CONVOLUTIONS.fp32_precision == "tf32"
            assert not torch.is_autocast_enabled("cpu")
        assert CONVOLUTIONS.fp32_precision == "ieee"
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_numerics_of_the_process(precision: Precision, deterministic: bool) -> None:
    set_numerics(precision, deterministic=deterministic)
    assert CONVOLUTIONS.fp32_precision == ("tf32" if precision == "tf32" else "ieee")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.benchmark != deterministic
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.is_autocast_enabled("cpu")


# --- what a processor must have ---


def test_other_precisions_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_cpu_has_bf16", lambda: False)
    require_precision("fp32", CPU, "run.precision")
    require_precision("tf32", CPU, "run.precision")
    with pytest.raises(UserError, match=r"^over.there: bf16 needs a processor with bfloat16 units \(.*\), which this"):
        require_precision("bf16", CPU, "over.there")
    monkeypatch.setattr(numerics, "_cpu_has_bf16", lambda: True)
    require_precision("bf16", CPU, "run.precision")


@pytest.mark.parametrize(("has", "refused"), [(True, False), (False, True)])
def test_a_gpu_that_only_emulates_bf16_is_refused(has: bool, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    if not refused:
        require_precision("bf16", torch.device("cuda"), "run.precision")
        return
    with pytest.raises(UserError, match=r"run.precision: bf16 needs a GPU of the Ampere generation or newer, which"):
        require_precision("bf16", torch.device("cuda"), "run.precision")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["run.precision=bf16"], "run.precision"),
        (["run.precision=bf16", "run.teacher_precision=fp32"], "run.precision"),
        (["run.precision=bf16", "run.teacher_precision=bf16"], "run.precision"),
        (["run.teacher_precision=bf16"], "run.teacher_precision"),
        (["run.precision=fp32", "run.teacher_precision=bf16", "--dry-run"], "run.teacher_precision"),
    ],
)
def test_a_processor_without_bf16_refuses_it_before_anything_is_written(
    overrides: list[str],
    key: str,
    train: Train,
    kd_cfg: Path,
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numerics, "_cpu_has_bf16", lambda: False)
    before = sorted(tmp_path.rglob("*"))
    assert train(kd_cfg, *overrides) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {key}: bf16 needs a processor with bfloat16 units")
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


# --- whose precision it is ---


@pytest.mark.parametrize(
    ("overrides", "student", "teacher"),
    [
        ([], "tf32", "tf32"),
        (["run.precision=fp32"], "fp32", "fp32"),
        (["run.precision=bf16", "run.teacher_precision=null"], "bf16", "bf16"),
        (["run.precision=bf16", "run.teacher_precision=fp32"], "bf16", "fp32"),
        (["run.teacher_precision=bf16"], "tf32", "bf16"),
    ],
)
def test_a_teacher_has_the_student_s_precision_unless_it_has_its_own(
    overrides: list[str],
    student: str,
    teacher: str,
    kd_cfg: Path,
    teacher_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numerics, "_cpu_has_bf16", lambda: True)
    experiment = runs.experiment(kd_cfg, *overrides)
    distiller = experiment.trials[0].distiller
    assert (distiller.student_precision, distiller.teacher_precision) == (student, teacher)
    assert experiment.teacher is not None
    own = {"tf32": "fp32"}.get(teacher, teacher)  # which are the same on a CPU, and share a cache
    assert experiment.teacher.precision == experiment.teacher.identity()["precision"] == own


def test_the_precision_is_printed(
    train: Train, student_cfg: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(student_cfg, "run.precision=fp32") == 0
    assert "engine: eager (CPU); precision fp32" in capsys.readouterr().out


# --- bfloat16 ---

WIDE, NARROW = {torch.float32}, {torch.bfloat16}


@units
@pytest.mark.parametrize("standardize", [False, True])
def test_bf16_is_for_networks_alone(standardize: bool, conv_cfg: Callable[[str], Path]) -> None:
    """Convolutions there and back are narrow; logits, losses, gradients of weights, weights and momentum are not."""
    experiment = runs.experiment(
        conv_cfg("kd"), "run.precision=bf16", f"distiller.standardize_logits={str(standardize).lower()}"
    )
    trial = experiment.trials[0]
    outputs: list[Any] = []
    trial.distiller.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    seen, metrics = step(experiment)
    assert seen.of["convolution"] == NARROW
    assert seen.of["convolution_backward"] == NARROW
    for name in ("_log_softmax", "nll_loss_forward", "_log_softmax_backward_data", "_fused_sgd_"):
        assert seen.of[name] == WIDE, name
    for output in outputs:
        assert output.logits.dtype == torch.float32
        assert {term.dtype for term in output.terms.values()} == WIDE
    state = trial.distiller.state_dict()
    own = [value for name, value in state.items() if not name.startswith("teacher.")]
    assert {value.dtype for value in own if value.is_floating_point()} == WIDE
    assert {parameter.grad.dtype for parameter in trial.distiller.student.parameters()} == WIDE
    momentum = [entry["momentum_buffer"] for entry in trial.phases[-1].solver.state_dict()["state"].values()]
    assert momentum
    assert {value.dtype for value in momentum} == WIDE
    assert (metrics.totals.dtype, metrics.read(1).images) == (torch.float64, 32)
    assert experiment.teacher is not None
    assert experiment.teacher(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


@units
@pytest.mark.parametrize(("student", "teacher"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_student_and_teacher_each_run_in_their_own_precision(
    student: str, teacher: str, conv_cfg: Callable[[str], Path]
) -> None:
    experiment = runs.experiment(conv_cfg("kd"), f"run.precision={student}", f"run.teacher_precision={teacher}")
    types = {"fp32": WIDE, "bf16": NARROW}
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(image, torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    distiller = experiment.trials[0].distiller.eval()
    assert distiller.teacher is not None
    assert experiment.teacher is not None
    types_of: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    networks = (("student", distiller.student), ("teacher", distiller.teacher))
    for name, network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, inputs, output, name=name: types_of[name].add(output.dtype))
    output = distiller(batch, torch.tensor(1))  # here the method's own teacher, as no logits came with the batch
    assert types_of == {"student": types[student], "teacher": types[teacher]}
    assert output.logits.dtype == torch.float32
    with DTypes() as seen:
        experiment.teacher(image)
    assert seen.of["convolution"] == types[teacher]


@units
def test_evaluation_is_in_float32_whatever_the_student_ran_in(conv_cfg: Callable[[str], Path]) -> None:
    experiment = runs.experiment(conv_cfg("kd"), "run.precision=bf16")
    student = experiment.trials[0].distiller.student
    for precision in ("bf16", "fp32", None):
        with DTypes() as seen:
            result = evaluate(student, experiment.dataset, "test", batch_size=30, precision=precision)
        assert seen.of["convolution"] == WIDE
        assert seen.of["_log_softmax"] == WIDE
        assert 0 < result.loss < 10


@units
@pytest.mark.slow
def test_a_bf16_run_learns_and_resumes_bit_for_bit(
    train: Train, kd_cfg: Path, teacher_file: Path, tmp_path: Path
) -> None:
    overrides = ("run.precision=bf16", "solver.epochs=4")
    assert train(kd_cfg, *overrides, "--output", str(tmp_path / "whole")) == 0
    with runs.stopping(5):
        assert train(kd_cfg, *overrides) == 75
    assert train(kd_cfg, *overrides, "--resume") == 0
    (whole,), (parts,) = ((tmp_path / name).rglob("last.pt") for name in ("whole", "runs"))
    left, right = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert left["model"].keys() == right["model"].keys()
    for key, value in left["model"].items():
        assert torch.equal(value, right["model"][key]), key
    for number, entry in left["solver"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], right["solver"]["state"][number]["momentum_buffer"])
    metrics = [read_metrics(path.parent) for path in (whole, parts)]
    keys = ("train/loss", "train/loss_kd", "train/top1", "test/top1", "test/loss", "best/epoch")
    assert [[line[key] for key in keys] for line in metrics[0]] == [[line[key] for key in keys] for line in metrics[1]]
    assert metrics[0][-1]["train/loss"] < metrics[0][0]["train/loss"]


@pytest.mark.slow
@units
def test_bf16_is_close_to_fp32_and_not_it(kd_cfg: Path, teacher_file: Path, tmp_path: Path, train: Train) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        assert train(kd_cfg, f"run.precision={precision}") == 0
        (folder,) = (tmp_path / "runs").rglob(f"precision={precision}/seed0")
        losses.append([line["train/loss"] for line in read_metrics(folder)])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@units
@pytest.mark.parametrize("teacher", ["bf16", "fp32"])
def test_features_under_bf16(teacher: Literal["bf16", "fp32"], conv_cfg: Callable[[str], Path]) -> None:
    """A method that reads features gets them and the logits in float32, whatever the networks ran in."""
    experiment = runs.experiment(conv_cfg("feature_matching"), "run.precision=bf16", f"run.teacher_precision={teacher}")
    assert experiment.teacher is None
    assert experiment.teacher_note.startswith("runs in every step")
    seen, metrics = step(experiment)
    distiller = experiment.trials[0].distiller
    assert isinstance(distiller, FeatureMatching)
    signals = distiller.signals
    assert isinstance(signals.student_features, Features)
    assert isinstance(signals.teacher_features, Features)
    for features in (signals.student_features, signals.teacher_features):
        assert {features.pooled.dtype, features.last_map.dtype, *(stage.dtype for stage in features.stages)} == WIDE
    assert signals.student_logits.dtype == signals.teacher_logits.dtype == torch.float32
    assert seen.of["convolution"] == (NARROW if teacher == "bf16" else NARROW | WIDE)
    assert seen.of["convolution_backward"] == NARROW
    assert seen.of["_fused_sgd_"] == WIDE
    assert metrics.read(1).terms.keys() == {"ce", "pooled"}


@pytest.mark.slow
@units
def test_a_run_on_features_under_bf16_learns(
    train: Train, conv_cfg: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(conv_cfg("feature_matching"), "run.precision=bf16") == 0
    out = capsys.readouterr().out
    assert "precision bf16" in out
    assert "teacher: runs in every step: this method reads more of it than its logits" in out
    (path,) = (tmp_path / "runs").rglob("metrics.jsonl")
    metrics = read_metrics(path.parent)
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]


@units
def test_a_caller_s_autocast_does_not_reach_the_losses(conv_cfg: Callable[[str], Path]) -> None:
    experiment = runs.experiment(conv_cfg("kd"), "run.precision=fp32")
    distiller = experiment.trials[0].distiller
    distiller.student_precision = distiller.teacher_precision = None
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(image, torch.arange(4), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    with DTypes() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        output = distiller(batch, torch.tensor(1))
    assert seen.of["convolution"] == NARROW
    assert seen.of["_log_softmax"] == WIDE
    assert {term.dtype for term in output.terms.values()} == WIDE
