"""The runs of a table in a Ray cluster (extra ``ray``).

Ray finds room for a run on a node, and there a process is begun that claims and trains it, as a worker of a table does:
Ray's workers, others and Slurm's may share an output folder. A run whose node or process was lost is handed out again
when its claim counts no more. Ray itself repeats nothing.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdistill
from mdistill.engine.claims import Claim, Claims
from mdistill.errors import Stopped, UserError, printable
from mdistill.reporting.extras import extra
from mdistill.reporting.table_runs import WorkerLost

ANSWER = 10.0  # seconds within which an address answers
CONNECT = 60.0  # seconds within which a cluster is joined
LOCALHOST = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Share:
    """What a run takes of a node."""

    cpus: float
    gpus: float


class HandedOut(Claims):
    """The claims of others, for a process that hands its runs to them and claims nothing itself."""

    def take(self, key: str) -> Claim | None:
        """The claim that somebody has on ``key``; None if it is to be had."""
        last = self.last(key)
        return None if last is None or last.released or self.is_stale(last) else last

    def holds(self, key: str) -> bool:
        """Always: the process that has claimed ``key`` finds out by itself."""
        return True


class Cluster:
    """A Ray cluster that this process has joined.

    Args:
        address: HOST:PORT, ray://HOST:PORT or auto.

    Raises:
        UserError: Ray is not installed, or no cluster can be joined there.
    """

    def __init__(self, address: str) -> None:
        host, port = _parsed(address)
        os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
        self._ray: Any = extra("ray", "Ray", "--ray", "ray")
        if host is not None:
            _probe(
                address,
                self._ray.util.get_node_ip_address() if host in LOCALHOST and "//" not in address else host,
                port,
            )
        self._join(address)
        self._runner = self._ray.remote(_runner())

    def has_gpus(self) -> bool:
        """Whether any node has one."""
        return float(self._ray.cluster_resources().get("GPU", 0)) > 0

    def fits(self, share: Share) -> bool:
        """Whether any node, if it were idle, has room for a run."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return any(node.get("CPU", 0) >= share.cpus and node.get("GPU", 0) >= share.gpus for node in nodes)

    def begin(self, share: Share, command: Sequence[str], log: Path) -> "RayProcess":
        """Begin a process where there is room for it.

        Args:
            command: arguments of Python.
            log: what the process prints to.
        """
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(share.cpus)))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        home = Path(mdistill.__file__).resolve().parents[1]
        if home.name != "site-packages":  # else the nodes have it installed, maybe elsewhere
            environment["PYTHONPATH"] = str(home)
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0, "max_task_retries": 0}
        runner = self._runner.options(max_concurrency=2, **options).remote()
        return RayProcess(self._ray, runner, (list(command), os.getcwd(), str(log.resolve()), environment))

    def close(self) -> None:
        """Leave the cluster; what runs there for this process ends."""
        self._ray.shutdown()

    def _join(self, address: str) -> None:
        """Within a bounded time, which Ray has none for; and keep the handlers of signals."""
        outcome: list[BaseException | None] = []
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def join() -> None:
            try:
                with suppress(AttributeError):  # pages of a node's log when it dies, whatever log_to_driver says
                    self._ray._private.worker.print_to_stdstream = lambda *_, **__: None
                self._ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", configure_logging=True)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=join, name="ray", daemon=True)
        thread.start()
        thread.join(CONNECT)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if not outcome:
            raise UserError(f"--ray: {address} answers, but no Ray cluster within {CONNECT:.0f} s")
        if outcome[0] is not None:
            why = printable(" ".join(str(outcome[0]).split()) or type(outcome[0]).__name__, 300)
            raise UserError(f"--ray: no cluster can be joined at {address}: {why}") from None


class RayProcess:
    """A process on some node, as ``table_runs`` sees it."""

    def __init__(self, ray: Any, runner: Any, arguments: tuple[Any, ...]) -> None:
        self._ray, self._runner = ray, runner
        self._there = runner.place.remote()
        self._code: int | None = None
        self._ended = runner.run.remote(*arguments)

    def has_begun(self) -> bool:
        """Whether a node had room for it."""
        return self._is_done(self._there)

    def poll(self) -> int | None:
        """Its exit code; None while it runs, or waits for room.

        Raises:
            WorkerLost: its node or worker is gone, or could not begin it.
        """
        if self._code is None and self._is_done(self._ended):
            try:
                code, why = self._ray.get(self._ended)
            except self._ray.exceptions.RayError as error:
                code, why = None, f"its Ray worker is gone ({type(error).__name__})"
            if code is None:
                raise WorkerLost(why)
            self._code = code
            self._ray.kill(self._runner)
        return self._code

    def terminate(self) -> None:
        """Ask it to save and end; one that waits for room does not begin."""
        if self.has_begun():
            self._runner.stop.remote()
        else:
            self._ray.kill(self._runner)
            self._code = Stopped.exit_code

    def _is_done(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])


def _runner() -> type:
    """The class whose objects begin processes on nodes. It is sent there whole and needs Python's own modules alone."""

    class Runner:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.process: subprocess.Popen[bytes] | None = None
            self.stopped = False

        def place(self) -> str:
            return socket.gethostname()

        def run(self, command: list[str], folder: str, log: str, environment: dict[str, str]) -> tuple[int | None, str]:
            """The exit code of the process, or None and why it could not be begun."""
            with self.lock:
                if self.stopped:
                    return 75, ""
                before = os.environ.get("PYTHONPATH")
                if before and "PYTHONPATH" in environment:
                    environment["PYTHONPATH"] += os.pathsep + before
                try:
                    with open(log, "wb") as output:
                        self.process = subprocess.Popen(
                            [sys.executable, *command],
                            cwd=folder,
                            env={**os.environ, **environment},
                            stdin=subprocess.PIPE,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                except OSError as error:
                    return None, f"node {socket.gethostname()} cannot begin it: {error}"
            return self.process.wait(), ""

        def stop(self) -> None:
            with self.lock:
                self.stopped = True
                if self.process is not None:
                    self.process.terminate()

    return Runner


def _parsed(address: str) -> tuple[str | None, int]:
    """Host and port; None for "auto"."""
    if address == "auto":
        return None, 0
    match = re.fullmatch(r"(?:ray://)?([^\s/:]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(f"--ray: found {printable(address)!r}; write HOST:PORT, ray://HOST:PORT or auto")
    return match[1], int(match[2])


def _probe(address: str, host: str, port: int) -> None:
    """Say at once that nothing listens, which Ray takes minutes to find out."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=ANSWER).close()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise UserError(f"--ray: no Ray cluster answers at {address}: {why}") from None
