"""Two and three processes that train together, over gloo on the CPU; rank 0 writes for all.

Starting processes takes seconds, so that one pair of them does all the ``JOBS`` and three do ``BY_THREE``, and each
test looks at what came out. Run as a module, this file is one of them. How a launcher starts them, and what becomes of
them when one is lost, is tried with torchrun.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mdistill import distributed
from mdistill.data import Batch, DataInfo
from mdistill.data.loader import BatchLoader
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine import trainer
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.run_folder import RunFolder, read_metrics
from mdistill.errors import RunFailed, Stopped, UserError
from mdistill.models import MODELS
from mdistill.optim.aligned_sgd import AlignedSGD

from .. import runs, streamed
from ..distillers import examples, hooks
from ..distillers.examples import HOOKS
from ..same import assert_same

ROOT = Path(__file__).resolve().parents[2]
assert streamed  # registers its data set, in the processes that are started here too
RANKS = 2
METHODS = [*examples.METHODS, *examples.PHASES, *HOOKS]
SIZES = (12, 13)  # of the steps in which every method is compared with one process
BESIDE = ("kd", "dist", "luminet", "rkd")  # whose second step has mixed images beside the plain ones
PATIENCE = 120  # seconds until a pair that hangs fails
NARROW = {"epochs": 2, "ema_decay": 0.9}


@DISTILLERS.register("gathered_queue")
class GatheredQueue(Distiller):
    """KD towards teacher and student logits of the last steps of all processes."""

    needs = Needs(teacher="logits", labels="none")
    queue: Tensor  # (Q, C), the newest first

    def __init__(self, student: nn.Module, teacher: nn.Module | None, data: DataInfo, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        self.register_buffer("queue", torch.zeros(40, data.num_classes))

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        goal = signals.teacher_logits + self.queue.mean(dim=0)
        return {"queue": (signals.student_logits - goal).square().mean()}

    def after_step(self, signals: Signals) -> None:
        rows = self.gather(signals.student_logits)
        self.queue.copy_(torch.cat([rows, self.queue])[: len(self.queue)])


@MODELS.register("net_without_batchnorm")
def net_without_batchnorm(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, num_classes)
    )


def write_configs(folder: Path) -> None:
    runs.write_config(folder, "gathered_queue", solver=NARROW)
    runs.write_config(folder, "hooks_memory", distiller=hooks.SETTINGS["hooks_memory"], solver={"epochs": 2})
    phases = {"projector": {"epochs": 1}, "student": {"epochs": 1}}
    runs.write_config(folder, "hooks_phases", solver={"epochs": 2}, phases=phases)
    (folder / "plain").mkdir()  # with a teacher of its own
    runs.write_config(folder / "plain", "kd", student="net_without_batchnorm", solver={"epochs": 2})
    runs.write_config(folder, "vanilla", data={"name": "streamed_blobs"}, solver={"epochs": 2})


# --- what each of the two processes does ---


def train_whole(folder: Path, rank: int) -> Any:
    """Into a folder of its own for each rank, to see who writes."""
    results = {}
    for method in ("gathered_queue", "hooks_memory", "hooks_phases", "vanilla"):
        experiment = runs.experiment(folder / f"{method}.yaml", cache=False, output=folder / f"rank{rank}")
        trainer.fit(experiment, [RunFolder(folder / f"rank{rank}" / method / "seed0", "new")])
        distiller = experiment.trials[0].distiller
        results[method] = {key: value for key, value in distiller.state_dict().items() if "teacher" not in key}
    return results


def train_in_parts(folder: Path, rank: int) -> Any:
    """One epoch and then another, in one folder."""
    for method in ("gathered_queue", "hooks_memory", "hooks_phases", "vanilla"):
        cfg, output = folder / f"{method}.yaml", folder / "parts" / method
        runs.train(cfg, output, "solver.epochs=1", cache=False)
        distributed.highest(0)  # both are here
        runs.train(cfg, output, mode="resume", cache=False)


def stop_one(folder: Path, rank: int) -> Any:
    """SIGTERM reaches the second process alone, in mid-epoch, and both then go on."""
    cfg, output = folder / "gathered_queue.yaml", folder / "stopped"
    experiment = runs.experiment(cfg, cache=False)
    with runs.stopping(3 if rank == 1 else 10**9):
        try:
            trainer.fit(experiment, [RunFolder(output / "seed0", "new")])
            message = "went on"
        except Stopped as error:
            message = str(error)
    distributed.highest(0)  # both are here
    runs.train(cfg, output, mode="resume", cache=False)
    return message


def first_gradients(folder: Path, rank: int) -> Any:
    return gradients(folder)


def gradients(folder: Path) -> list[Tensor]:
    """Of the first step, as the solver used them."""
    experiment = runs.experiment(folder / "plain" / "kd.yaml", cache=False)
    trial = ActiveTrial(experiment, experiment.trials[0])
    trial.begin_epoch(1)
    trainer.train_step(trial, trial.loader.fetch(0))
    trial.loader.close()
    return [parameter.grad.clone() for parameter in trial.student.parameters() if parameter.grad is not None]


def train_without_batchnorm(folder: Path, rank: int) -> Any:
    return runs.train(folder / "plain" / "kd.yaml", folder / "together", cache=False)


def uneven_batch(folder: Path, rank: int) -> Any:
    try:
        runs.experiment(folder / "plain" / "kd.yaml", "data.batch_size=25")
    except UserError as error:
        return str(error)


def short_last_batch(folder: Path, rank: int) -> Any:
    try:
        runs.experiment(folder / "plain" / "kd.yaml", "data.batch_size=22", "data.images=111")
    except UserError as error:
        return str(error)


def save_in_mid_epoch(folder: Path, rank: int) -> Any:
    """After every step; nothing else changes."""
    output = folder / "saving"
    runs.train(folder / "gathered_queue.yaml", output, "run.checkpoint_minutes=1e-9", cache=False)


def mistake(rank: int, of: tuple[int, ...]) -> str:
    try:
        with distributed.together():
            if rank in of:
                raise UserError("no such file")
    except UserError as error:
        return str(error)
    return ""


def mistakes(folder: Path, rank: int) -> Any:
    """Of all, and of one alone."""
    return [mistake(rank, (0, 1)), mistake(rank, (1,))]


def overflow(folder: Path, rank: int) -> Any:
    """The logits of a teacher are too large in the second process alone."""

    def finish(loader: BatchLoader) -> None:
        if rank == 1:
            raise RunFailed("the teacher's logits overflow")

    try:
        with mock.patch.object(BatchLoader, "finish", finish):
            runs.train(folder / "gathered_queue.yaml", folder / "overflow", cache=False)
    except RunFailed as error:
        return str(error)


def agreements(folder: Path, rank: int) -> Any:
    return [distributed.highest(rank * 15), distributed.of_rank_0({"rank": rank})]


def steps_of_every_method(folder: Path, rank: int) -> Any:
    return {method: steps_of(method, rank, torch.distributed.get_world_size()) for method in METHODS}


def steps_of(method: str, rank: int, ranks: int) -> dict[str, Any]:
    """Loss terms and summed gradients of two steps, in float64 and BatchNorm in evaluation mode, and the state."""
    found: dict[str, Any] = {}
    distiller = build_with_stored_statistics(method)
    for number, size in enumerate(SIZES):
        distiller.zero_grad()
        batch = own_part(number, size, rank, ranks)
        if number and method in BESIDE:
            batch = replace(batch, mixed=own_part(number + 9, size, rank, ranks))
        output = distiller(batch, examples.epoch(2))
        output.total.backward()
        parameters = [each for group in distiller.param_groups() for each in group["params"]]
        distributed.sum_gradients(parameters, output.share)
        with torch.no_grad():
            distiller.after_step(output.signals)
        terms = {name: distributed.sum_(output.share * term.detach()) for name, term in output.terms.items()}
        gradients = {name: each.grad.clone() for name, each in distiller.named_parameters() if each.grad is not None}
        found |= {f"terms {number}": terms, f"gradients {number}": gradients}
    return found | {"buffers": {name: value.clone() for name, value in distiller.named_buffers()}}


def aligned_gradients(folder: Path, rank: int) -> Any:
    return aligned_step(rank, torch.distributed.get_world_size())


def aligned_step(rank: int, ranks: int) -> dict[str, Tensor]:
    """The gradients that a step on task and distillation apart uses; the temperature is low, so that they conflict."""
    distiller = build_with_stored_statistics("kd", temperature=0.5)
    solver = AlignedSGD(distiller.param_groups(), momentum=0.9, weight_decay=5e-4)
    solver.step(distiller(own_part(0, SIZES[1], rank, ranks), examples.epoch(2)))
    return {name: each.grad.clone() for name, each in distiller.named_parameters() if each.grad is not None}


def build_with_stored_statistics(method: str, **changes: Any) -> Distiller:
    """In float64; BatchNorm normalises by what it has stored."""
    data = examples.data_info(batch_size=max(SIZES), num_samples=examples.SAMPLES)
    distiller = examples.build(method, data=data, **changes)
    distiller.double().train()
    for module in distiller.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return distiller


def own_part(seed: int, size: int, rank: int, ranks: int) -> Batch:
    """What ``rank`` takes of the batch that ``seed`` draws."""
    whole = examples.batch(seed, size, dtype=torch.float64)
    counts = distributed.split(size, ranks)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    rows = {name: value[own] for name, value in vars(whole).items() if isinstance(value, Tensor)}
    return replace(whole, **rows, rank_counts=counts if ranks > 1 else ())


JOBS: list[Callable[[Path, int], Any]] = [
    train_whole, train_in_parts, stop_one, first_gradients, train_without_batchnorm, uneven_batch, short_last_batch,
    save_in_mid_epoch, mistakes, overflow, agreements, steps_of_every_method, aligned_gradients,
]  # fmt: skip
BY_THREE: list[Callable[[Path, int], Any]] = [steps_of_every_method]


def main(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    group = f"file://{folder}/group{ranks}"
    distributed.begin_group("gloo", init_method=group, rank=rank, world_size=ranks)
    results = {job.__name__: job(folder, rank) for job in (JOBS if ranks == RANKS else BY_THREE)}
    torch.save(results, folder / f"results{rank}_of_{ranks}.pt")
    torch.distributed.destroy_process_group()


# --- what came out ---


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def run_group(path: Path, ranks: int) -> None:
    """Have ``ranks`` processes do their jobs; what they print is in ``out<rank>``."""
    command = [sys.executable, "-m", "tests.engine.test_distributed", str(path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks)], cwd=ROOT, env=ENVIRONMENT, **pipes) for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        path.joinpath(f"out{processes.index(process)}").write_text(out)


def read_results(path: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(path / f"results{rank}_of_{ranks}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both have done everything."""
    path = tmp_path_factory.mktemp("ranks")
    write_configs(path)
    run_group(path, RANKS)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return read_results(folder, RANKS)


