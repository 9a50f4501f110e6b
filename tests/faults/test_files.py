"""Damaged, absurd and hostile files end no command but well or with a clean message; see ``file_cases``."""

import functools
import pickle
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.faults import damage, file_cases, hostile
from tests.faults.file_cases import TARGETS, Case, Target

BRIEF = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=2,
    phases=[Phase.generate],  # a case is small as it is, and one that hangs takes 20 seconds
    report_multiple_bugs=False,
)
HOSTILE = dict(file_cases.hostile_cases())


def survives(case: Case) -> None:
    """Run a case in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        problem = case(Path(folder))
    assert problem is None, problem


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@BRIEF
@given(data=st.data())
def test_a_damaged_file_is_survived(target: Target, data: st.DataObject) -> None:
    how, seed = data.draw(st.sampled_from(target.damages)), data.draw(st.integers(0, 10**6))
    survives(functools.partial(file_cases.damaged, target=target, how=how, seed=str(seed)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pickle/", "archive/", "json/", "override/", "yaml/cfg", "yaml/eval"])
@BRIEF
@given(data=st.data())
def test_a_hostile_file_is_survived(kind: str, data: st.DataObject) -> None:
    survives(HOSTILE[data.draw(st.sampled_from([name for name in HOSTILE if name.startswith(kind)]))])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "pickle/eval/legacy/system",
        "pickle/last/archive/under_model",
        "pickle/teacher/legacy/nested_reduce",
        "pickle/cifar/python2_eval",
        "archive/eval/twice_code_last",
        "yaml/cfg/python_object",
        "override/value/python_object",
    ],
)
def test_code_in_a_file_is_not_run(name: str) -> None:
    survives(HOSTILE[name])


def test_a_damage_is_the_same_each_time() -> None:
    content = bytes(range(256)) * 40
    for name, change in damage.BYTES.items():
        assert change(content, Random(name)) == change(content, Random(name))
        assert any(change(content, Random(f"{name}{seed}")) != content for seed in range(5))
    nest = {"a": [1, {"b": 2.5}], "c": {"d": None}}
    for name, alter in damage.NESTS.items():
        texts = []
        for _ in range(2):
            changed = {"a": [1, {"b": 2.5}], "c": {"d": None}}
            alter(changed, Random(name))
            texts.append(repr(changed))
        assert texts[0] == texts[1]
        assert name == "swap_values" or texts[0] != repr(nest)


def test_there_are_cases_enough_and_no_two_of_a_name() -> None:
    names = [name for name, _ in file_cases.cases(count=2000)]
    assert len(set(names)) == 2000
    assert len(HOSTILE) > 1000


def test_a_pickle_that_is_trusted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentinel works: what is refused elsewhere would have left it."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(hostile.CODE["system"])
    assert Path("ran").exists()
