"""What a run records of its first steps: the numbers are those of the steps, and stops do not change them."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdistill.distillers.base import StepOutput
from mdistill.engine import checkpoint, first_steps, trainer
from mdistill.engine.first_steps import FirstSteps, digest
from mdistill.engine.metrics import RunningMetrics
from mdistill.engine.run_folder import read_metrics
from mdistill.errors import UserError
from mdistill.file_schemas import Progress

from .. import runs
from ..replay import emulated

MASK = 2**64 - 1


def mixed(value: int) -> int:
    """``_mixed`` on a Python number, with shifts that keep the sign."""
    for shift, factor in ((0, 0x9E3779B97F4A7C15), (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        signed = value - 2**64 if value >> 63 else value
        value = ((signed ^ (signed >> shift)) if shift else signed) * factor & MASK
    return value


def test_the_digest_is_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        torch.tensor(7),
        torch.randn(3, generator=generator).bfloat16(),
        torch.randn(3, generator=generator, dtype=torch.float64),
        torch.tensor([True, False]),
    ]
    words: list[int] = []
    for tensor in tensors:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        size = 4 if tensor.element_size() % 4 == 0 else 1
        parts = [bytes(raw[at : at + size]) for at in range(0, len(raw), size)]
        words += [int.from_bytes(part, "little", signed=size == 4) for part in parts]
    expected = sum(word * (mixed(place) | 1) for place, word in enumerate(words, start=1)) & MASK
    assert int(digest(tensors)) & MASK == expected
    monkeypatch.setattr(first_steps, "BLOCK", 5)
    assert int(digest(tensors)) & MASK == expected
    assert digest(tensors).shape == ()


def test_the_digest_changes_with_every_bit_and_with_places() -> None:
    values = torch.arange(1.0, 33.0)
    seen = {int(digest([values]))}
    for place in range(32):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1 << place
        seen.add(int(digest([changed])))
    seen |= {int(digest([values.flip(0)])), int(digest([values.roll(1)])), int(digest([values, values[:1]]))}
    assert len(seen) == 36
    assert int(digest([values[:5], values[5:]])) == int(digest([values]))


@pytest.mark.parametrize(("batch_size", "count"), [(24, 5), (10, 8)])
def test_the_record_holds_the_terms_of_each_step_and_the_weights_after_the_last(
    batch_size: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch of 5 steps, and one of 10."""
    seen: list[dict[str, float]] = []
    digests: list[str] = []
    update, note = RunningMetrics.update, FirstSteps.note

    def watched(metrics: RunningMetrics, output: StepOutput) -> None:
        seen.append({name: float(term) for name, term in output.terms.items()})
        update(metrics, output)

    def noted(record: FirstSteps, done: int, metrics: RunningMetrics, distiller: Any) -> None:
        note(record, done, metrics, distiller)
        state: dict[str, Tensor] = distiller.state_dict()
        own = [value for name, value in state.items() if not name.startswith("teacher.")]
        digests.append(f"{int(digest(own)) & MASK:016x}")

    monkeypatch.setattr(RunningMetrics, "update", watched)
    monkeypatch.setattr(FirstSteps, "note", noted)
    ((first, second),) = runs.train(
        runs.write_config(tmp_path), tmp_path, "solver.epochs=2", f"data.batch_size={batch_size}"
    )
    recorded = first["first_steps"]
    assert recorded["terms"] == {name: [step[name] for step in seen[:count]] for name in seen[0]}
    assert recorded["weights"] == digests[count - 1]
    assert len(set(digests)) == len(digests) == -(-runs.IMAGES // batch_size)
    assert "first_steps" not in second


@pytest.mark.parametrize(("stop_at", "engine"), [(1, "eager"), (4, "eager"), (3, "emulated graph")])
def test_a_run_that_is_stopped_within_its_first_steps_records_the_same(
    stop_at: int, engine: str, tmp_path: Path
) -> None:
    cfg = runs.write_config(tmp_path)
    ((whole,),) = runs.train(cfg, tmp_path / "whole", "solver.epochs=1")
    for options in ({"stop_at": stop_at}, {"mode": "resume"}):
        with nullcontext() if engine == "eager" else emulated():
            train: Callable[..., Any] = runs.train
            train(cfg, tmp_path / "parts", "solver.epochs=1", **options)
    (parts,) = read_metrics(tmp_path / "parts" / "seed0")
    assert parts["first_steps"] == whole["first_steps"]
    assert "first_steps" not in runs.state(tmp_path / "parts")


def test_a_checkpoint_without_them_leaves_no_record(tmp_path: Path) -> None:
    """As earlier versions wrote it: the rest of the run goes on."""
    cfg = runs.write_config(tmp_path)
    runs.train(cfg, tmp_path, stop_at=3)
    path = tmp_path / "seed0" / "last.pt"
    state = runs.state(tmp_path)
    assert [*state["first_steps"]["totals"].shape] == [3, 6]
    del state["first_steps"]
    torch.save(state, path)
    runs.train(cfg, tmp_path, mode="resume")
    assert not any("first_steps" in line for line in read_metrics(tmp_path / "seed0"))


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("totals", torch.zeros(1, 6, dtype=torch.float64), "first_steps.totals is (1, 6) in torch.float64, not (3, 6)"),
        ("totals", torch.full((3, 6), float("nan"), dtype=torch.float64), "NaN or infinite values in first_steps"),
        ("totals", "x", "first_steps.totals is 'x', not a tensor"),
        ("weights", torch.zeros(2), "first_steps.weights is (2,) in torch.float32, not ()"),
    ],
)
def test_what_cannot_be_a_record_is_refused(key: str, value: Any, problem: str, tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path)
    runs.train(cfg, tmp_path, stop_at=3)
    state = runs.state(tmp_path)
    state["first_steps"][key] = value
    torch.save(state, tmp_path / "seed0" / "last.pt")
    with pytest.raises(UserError, match=re.escape(problem)):
        runs.train(cfg, tmp_path, mode="resume")


def test_a_later_epoch_has_none_to_resume_from(tmp_path: Path) -> None:
    built = runs.experiment(runs.write_config(tmp_path, "vanilla"))
    record = FirstSteps(built.device, runs.STEPS)
    state = {"totals": torch.zeros(2, 4, dtype=torch.float64), "weights": torch.zeros((), dtype=torch.int64)}
    assert record.misfit(state, Progress(epoch=1, step=2), 1) is None
    assert record.misfit(state, Progress(epoch=2, step=2), 1) == "first_steps are there in epoch 2"


@pytest.mark.parametrize("whole", [False, True])
def test_the_first_epoch_is_replayed_without_a_file(whole: bool, tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path)
    ((line,),) = runs.train(cfg, tmp_path / "run", "solver.epochs=1", "data.batch_size=10")
    before = sorted(tmp_path.rglob("*"))
    built = runs.experiment(cfg, "solver.epochs=1", "data.batch_size=10", cache=False)
    found = trainer.first_epoch(built, whole=whole)
    assert found["first_steps"] == line["first_steps"]
    assert ("test/top1" in found) == whole
    assert (found["train/loss"] == line["train/loss"]) == whole
    assert sorted(tmp_path.rglob("*")) == before


def test_the_format_of_a_checkpoint_between_epochs_is_as_before(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "vanilla")
    runs.train(cfg, tmp_path, "solver.epochs=1")
    state = runs.state(tmp_path)
    assert state["format"] == checkpoint.FORMAT == 2
    parts = {"model", "averages", "solver", "metrics"}
    assert state.keys() == {"format", "progress", "config", "fingerprints", "versions", *parts}