@pytest.fixture(scope="module")
def results_of_three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("three")
    run_group(path, 3)
    return read_results(path, 3)


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]  # whose fixtures take seconds
TRAINED = pytest.mark.parametrize("method", ["gathered_queue", "hooks_memory", "hooks_phases", "vanilla"])


@TRAINED
def test_both_ranks_end_with_equal_weights_and_method_state(method: str, results: list[dict[str, Any]]) -> None:
    one, other = (result["train_whole"][method] for result in results)
    assert_same(one, other)
    assert all(value.isfinite().all() for value in one.values() if value.is_floating_point())


@TRAINED
def test_they_learn(method: str, folder: Path) -> None:
    *_, first, last = read_metrics(folder / "rank0" / method / "seed0")
    assert last["train/loss"] < first["train/loss"]


def test_rank_0_alone_writes(folder: Path) -> None:
    assert (folder / "rank0" / "gathered_queue" / "seed0" / "last.pt").exists()
    assert not (folder / "rank1").exists()


def test_rank_0_alone_tells_how_the_run_goes(folder: Path) -> None:
    outs = [folder.joinpath(f"out{rank}").read_text() for rank in range(RANKS)]
    assert "epoch 2/2" in outs[0]
    assert [line for line in outs[1].splitlines() if not line.startswith("[Gloo]")] == []  # torch 2.9's own lines


