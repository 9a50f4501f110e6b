"""Runs of a table in a Ray cluster: a real one of two nodes, of which one dies; else stood in for."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdistill.cli import table as table_cli
from mdistill.engine.claims import Claims, read_claims
from mdistill.engine.run_folder import read_metrics, read_sessions
from mdistill.errors import UserError
from mdistill.files import IN_USE
from mdistill.reporting import ray_runs, table_runs
from mdistill.reporting.ray_runs import HandedOut, Share

from ..conftest import refused
from ..tables import write_own

DYING = """
import os, signal
from pathlib import Path

from mdistill.data.loader import BatchLoader

HERE = Path(__file__).parent


def ancestors(process):
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        yield process


doomed = int((HERE / "doomed").read_text())
fetch, fetched = BatchLoader.fetch, []


def fetch_or_die(loader, step):
    fetched.append(step)
    if len(fetched) == 11 and doomed in ancestors(os.getpid()):  # in the third epoch, on the second node
        for process in (doomed, os.getppid(), os.getpid()):
            os.kill(process, signal.SIGKILL)
    return fetch(loader, step)


BatchLoader.fetch = fetch_or_die
"""
METHODS = """
methods:
  - {name: alone, method: vanilla, settings: {ce_weight: 1.0}}
seeds: [0, 1]
"""
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one core on this machine."""
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster  # slow to import

    memory = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster()
    try:
        cluster.add_node(include_dashboard=False, _system_config=FAST, **memory)
        cluster.add_node(**memory)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_table_in_a_cluster_of_which_a_node_dies(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (second,) = cluster.worker_nodes
    (tmp_path / "doomed").write_text(str(second.all_processes["raylet"][0].process.pid))
    write_own(tmp_path, METHODS, epochs=3, module="ray_parts", code=DYING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--device", "cpu", "--output", "runs", "--checkpoint-root", "."]
    code = table_cli.main(["run", "table.yaml", *flags, "--ray", cluster.address, "--cpus-per-run", "1"])
    told = capfd.readouterr()
    logs = "".join(path.read_text() for path in Path("runs").glob(".logs/*"))
    assert (code, told.err.replace("\r", "")) == (0, ""), told.out + logs
    lines = told.out.splitlines()
    assert lines[-1] == "2 of 2 runs are complete"
    assert sorted(line for line in lines if line.startswith("complete: ")) == [
        f"complete: alone little_little seed {seed}" for seed in (0, 1)
    ]
    assert sum("its Ray worker is gone (" in line for line in lines) == 1
    assert sum(", which has ended" in line for line in lines) == 1  # the claim of the process that died with it
    assert len(lines) == 5, lines
    folders = sorted(path.parent for path in Path("runs").rglob("metrics.jsonl"))
    assert [[line["epoch"] for line in read_metrics(folder)] for folder in folders] == [[1, 2, 3]] * 2
    assert sorted(len(read_sessions(folder)) for folder in folders) == [1, 2]
    assert not read_claims(Path("runs/.claims"))


# ---- stood in for --------------------------------------------------------------------------------------------------


class Reference:
    """What a call of a runner has come to: nothing yet, a value or an error."""

    def __init__(self) -> None:
        self.value: Any = None


class Call:
    def __init__(self, calls: list[str], name: str) -> None:
        self.calls, self.name, self.reference = calls, name, Reference()

    def remote(self, *arguments: object) -> Reference:
        self.calls.append(self.name)
        return self.reference


class Runner:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.place, self.run, self.stop = (Call(self.calls, name) for name in ("place", "run", "stop"))


class GoneError(Exception):
    pass


class Ray:
    """Of Ray what a process in it needs."""

    exceptions = SimpleNamespace(RayError=GoneError)

    def wait(self, references: list[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
        assert timeout == 0
        return [each for each in references if each.value is not None], []

    def get(self, reference: Reference) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, runner: Runner) -> None:
        runner.calls.append("kill")


def test_a_process_in_a_cluster() -> None:
    runner = Runner()
    process = ray_runs.RayProcess(Ray(), runner, ())
    assert isinstance(process, table_runs.RemoteProcess)
    assert (process.has_begun(), process.poll()) == (False, None)
    runner.place.reference.value = "a node"
    assert (process.has_begun(), process.poll()) == (True, None)
    process.terminate()
    runner.run.reference.value = (75, "")
    assert (process.poll(), process.poll()) == (75, 75)
    assert runner.calls == ["place", "run", "stop", "kill"]


def test_a_process_that_waits_for_room_is_not_begun_any_more() -> None:
    runner = Runner()
    process = ray_runs.RayProcess(Ray(), runner, ())
    process.terminate()
    assert process.poll() == 75
    assert runner.calls == ["place", "run", "kill"]


@pytest.mark.parametrize(
    ("value", "why"),
    [(GoneError("x"), r"its Ray worker is gone \(GoneError\)"), ((None, "node a cannot begin it"), "node a can")],
)
def test_a_process_that_is_lost(value: object, why: str) -> None:
    runner = Runner()
    process = ray_runs.RayProcess(Ray(), runner, ())
    runner.run.reference.value = value
    with pytest.raises(table_runs.WorkerLost, match=why):
        process.poll()


def test_what_a_node_does(tmp_path: Path) -> None:
    """A process with its log, folder and environment; or why there is none."""
    runner = ray_runs._runner()()
    log = tmp_path / "log"
    code = "import os; print(os.getcwd(), os.environ['OMP_NUM_THREADS']); raise SystemExit(3)"
    assert runner.run(["-Sc", code], str(tmp_path), str(log), {"OMP_NUM_THREADS": "5"}) == (3, "")
    assert log.read_text() == f"{tmp_path} 5\n"
    ended, why = runner.run(["-Sc", ""], str(tmp_path / "nowhere"), str(log), {})
    assert ended is None
    assert why.startswith(f"node {socket.gethostname()} cannot begin it: [Errno 2] No such file or directory: ")
    runner.stop()
    assert runner.run(["-Sc", code], str(tmp_path), str(log), {}) == (75, "")


def test_a_process_claims_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[bool] = []
    others = Claims(tmp_path)

    def child() -> None:
        assert sys.argv == ["-c", "--cfg", "x"]
        claim = others.last("run")
        held.append(claim is not None and not claim.released)

    monkeypatch.setattr(table_runs, "child", child)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path), "run", "--cfg", "x"])
        table_runs.claiming_child()
        assert not [thread for thread in threading.enumerate() if thread.name == "claim"]
        assert others.take("run") is None  # it has given it up
        others.release("run")
    others.take("run")
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path), "run", "--cfg", "x"])
    with pytest.raises(SystemExit) as ended:
        table_runs.claiming_child()
    assert refused_line(capsys, ended.value.code) == f"error: run {IN_USE}, {others.owner}"
    assert held == [True, True]
    assert "claim" not in {thread.name for thread in threading.enumerate()}  # which would end this process
    others.close()


