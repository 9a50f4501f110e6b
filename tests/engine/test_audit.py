"""Two records compared: against plain loops, and at the edges of each verdict."""

import math
from typing import Any

import pytest

from mdistill.config.schema import RunConfig
from mdistill.engine import audit
from mdistill.engine.audit import CLOSE, compare, compare_epochs, differing_fields, misfit, unrecorded_fields, worst

RECORDED = {"ce": [4.0, 3.0, 2.0], "kd": [1.0, -1.0, 0.0]}


def changed(term: str, step: int, by: float) -> dict[str, list[float]]:
    """``RECORDED`` with one value moved."""
    terms = {name: [*values] for name, values in RECORDED.items()}
    terms[term][step - 1] += by
    return terms


def test_the_same_terms_are_bit_equal_where_the_weights_are() -> None:
    compared = compare(RECORDED, changed("ce", 1, 0.0), same_weights=True, close=CLOSE["fp32"])
    assert vars(compared) == {
        "verdict": "bit-equal",
        "first": None,
        "first_step": 0.0,
        "largest": 0.0,
        "same_weights": True,
    }
    assert compare(RECORDED, RECORDED, same_weights=False, close=CLOSE["fp32"]).verdict == "close"


def test_distances_are_those_of_a_plain_loop() -> None:
    replayed = changed("kd", 1, 1e-5)
    replayed["ce"][1] -= 0.02
    replayed["kd"][1] += 0.03
    largest = 0.0
    for step in range(3):
        for name in RECORDED:
            gap = abs(RECORDED[name][step] - replayed[name][step])
            largest = max(largest, gap / (abs(RECORDED["ce"][step]) + abs(RECORDED["kd"][step])))
    compared = compare(RECORDED, replayed, same_weights=False, close=CLOSE["fp32"])
    assert compared.first == (1, "kd")
    assert compared.first_step == pytest.approx(1e-5 / 5)
    assert compared.largest == largest == pytest.approx(0.03 / 4)


@pytest.mark.parametrize(
    ("step", "by", "verdict"),
    [(1, 4.9e-4, "close"), (1, 5.1e-4, "different"), (2, 0.039, "close"), (2, 0.041, "different")],
)
def test_the_first_step_has_to_be_closer_than_later_ones(step: int, by: float, verdict: str) -> None:
    compared = compare(RECORDED, changed("ce", step, by), same_weights=False, close=(1e-4, 1e-2))
    assert compared.verdict == verdict
    assert compared.first == (step, "ce")


def test_a_loss_of_nothing_is_apart_from_any_other() -> None:
    nothing = {"kd": [0.0]}
    assert compare(nothing, nothing, same_weights=True, close=CLOSE["fp32"]).verdict == "bit-equal"
    compared = compare(nothing, {"kd": [1e-9]}, same_weights=True, close=CLOSE["fp32"])
    assert (compared.verdict, compared.largest) == ("different", math.inf)


def test_records_of_other_terms_or_steps_cannot_be_compared() -> None:
    assert misfit(RECORDED, {"kd": [0.0] * 3, "ce": [0.0] * 3}) is None
    told = "the loss had the terms ce, kd of 3 steps and has ce of 3 steps"
    assert misfit(RECORDED, {"ce": [0.0] * 3}) == told
    assert "has ce, kd of 2 steps" in (misfit(RECORDED, {"ce": [0.0] * 2, "kd": [0.0] * 2}) or "")
    assert "of 2 or 3 steps" in (misfit({"ce": [0.0] * 2, "kd": [0.0] * 3}, RECORDED) or "")
    assert misfit({}, {}) is not None


def line(**more: float) -> dict[str, Any]:
    """Metrics of a first epoch."""
    values = {"train/loss": 3.0, "train/loss_ce": 2.0, "train/loss_kd": 1.0, "train/top1": 10.0, "test/top1": 20.0}
    return {"epoch": 1, "lr": 0.1, "seconds/train": 1.0, "best/top1": 20.0, "test/loss": 4.0} | values | more


