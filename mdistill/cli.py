"""What the command-line tools share: their common flags, and how errors end a command."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from mdistill.errors import Stopped, UserError, suggestion


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        near = ""
        if message.startswith("unrecognized arguments:"):
            near = suggestion(message.split()[2].split("=")[0], self._option_string_actions)
        self.exit(2, f"error: {message}{near} (see --help)\n")


def plain_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose ``--help`` shows ``description`` and ``examples`` as written."""
    return _Parser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120),
        allow_abbrev=False,
    )


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A ``plain_parser`` with the machine flags."""
    made = plain_parser(description, examples)
    machine = made.add_argument_group("machine (does not change results)")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    machine.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets (%(default)s)")
    machine.add_argument("--download", action="store_true", help="fetch the data set if it is not there")
    return made


def add_roots(made: argparse.ArgumentParser) -> None:
    """The folders of runs and of teacher weights."""
    made.add_argument("--output", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    made.add_argument(
        "--checkpoint-root", type=Path, default=Path("checkpoints"), help="folder of teacher weights (%(default)s)"
    )


def add_cache_root(made: argparse.ArgumentParser) -> None:
    """The flag that says where teacher logits are kept; see ``cache_root``."""
    made.add_argument(
        "--cache-root",
        type=Path,
        help="folder of kept teacher logits ($MDISTILL_CACHE, else OUTPUT/teacher_cache)",
    )


def cache_root(arguments: argparse.Namespace) -> Path:
    """``--cache-root``, else $MDISTILL_CACHE, else a folder under ``--output``."""
    if arguments.cache_root is not None:
        return Path(arguments.cache_root)
    return Path(os.environ.get("MDISTILL_CACHE") or arguments.output / "teacher_cache")


def seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers.

    Raises:
        argparse.ArgumentTypeError: a word that is no seed, or one given twice.
    """
    found = []
    for word in text.split(","):
        if not word.strip().isdecimal():
            raise argparse.ArgumentTypeError(f"{word.strip()!r} in {text!r} is not a seed; write whole numbers, 0,1,2")
        if int(word) in found:
            raise argparse.ArgumentTypeError(f"{int(word)} is given twice in {text!r}; each seed is one run")
        found.append(int(word))
    return found


def run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run ``command``; a user's mistake or a stop ends as a message and an exit code, without a traceback.

    Returns:
        0 done, 1 the run failed, 2 bad input, 75 stopped and saved (resume it), 130 interrupted.
    """
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _terminated)  # while training, the engine's own handler is in its place
        command(arguments)
        sys.stdout.flush()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # torch's words for memory, on CUDA and on the CPU
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(
            f"error: out of memory, a smaller data.batch_size needs less: {str(error).splitlines()[0]}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped("SIGTERM: stopped outside training")