def test_a_process_whose_claim_is_taken_over_saves_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    told = threading.Event()

    def kill(process: int, number: int) -> None:
        if number:  # 0 asks whether it is there
            assert process == os.getpid()
            signals.append(number)
            told.set()

    def child() -> None:
        (tmp_path / "run" / "2").mkdir()  # somebody has taken it over
        touched = [each for each in owned if each.holds("run")]
        for claims in touched:
            claims.touch()
        assert told.wait(60)

    owned: list[Claims] = []
    real = Claims.__init__
    monkeypatch.setattr(Claims, "__init__", lambda self, *given: (owned.append(self), real(self, *given))[1])
    monkeypatch.setattr(table_runs, "child", child)
    monkeypatch.setattr(table_runs, "POLL", 0.001)
    monkeypatch.setattr(table_runs.os, "kill", kill)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path), "run", "--cfg", "x"])
    table_runs.claiming_child()
    assert signals == [signal.SIGTERM]


def refused_line(capsys: pytest.CaptureFixture[str], code: object) -> str:
    assert code == 2
    return capsys.readouterr().out.rstrip("\n")


def test_claims_of_others_are_looked_at_alone(tmp_path: Path) -> None:
    ours, theirs = HandedOut(tmp_path), Claims(tmp_path)
    assert ours.take("run") is None
    assert ours.holds("run")
    assert theirs.take("run") is None
    other = ours.take("run")
    assert other is not None
    assert other.owner == theirs.owner
    ours.release("run")
    assert ours.take("run") is not None
    theirs.release("run")
    assert ours.take("run") is None
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("nonsense", "--ray: found 'nonsense'; write HOST:PORT, ray://HOST:PORT or auto"),
        ("http://head:6379", "--ray: found 'http://head:6379'; write HOST:PORT, ray://HOST:PORT or auto"),
        ("head:99999", "--ray: found 'head:99999'; write HOST:PORT, ray://HOST:PORT or auto"),
        ("ray://127.0.0.1:PORT", "--ray: no Ray cluster answers at ray://127.0.0.1:PORT: Connection refused"),
    ],
)
def test_an_address_where_there_is_none_is_one_line(address: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runs, "extra", lambda *_: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        port = str(free.getsockname()[1])
        with pytest.raises(UserError) as caught:
            ray_runs.Cluster(address.replace("PORT", port) if "HOST" not in address else address)
    assert str(caught.value) == (line if "HOST" in line else line.replace("PORT", port))


def test_a_port_where_something_else_listens_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def init(self, **_: object) -> None:
            never.wait()

    never = threading.Event()
    monkeypatch.setattr(ray_runs, "extra", lambda *_: Silent())
    monkeypatch.setattr(ray_runs, "CONNECT", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"ray://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^--ray: {address} answers, but no Ray cluster within 0 s$"):
            ray_runs.Cluster(address)
    never.set()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^--ray needs Ray, .*: pip install 'mdistill\[ray\]'$"):
        ray_runs.Cluster("auto")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--gpus-per-run", "1.5", "--ray", "auto"],
            "error: argument --gpus-per-run: should be a fraction, or a",
        ),
        (
            ["--cpus-per-run", "x", "--ray", "auto"],
            "error: argument --cpus-per-run: should be a fraction, or a",
        ),
        (
            ["--gpus-per-run", "0.5"],
            "error: --gpus-per-run and --cpus-per-run are of --ray ADDRESS",
        ),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        table_cli.main(["run", "mcld_table2", *flags])
    assert refused(capsys, int(ended.value.code or 0)).startswith(line)


