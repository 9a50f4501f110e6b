"""What the commands share: parsers, folders, seeds, and how signals and errors end a command."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mdistill.engine.console import StopHandler, on_stop_signal, stop_signals
from mdistill.errors import Stopped, UserError, printable, suggestion
from mdistill.user_code import traceback_of

if TYPE_CHECKING:
    from mdistill.config import Config

MOST_LINES = 10  # of what is wrong with an input
EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 bad input, 75 stopped by a signal: run again with --resume"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        near = ""
        if message.startswith("unrecognized arguments:"):
            near = suggestion(message.split()[2].split("=")[0], self._option_string_actions)
        self.exit(2, f"error: {printable(message, 900)}{near} (see --help)\n")


def plain_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser for ``mdistill <command>`` whose ``--help`` shows ``description`` and ``examples`` as written."""
    return _Parser(
        prog=f"mdistill {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120),
        allow_abbrev=False,
    )


def machine_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A ``plain_parser`` with the machine flags."""
    parser = plain_parser(command, description, examples)
    machine = parser.add_argument_group("machine (does not change results)")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    machine.add_argument("--data-root", type=path, default=Path("data"), help="folder of the data sets (%(default)s)")
    machine.add_argument("--download", action="store_true", help="fetch the data set if it is not there")
    return parser


def path(text: str) -> Path:
    """A file or folder on the command line; an empty text, such as an unset variable leaves, is none.

    Raises:
        argparse.ArgumentTypeError: it is empty, or cannot be written down.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}, which names no file or folder")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"found {text!r}, which is no UTF-8 text") from None
    return Path(text)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """The flag that names user modules."""
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="your code")


def add_configuration(parser: argparse.ArgumentParser, what: str) -> None:
    """The arguments that ``load_configs`` reads; ``what`` says which file ``--cfg`` takes."""
    parser.add_argument("--cfg", type=path, required=True, help=f"{what}, a YAML file")
    parser.add_argument(
        "--pair", help="the method of --cfg (or of that folder) with another teacher and student: res56_res20"
    )
    parser.add_argument("--row", help="where --cfg is a table file: the name of one of its methods")
    parser.add_argument("--row-digest", help=argparse.SUPPRESS)  # of what a table's run was planned by
    parser.add_argument("--untuned", action="store_true", help="and its own settings, not those that it names as tuned")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    add_imports(parser)


def add_roots(parser: argparse.ArgumentParser) -> None:
    """The folders of runs and of teacher weights."""
    parser.add_argument("--output", type=path, default=Path("runs"), help="folder of all runs (%(default)s)")
    add_checkpoint_root(parser)


def add_checkpoint_root(
    parser: argparse._ActionsContainer, told: str = "folder of teacher weights (%(default)s)"
) -> None:
    """The folder that teachers' files are looked for in."""
    parser.add_argument("--checkpoint-root", type=path, default=Path("checkpoints"), help=told)


def add_part(parser: argparse._ActionsContainer) -> None:
    """Which rows, pairs and seeds of a table."""
    parser.add_argument("--methods", type=names, help="some of its rows (default: all)")
    parser.add_argument("--pairs", type=names, help="some of its pairs (default: all)")
    parser.add_argument("--seeds", type=seeds, help="such as 0,1,2 (default: the table's)")


def add_cache_root(parser: argparse.ArgumentParser) -> None:
    """The flag that says where teacher logits are cached; see ``cache_root``."""
    parser.add_argument(
        "--cache-root",
        type=path,
        help="folder of cached teacher logits ($MDISTILL_CACHE, else OUTPUT/teacher_cache)",
    )


def cache_root(args: argparse.Namespace) -> Path:
    """``--cache-root``, else $MDISTILL_CACHE, else a folder under ``--output``."""
    if args.cache_root is not None:
        return Path(args.cache_root)
    return Path(os.environ.get("MDISTILL_CACHE") or args.output / "teacher_cache")


def seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers.

    Raises:
        argparse.ArgumentTypeError: a part that is no seed, or one given twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise argparse.ArgumentTypeError(f"{part.strip()!r} in {text!r} is not a seed; write whole numbers, 0,1,2")
        if int(part) in numbers:
            raise argparse.ArgumentTypeError(f"{int(part)} is given twice in {text!r}; each seed is one run")
        numbers.append(int(part))
    return numbers


def names(text: str) -> list[str]:
    """``"kd,mcld"`` as names."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"found {text!r}; write names, such as kd,mcld")
    return found


def count(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a number from 1, found {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, and below infinity."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a number above 0, found {text!r}")
    return value


def load_configs(args: argparse.Namespace, seeds: Sequence[int | None]) -> "list[Config]":
    """The configuration that ``add_configuration``'s arguments name, once for each seed; None keeps the file's seed.

    Raises:
        UserError: anything in it that does not fit.
    """
    from mdistill import config

    if args.row is not None:
        from mdistill.reporting.table_files import cell_of

        given = {"overrides": args.overrides, "imports": args.imports, "tuned": not args.untuned}
        cell = cell_of(args.cfg, project_root() / "configs", args.row, args.pair, **given)
        if args.row_digest not in (None, cell.of):
            raise UserError(
                f"{args.cfg}: {args.row} {cell.pair} was changed while its table ran; start the table again"
            )
        return [cell.config(seed) for seed in seeds]
    source = args.cfg
    if args.pair is not None:
        source, note = config.for_pair(args.cfg, args.pair)
        print(note, file=sys.stderr)
    return [config.load(source, args.overrides, imports=args.imports, seed=seed) for seed in seeds]


def add_recorded_code(parser: argparse.ArgumentParser) -> None:
    """The flags that let code run which a run folder names; ``recorded_config`` reads them."""
    add_imports(parser)
    parser.add_argument("--trust", action="store_true", help="run the code that the run folder names (its imports)")


def recorded_config(args: argparse.Namespace, folder: Path) -> "Config":
    """The configuration of the run in ``folder``.

    Raises:
        UserError: it is damaged, or names code and ``args`` do not allow that.
    """
    from mdistill import config
    from mdistill.engine.run_folder import code_folders

    recorded = folder / "config.yaml"
    home = folder.resolve()
    beside = [place for place in code_folders(home) if args.trust or home not in (place, *place.parents)]
    folders = [Path.cwd(), *beside, *([home] if args.trust else [])]
    return config.load(recorded, imports=args.imports, folders=folders, trusted=args.trust)


def project_root() -> Path:
    """The clone of the project that holds ``configs/`` and ``docs/``: the package's own, else the current folder."""
    own = Path(__file__).resolve().parents[2]
    return own if (own / "configs").is_dir() else Path.cwd()


