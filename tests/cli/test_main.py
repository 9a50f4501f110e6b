"""``mdistill COMMAND``: finding a command, answering at once, signals before training, the doors in ``tools/``."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mdistill import __version__
from mdistill.cli.main import COMMANDS, main
from mdistill.engine import build
from mdistill.engine.console import StopRequest
from mdistill.errors import Stopped

from ..conftest import load_tool, refused

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., int]


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as a terminal's programs have it, even where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.split("commands:\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == list(COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"mdistill {__version__}\n")


def test_every_module_of_a_command_is_listed() -> None:
    files = {path.stem.rstrip("_") for path in (ROOT / "mdistill" / "cli").glob("[!_]*.py")} - {"main", "common"}
    assert files == set(COMMANDS)


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, main(["trian"]))
    assert line.startswith("error: unknown command 'trian'; did you mean 'train'? (commands: train, eval, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_help_under_its_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mdistill {command} ")
    assert f"\n  mdistill {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tool_is_a_door_to_its_command(command: str) -> None:
    tool = load_tool(f"tools/{command}")
    assert tool.main.__module__.rstrip("_") == f"mdistill.cli.{command}"


@pytest.mark.slow
def test_a_tool_runs_as_a_script() -> None:
    command = [sys.executable, str(ROOT / "tools" / "eval.py"), "nowhere"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stderr) == (2, "error: no run folder or checkpoint at nowhere\n")


def while_it_loads(monkeypatch: pytest.MonkeyPatch, number: int, swallowed: bool = False) -> None:
    """Send this process the signal ``number`` where training loads its data."""

    def loading(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise ImportError("what an extension module makes of it") from (error if not swallowed else None)

    monkeypatch.setattr("mdistill.engine.build.build_dataset", loading)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.usefixtures("hangup")
def test_a_signal_before_training_is_a_stop(
    name: str,
    swallowed: bool,
    capsys: pytest.CaptureFixture[str],
    train: Train,
    student_cfg: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A requeued job that is stopped while it loads its data says "try again" (75) as one that trains does."""
    number = getattr(signal, name)
    while_it_loads(monkeypatch, number, swallowed)
    before = signal.getsignal(number)
    assert train(student_cfg) == 75
    assert capsys.readouterr().err == f"{name}: stopped, nothing had begun\n"
    assert signal.getsignal(number) is before
    assert not (tmp_path / "runs").exists()


def test_what_the_engine_saved_is_told_even_if_signals_follow(
    capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        try:
            raise Stopped("SIGTERM: stopped after step 3 of epoch 1, saved")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mdistill.engine.trainer.fit", stopped)
    assert train(student_cfg) == 75
    assert capsys.readouterr().err == "SIGTERM: stopped after step 3 of epoch 1, saved\n"


IMPORTING = """
import os, signal, sys, types
from mdistill.cli import common

class Finder:  # answers the first import of torch with a signal, and loses its exception as extension modules do
    def find_spec(name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.{signal})
            except BaseException:
                pass
        return None

sys.meta_path.insert(0, Finder)
sys.argv = ["mdistill", *{arguments}]
{call}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("console_script", [True, False])
def test_a_signal_within_the_import_of_torch_ends_the_process_at_once(
    name: str, console_script: bool, student_cfg: Path
) -> None:
    arguments = [*(["train"] if console_script else []), "--cfg", str(student_cfg)]
    module = "main" if console_script else "train"
    call = f"from mdistill.cli.{module} import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(signal=name, arguments=arguments, call=call)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stderr, result.stdout) == (75, f"\n{name}: stopped, nothing had begun\n", "")


TWICE = """
import os, signal, sys
from mdistill.cli.common import run
from mdistill.engine.console import StopRequest

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def saving(args):
    {body}

sys.argv = ["mdistill"]
sys.exit(run(saving, lambda arguments: None, None))
"""

ENDINGS = {
    "a second one while training is being saved": (
        "with StopRequest() as stop: os.kill(os.getpid(), signal.SIGINT); stop._asked -= 1;"
        " print(stop.signal, flush=True); os.kill(os.getpid(), signal.SIGHUP); print('never')",
        "SIGINT\n",
        "\nSIGINT: ended at once; what was saved before stays\n",
    ),
    "one whose exception a destructor loses": (
        "lost = Lost(); del lost; print('never')",
        "",
        "\nSIGTERM: stopped, nothing had begun\n",
    ),
    "a second one after the first was lost": (
        "try: os.kill(os.getpid(), signal.SIGTERM)\n    except BaseException: pass\n"
        "    signal.getsignal(signal.SIGTERM)._asked -= 1\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('never')",
        "",
        "\nSIGTERM: ended at once; what was saved before stays\n",
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_at_once_without_a_traceback(ending: str) -> None:
    body, out, err = ENDINGS[ending]
    result = subprocess.run(
        [sys.executable, "-c", TWICE.format(body=body)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (75, out, err)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_every_stop_signal_asks_training_to_stop(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as request:
        os.kill(os.getpid(), number)
        assert request.signal == name
    assert signal.getsignal(number) is before


def test_a_signal_whose_exception_was_lost_before_training_stops_it(
    capsys: pytest.CaptureFixture[str], train: Train, student_cfg: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pick = build.pick_device

    def lost(name: str | None) -> object:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        return pick(name)

    monkeypatch.setattr(build, "pick_device", lost)
    assert train(student_cfg) == 75
    assert capsys.readouterr().err.startswith("SIGTERM: stopped before epoch 1, saved to")


@pytest.mark.usefixtures("hangup")
def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal is None


def test_another_pair_is_told_in_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert train(Path("configs/cifar100/kd"), "--pair", "res56_res20", "--print-config") == 0
    captured = capsys.readouterr()
    assert "name: resnet56" in captured.out
    assert "name: resnet20" in captured.out
    assert len(captured.err.splitlines()) == 1
