"""Claims: one owner at a time, whatever others believe; dead owners and sleepers lose theirs."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mdistill.engine.claims import STALE, Claim, Claims
from mdistill.errors import UserError


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Claims, Claims]]:
    first, second = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    yield first, second
    first.close()
    second.close()


def age(claims: Claims, key: str, seconds: float, **owner: object) -> Claim:
    """Make the last claim on ``key`` one that was touched long ago, by another owner."""
    claim = claims.last(key)
    assert claim is not None
    assert claim.owner is not None
    file = claim.path / "owner.json"
    file.write_text(json.dumps({**dataclasses.asdict(claim.owner), **owner}))
    then = file.stat().st_mtime - seconds
    os.utime(file, (then, then))
    last = claims.last(key)
    assert last is not None
    return last


def ended_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_one_owner_at_a_time(two: tuple[Claims, Claims]) -> None:
    first, second = two
    assert first.take("a") is None
    other = second.take("a")
    assert other is not None
    assert other.owner == first.owner
    assert other.place == f"process {os.getpid()} on {first.owner.host}"
    assert (first.holds("a"), second.holds("a")) == (True, False)
    assert second.take("b") is None
    first.release("a")
    assert second.take("a") is None
    assert not first.holds("a")


def test_of_many_that_try_one_alone_succeeds(tmp_path: Path) -> None:
    owners = [Claims(tmp_path) for _ in range(8)]
    barrier = threading.Barrier(len(owners))

    def takes(claims: Claims, key: str) -> bool:
        barrier.wait()
        return claims.take(key) is None

    with ThreadPoolExecutor(len(owners)) as pool:
        for round_ in range(5):
            assert sum(pool.map(takes, owners, [f"run{round_}"] * len(owners))) == 1
    for claims in owners:
        claims.close()


def test_a_silent_owner_on_another_machine_loses_its_claim(two: tuple[Claims, Claims]) -> None:
    first, second = two
    first.take("a")
    assert not second.is_stale(age(first, "a", STALE - 10, host="elsewhere"))
    assert second.take("a") is not None
    silent = age(first, "a", STALE + 10, host="elsewhere")
    assert second.is_stale(silent)
    assert not second.is_gone(silent)
    assert silent.place == f"process {os.getpid()} on elsewhere"
    assert second.take("a") is None
    first.touch()  # it wakes up, and finds out
    assert (first.holds("a"), second.holds("a")) == (False, True)
    first.release("a")
    second.touch()
    assert second.holds("a")
    assert first.take("a") is not None


def test_who_judged_an_old_claim_does_not_take_the_new_one(two: tuple[Claims, Claims], tmp_path: Path) -> None:
    """Between a look at a claim that counts no more and the taking, another one has taken it."""
    first, second = two
    third = Claims(tmp_path / "claims")
    third.take("a")
    judged = age(third, "a", STALE + 10, host="elsewhere")
    assert first.take("a") is None
    with pytest.MonkeyPatch.context() as patch:
        looks = iter([judged])
        real = second.last
        patch.setattr(second, "last", lambda key: next(looks, None) or real(key))
        other = second.take("a")
    assert other is not None
    assert other.owner == first.owner
    assert (first.holds("a"), second.holds("a")) == (True, False)
    third.close()


def test_a_process_of_this_machine_that_has_ended_loses_its_claim_at_once(two: tuple[Claims, Claims]) -> None:
    first, second = two
    first.take("a")
    gone = age(first, "a", 0, process=ended_process())
    assert second.is_gone(gone)
    assert second.take("a") is None


def test_a_process_of_another_container_is_not_judged_by_its_number(two: tuple[Claims, Claims]) -> None:
    first, second = two
    first.take("a")
    assert not second.is_stale(age(first, "a", 0, process=ended_process(), machine="another boot"))
    assert second.take("a") is not None


def test_a_damaged_claim_is_somebody_s_until_it_is_silent(two: tuple[Claims, Claims]) -> None:
    first, second = two
    first.take("a")
    claim = second.last("a")
    assert claim is not None
    (claim.path / "owner.json").write_text("{")
    other = second.take("a")
    assert other is not None
    assert other.place == "an unknown process"
    os.utime(claim.path / "owner.json", (1, 1))
    assert second.take("a") is None


def test_closing_gives_everything_up(tmp_path: Path) -> None:
    first = Claims(tmp_path)
    assert [first.take(key) for key in "ab"] == [None, None]
    first.close()
    second = Claims(tmp_path)
    assert [second.take(key) for key in "ab"] == [None, None]
    second.close()
    assert not list(tmp_path.glob(".clock-*"))


def test_clocks_of_killed_owners_do_not_stay(two: tuple[Claims, Claims], tmp_path: Path) -> None:
    clocks = sorted((tmp_path / "claims").glob(".clock-*"))
    os.utime(clocks[0], (1, 1))
    third = Claims(tmp_path / "claims")
    assert [clock.exists() for clock in clocks] == [False, True]
    assert [claims.last("a") for claims in two] == [None, None]
    assert two[0].take("a") is None  # whose clock it was
    assert all(claims.last("a") is not None for claims in (*two, third))
    third.close()


@pytest.mark.parametrize("seen", [True, False])
def test_a_claim_that_was_made_and_told_as_an_error_is_ours(
    seen: bool, two: tuple[Claims, Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system may; whose listing may show the new folder later too."""
    first, second = two
    rename, last = os.rename, Claims.last

    def renamed(*paths: Path) -> None:
        rename(*paths)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "rename", renamed)
    if not seen:
        monkeypatch.setattr(Claims, "last", lambda claims, key: None)
        with pytest.raises(UserError, match="cannot be written"):
            first.take("a")
        monkeypatch.setattr(Claims, "last", last)
    assert first.take("a") is None
    assert first.holds("a")
    assert second.take("a") is not None
    first.release("a")
    monkeypatch.setattr(os, "rename", rename)
    assert second.take("a") is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output: .*file/claims cannot be written: Not a directory$"):
        Claims(tmp_path / "file" / "claims")