def run(
    command: Callable[[argparse.Namespace], int | None],
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    arguments: Sequence[str] | None,
    *,
    when_stopped: str = "nothing had begun",
) -> int:
    """Parse ``arguments`` and run ``command``; a mistake or a stop ends as a message, without a traceback.

    Args:
        command: does the work and returns its exit code, or None for 0. Slow imports belong in it: signals are
            answered from here on.
        parse: from ``arguments`` to what ``command`` takes.
        arguments: of the command line; None for those of this process, which is taken to end with the command.
        when_stopped: what a signal outside training leaves behind, for the message.

    Returns:
        0 done, 1 the run failed, 2 bad input, 75 stopped by a signal, with what there was to save saved.
    """
    outer = signal.getsignal(signal.SIGTERM)
    stopper = _Stopper(when_stopped, arguments is None or (isinstance(outer, _Stopper) and outer.owns_process))
    with on_stop_signal(stopper), stopper.in_destructors():  # while training, the engine's own handler is in its place
        try:
            code = command(parse(arguments)) or 0
            sys.stdout.flush()
        except BaseException as error:
            stopper.armed = False
            message, code = _explain(error, stopper)
            distributed = sys.modules.get("mdistill.distributed")
            if distributed is not None and distributed.is_told_elsewhere(message):
                message = ""
            with suppress(OSError):  # a terminal that has hung up takes no message
                print(message, file=sys.stderr, end="\n" if message else "")
    distributed = sys.modules.get("mdistill.distributed")
    if arguments is None and code and distributed is not None and distributed.world_size() > 1:
        sys.stdout.flush()
        os._exit(code)  # what is left of torch's processes would wait for those of other ranks
    if arguments is None and code == Stopped.exit_code:
        for number in stop_signals():  # more of them must not change the exit code while the interpreter shuts down
            signal.signal(number, signal.SIG_IGN)
    return code


class _Stopper(StopHandler):
    """Ends a command: raises ``Stopped``, or where exceptions are lost leaves the process at once.

    Extension modules lose them while they are imported, and so do destructors; there is nothing to undo then.
    """

    def __init__(self, when_stopped: str, owns_process: bool) -> None:
        super().__init__(owns_process)
        self.armed = True
        self._how = f"stopped, {when_stopped}"

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.armed:
            super().__call__(number, frame)

    def first(self, frame: FrameType | None) -> None:
        if self.owns_process and _is_importing(frame):
            self.end(self._how)
        raise Stopped

    @contextmanager
    def in_destructors(self) -> Iterator[None]:
        """Within, an exception of ours that a destructor or a callback has lost ends the process."""
        previous = sys.unraisablehook

        def hook(lost: "sys.UnraisableHookArgs") -> None:
            if not issubclass(lost.exc_type, Stopped):
                previous(lost)
            elif self.owns_process and self.armed:
                self.end(self._how)

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = previous

    @property
    def message(self) -> str:
        """What a user is told."""
        return f"{self.signal or 'SIGINT'}: {self._how}"


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _explain(error: BaseException, stopper: _Stopper) -> tuple[str, int]:
    """The message and the exit code of a command that ``error`` ended; what is no user's matter is raised again."""
    saved = _engine_stop(error)
    if saved:
        return saved, Stopped.exit_code
    if isinstance(error, KeyboardInterrupt) or stopper.signal is not None:  # whatever became of its exception
        return stopper.message, Stopped.exit_code
    if isinstance(error, UserError):
        return traceback_of(error.__cause__) + _error_lines(str(error)), error.exit_code
    if isinstance(error, BrokenPipeError):  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", 1
    if isinstance(error, OSError):
        return _error_lines(str(error)), 1
    if _is_out_of_memory(error):
        first = (str(error).splitlines() or ["there is not enough of it"])[0]
        return f"error: out of memory, a smaller data.batch_size needs less: {first}", 1
    theirs = traceback_of(error)
    if theirs:
        return f"{theirs}{''.join(traceback.format_exception_only(error)).rstrip()}", 1
    raise error


def _error_lines(message: str) -> str:
    """Harmless for a terminal, and no more than a person reads."""
    lines = [f"error: {printable(line, 900)}" for line in message.splitlines() or ["no reason is given"]]
    return "\n".join(
        [*lines[:MOST_LINES], *([f"error: and {len(lines) - MOST_LINES} more"] if lines[MOST_LINES:] else [])]
    )


def _engine_stop(error: BaseException | None) -> str:
    """What the engine said when it stopped a run, if that is among what led to ``error``."""
    while error is not None:
        if isinstance(error, Stopped) and str(error):
            return str(error)
        error = error.__context__
    return ""


def _is_out_of_memory(error: BaseException) -> bool:
    """As torch puts it, on CUDA and on the CPU."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    return isinstance(error, (MemoryError, kind)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