@TRAINED
def test_a_run_resumed_after_an_epoch_equals_an_unbroken_one(method: str, folder: Path) -> None:
    runs.assert_same_runs(folder / "rank0" / method, folder / "parts" / method)


def test_a_signal_to_one_rank_stops_both_in_mid_epoch(folder: Path, results: list[dict[str, Any]]) -> None:
    path = folder / "stopped" / "seed0" / "last.pt"
    expected = f"SIGTERM: stopped after step 3 of epoch 1, saved to {path}; continue with --resume"
    assert [result["stop_one"] for result in results] == [expected] * RANKS
    runs.assert_same_runs(folder / "rank0" / "gathered_queue", folder / "stopped")


def test_the_first_gradient_is_that_of_the_whole_batch(folder: Path, results: list[dict[str, Any]]) -> None:
    """Up to the order of the sums; for a network whose images do not see each other."""
    expected = gradients(folder)
    assert len(expected) == 4
    for rank in range(RANKS):
        for ours, whole in zip(results[rank]["first_gradients"], expected, strict=True):
            assert (ours - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert_same(*(result["first_gradients"] for result in results))


def test_a_run_equals_that_of_one_process_up_to_the_order_of_sums(folder: Path) -> None:
    ((*_, alone),) = runs.train(folder / "plain" / "kd.yaml", folder / "alone", cache=False)
    *_, together = read_metrics(folder / "together" / "seed0")
    keys = ("train/loss", "train/loss_ce", "train/loss_kd", "test/loss")
    assert [together[key] for key in keys] == pytest.approx([alone[key] for key in keys], rel=1e-5)
    assert together["train/top1"] == pytest.approx(alone["train/top1"], abs=1.01)  # one image in a hundred may tip


def test_a_batch_that_cannot_be_split_evenly_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["uneven_batch"] == (
            "data.batch_size: 25 images cannot be shared evenly by 2 processes; take a multiple of 2, such as 24"
        )
        assert result["short_last_batch"] == (
            "data.batch_size: with 22 the last of an epoch's batches has 1 of the 111 images, fewer than the 2"
            " processes; take another batch size"
        )


def test_saving_in_mid_epoch_changes_nothing(folder: Path, results: list[dict[str, Any]]) -> None:
    runs.assert_same_runs(folder / "rank0" / "gathered_queue", folder / "saving")


def test_a_mistake_of_one_ends_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["mistakes"] == ["no such file", "process 1: no such file"]
        assert result["overflow"].startswith("process 1: the teacher's logits overflow; ")
        assert result["agreements"] == [15, {"rank": 0}]


# --- every method ---


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {method: steps_of(method, 0, 1) for method in METHODS}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_losses_gradients_and_state_are_those_of_one_process(
    method: str, ranks: int, alone: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    fixture = "results" if ranks == RANKS else "results_of_three"
    found = [result["steps_of_every_method"][method] for result in request.getfixturevalue(fixture)]
    for other in found[1:]:
        assert_same(found[0], other)  # queues and memories too, to the bit
    for part, expected in alone[method].items():
        assert expected.keys() == found[0][part].keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[0][part][name], value, rtol=1e-12, atol=1e-12, msg=f"{part} {name}")


def test_gradients_are_aligned_once_they_are_those_of_the_whole_batch(results: list[dict[str, Any]]) -> None:
    found, expected = [result["aligned_gradients"] for result in results], aligned_step(0, 1)
    assert_same(*found)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


# --- by a launcher ---


def launch(folder: Path, method: str, *arguments: str, kill: str = "") -> tuple[int, list[str]]:
    """``torchrun`` two processes that train ``<method>.yaml``: its exit code, and what they printed."""
    given = ["--cfg", str(folder / f"{method}.yaml"), "--no-cache", "--output", str(folder / "launched"), *arguments]
    code, lines = launch_command(folder, "train", *given, kill=kill)
    return code, [line for line in lines if line.startswith(("error: ", "note: ", "epoch ", "resuming "))]


def launch_command(folder: Path, *arguments: str, kill: str = "") -> tuple[int, list[str]]:
    """``torchrun`` two processes of a command that looks for teachers in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.engine.launched", *arguments, "--device=cpu", "--checkpoint-root", str(folder)]
    environment = {**ENVIRONMENT, "KILL": kill}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_a_lost_process_ends_the_run_and_it_is_resumed_and_audited_bit_for_bit(folder: Path) -> None:
    saving = "run.checkpoint_minutes=1e-9"
    code, lines = launch(folder, "gathered_queue", saving, kill="1:8")
    path = next((folder / "launched").glob("**/last.pt"))
    saved = f"{path} has step 2 of epoch 2; continue with --resume"
    assert code == 1
    assert lines[-1] == f"error: another process of this run has ended, so this one ends too; {saved}"
    assert launch(folder, "gathered_queue", saving, "--resume")[0] == 0
    path.parent.rename(folder / "launched" / "seed0")
    runs.assert_same_runs(folder / "rank0" / "gathered_queue", folder / "launched")
    code, lines = launch_command(folder, "audit", str(folder / "launched" / "seed0"))
    assert code == 0
    assert [line for line in lines if line in {"bit-equal", "close", "different"}] == ["bit-equal"]  # told once


def test_a_mistake_is_told_once(folder: Path) -> None:
    code, lines = launch(folder, "gathered_queue", "data.batch_size=25")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("error: data.batch_size: 25 images cannot be shared evenly")


# --- alone ---


def test_alone_every_function_hands_back_what_it_was_given() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert distributed.gather(rows, ()) is rows
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.arange(2.0)
    distributed.sum_gradients([weight], 1.0)
    distributed.broadcast_([rows])
    with distributed.together():
        pass
    assert weight.grad.tolist() == [0, 1]
    assert rows.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert distributed.sum_(torch.tensor([2.0])).tolist() == [2]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert (distributed.highest(3), distributed.of_rank_0("own")) == (3, "own")
    assert not distributed.is_told_elsewhere("the last words")


@pytest.mark.parametrize(
    ("count", "ranks", "expected"),
    [(16, 2, (8, 8)), (13, 3, (5, 4, 4)), (2, 3, (1, 1, 0)), (0, 2, (0, 0)), (7, 1, (7,))],
)
def test_split(count: int, ranks: int, expected: tuple[int, ...]) -> None:
    assert distributed.split(count, ranks) == expected


def join(monkeypatch: pytest.MonkeyPatch, device: str | None, *, gpus: int, processes: int = 8) -> None:
    """As process 0 of ``processes`` on one machine that has ``gpus``."""
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with distributed.joined(device):
        raise AssertionError("joined")


def test_processes_that_cannot_have_a_device_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "8 processes were started on this machine, which has 2 usable CUDA devices: start 2 (torchrun --nproc-per-node"
        " 2), or train on the CPU with --device cpu"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        join(monkeypatch, None, gpus=2)
    with pytest.raises(UserError, match="--device: cuda:1 is one device, and 8 processes need one each"):
        join(monkeypatch, "cuda:1", gpus=8)
    with pytest.raises(UserError, match="which has 0 usable CUDA devices"):
        join(monkeypatch, "cuda", gpus=0)


def test_a_torch_without_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="this build of torch has no NCCL"):
        join(monkeypatch, None, gpus=8)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert distributed.usable_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert distributed.usable_cores() == 2


if __name__ == "__main__":
    signal.alarm(PATIENCE)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