class Nodes:
    """A cluster with what it has; notes what is begun in it."""

    def __init__(self, gpus: float) -> None:
        self.gpus, self.begun = gpus, list[tuple[Share, list[str], Path]]()

    def has_gpus(self) -> bool:
        return self.gpus > 0

    def fits(self, share: Share) -> bool:
        return share.gpus <= self.gpus

    def begin(self, share: Share, command: list[str], log: Path) -> None:
        self.begun.append((share, command, log))

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("gpus", "flags", "share", "device"),
    [
        (0, [], Share(1, 0), "cpu"),
        (4, [], Share(1, 1), "cuda"),
        (4, ["--device", "cpu"], Share(1, 0), "cpu"),
        (4, ["--gpus-per-run", "0.5", "--cpus-per-run", "4"], Share(4, 0.5), "cuda"),
        (4, ["--gpus-per-run", "0"], Share(1, 0), "cpu"),
        (0, ["--device", "cuda"], Share(1, 1), "cuda"),
    ],
)
def test_what_a_run_takes(
    gpus: float,
    flags: list[str],
    share: Share,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nodes = Nodes(gpus)
    monkeypatch.setattr(ray_runs, "Cluster", lambda address: nodes)
    args = table_cli.parse(["run", "table", "--ray", "head:6379", *flags])
    with table_cli._workers(args, tmp_path) as (claims, start, found):
        assert isinstance(claims, HandedOut)
        assert start is not None
        start(["--cfg", "x"], tmp_path / "a.b--seed0.log", {})
    ((took, command, _),) = nodes.begun
    assert (took, found) == (share, device)
    assert command[2:] == [str(tmp_path / ".claims"), "a.b--seed0", "--cfg", "x"]
    waits = "" if share.gpus <= gpus else "no node of the cluster has 1 CPUs and 1 GPUs; runs wait for one\n"
    assert capsys.readouterr().out == waits


def test_ray_says_which_gpu(tmp_path: Path) -> None:
    args = table_cli.parse(["run", "table", "--ray", "auto", "--device", "cuda:1"])
    with (
        pytest.raises(UserError, match=r"^--device: found 'cuda:1'; with --ray it is cpu or cuda"),
        table_cli._workers(args, tmp_path),
    ):
        pass