def test_epochs_are_compared_by_their_loss_terms_and_told_by_all() -> None:
    assert compare_epochs(line(), line(**{"seconds/train": 9.0, "lr": 0.2})) == ("bit-equal", {})
    verdict, apart = compare_epochs(line(), line(**{"train/loss_kd": 1.05, "test/top1": 19.0, "best/top1": 19.0}))
    assert (verdict, apart) == ("close", {"train/loss_kd": (1.0, 1.05), "test/top1": (20.0, 19.0)})
    assert compare_epochs(line(), line(**{"train/loss_kd": 1.07}))[0] == "different"
    for changed, expected in (
        ({"test/top1": 20.5, "test/loss": 4.05}, "close"),
        ({"test/top1": 95.0}, "different"),
        ({"test/loss": 4.5}, "different"),
    ):
        assert compare_epochs(line(), line(**changed))[0] == expected
    other = line()
    del other["train/loss_kd"]
    assert compare_epochs(line(), other) == ("different", {"train/loss_kd": (1.0, None)})
    assert compare_epochs(other, line())[0] == "different"


def session(**more: Any) -> dict[str, Any]:
    """As ``env.json`` has it."""
    return {
        "command": ["train.py"],
        "code": {"mdistill": "a" * 64},
        "threads": 2,
        "versions": {"torch": "2.0", "cuda": None},
        "data": {"fingerprint": "d"},
        "teacher": {"fingerprint": "t", "files": [{"path": "x"}], "top1": 70.0},
        "student": {"files": [{"path": "x", "sha256": "s"}]},
        "cell": "c",
    } | more


def test_fields_that_can_change_a_result_are_compared() -> None:
    assert differing_fields(session(), session(command=["other.py"], teacher={"fingerprint": "t", "top1": 1.0})) == {}
    now = session(
        code={"mdistill": "b" * 64},
        threads=1,
        versions={"torch": "2.1", "cuda": None, "cudnn": "9"},
        data={"fingerprint": "e"},
        student={"files": [{"path": "y", "sha256": "z"}]},
    )
    assert differing_fields(session(), now) == {
        "code.mdistill": ("a" * 64, "b" * 64),
        "versions.torch": ("2.0", "2.1"),
        "threads": (2, 1),
        "data.fingerprint": ("d", "e"),
        "student.sha256": ("s", "z"),
    }
    assert unrecorded_fields(session(), now) == ["versions.cudnn"]
    assert unrecorded_fields({}, session(student={"files": []}))[:2] == ["code.mdistill", "versions.torch"]


def test_threads_compute_nothing_of_a_run_on_a_gpu() -> None:
    cuda = {"torch": "2.0", "cuda": "13.0"}
    assert differing_fields(session(versions=cuda), session(versions=cuda, threads=7)) == {}
    assert differing_fields(session(versions=cuda), session(threads=7)) == {"versions.cuda": ("13.0", None)}


@pytest.mark.parametrize("odd", [{}, {"versions": 3, "data": [], "student": {"files": ["x"]}, "code": None}])
def test_sessions_that_hold_anything_are_compared(odd: dict[str, Any]) -> None:
    differing_fields(odd, session())
    unrecorded_fields(odd, session())


def test_rounding_is_judged_by_the_coarser_precision() -> None:
    assert audit.closeness(RunConfig(), on_cuda=False) == CLOSE["fp32"]
    assert audit.closeness(RunConfig(), on_cuda=True) == CLOSE["tf32"]
    assert audit.closeness(RunConfig(precision="fp32"), on_cuda=True) == CLOSE["fp32"]
    assert audit.closeness(RunConfig(precision="fp32", teacher_precision="bf16"), on_cuda=False) == CLOSE["bf16"]


def test_the_worst_verdict_counts() -> None:
    assert worst(["bit-equal"]) == "bit-equal"
    assert worst(["close", "bit-equal"]) == "close"
    assert worst(["bit-equal", "different", "close"]) == "different"
