"""``mdistill audit``: replay the first steps of a run and say whether they are the same."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.cli import common
from mdistill.errors import UserError, printable

if TYPE_CHECKING:
    import torch

    from mdistill.config import Config
    from mdistill.engine.build import Experiment

DESCRIPTION = """Replay the first steps of a run from its record, write nothing, and say whether they are the same.

The record is config.yaml, env.json and metrics.jsonl of a run folder, or a copy of these three. The verdict is
bit-equal, close or different, with how far apart the losses are; whatever differs in versions, device, threads, data
and code is named. A run on a CPU is replayed with as many threads as it had."""

EXAMPLES = """  mdistill audit runs/cifar100/kd/resnet56_resnet20/seed0
  mdistill audit runs/cifar100/kd/resnet56_resnet20/seed0 --first-epoch   all of it, and its evaluation
  mdistill audit results/kd/seed0 --data-root data --checkpoint-root checkpoints --json

exit codes: 0 bit-equal or close, 1 different or not to be told, 2 bad input, 75 stopped by a signal"""

MOST_THREADS = 1024


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.machine_parser("audit", DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=common.path, help="a run folder")
    parser.add_argument("--first-epoch", action="store_true", help="replay all of it, and compare its metrics too")
    parser.add_argument("--threads", type=int, help="of a CPU (default: as many as the run had)")
    common.add_checkpoint_root(parser)
    common.add_recorded_code(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser.parse_intermixed_args(arguments)


def audit(args: argparse.Namespace) -> int:
    if args.threads is not None and not 1 <= args.threads <= MOST_THREADS:
        raise UserError(f"--threads: should be from 1 to {MOST_THREADS:,}, found {args.threads}")
    session, line, cell = read_record(args.run)
    from mdistill import distributed
    from mdistill.engine.audit import ran_on_cuda
    from mdistill.engine.build import pick_device
    from mdistill.engine.console import print_line

    with distributed.joined(args.device or (None if ran_on_cuda(session) else "cpu")) as name:
        with distributed.together():
            config = common.recorded_config(args, args.run)
            device = pick_device(name)
        if device.type == "cpu" and config.run.engine == "graph":  # all engines compute the same
            config = config.model_copy(update={"run": config.run.model_copy(update={"engine": "auto"})})
        threads = session.get("threads") if args.threads is None else args.threads
        aside = redirect_stdout(sys.stderr) if args.json else nullcontext()  # what is told on the way
        with computing_with(threads if device.type == "cpu" else None), aside:
            result = examine(args, config, device, {**session, **({} if cell is None else {"cell": cell})}, line)
        result = distributed.of_rank_0(result)  # whose network's BatchNorm statistics are the recorded ones
        print_line(json.dumps({"run": str(args.run), **result}) if args.json else "\n".join(lines_of(args.run, result)))
    return 0 if result["verdict"] in {"bit-equal", "close"} else 1


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """What the session that began the run in ``folder`` noted, the metrics of its first epoch, and the cell of its
    last session, which may have lengthened it.

    Raises:
        UserError: something that is needed is not there, or damaged.
    """
    from mdistill.engine.run_folder import read_metrics, read_sessions

    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}")
    missing = [name for name in ("config.yaml", "env.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no {missing[0]} in it; an audit needs config.yaml, env.json and metrics.jsonl")
    sessions, lines = read_sessions(folder), read_metrics(folder)
    if not sessions:
        raise UserError(f"{folder / 'env.json'} tells of no session")
    if not lines or lines[0]["epoch"] != 1:
        raise UserError(
            f"{folder / 'metrics.jsonl'} has no line of a first epoch; what is compared is recorded at its end"
        )
    return sessions[0], lines[0], sessions[-1].get("cell")


@contextmanager
def computing_with(threads: Any) -> Iterator[None]:
    """Within, the CPU computes with so many threads; what is no number of threads leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    if isinstance(threads, int) and 1 <= threads <= MOST_THREADS:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def examine(
    args: argparse.Namespace,
    config: "Config",
    device: "torch.device",
    session: Mapping[str, Any],
    line: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare fields and, where they let it be the same run, what is computed.

    Args:
        session: of the record.
        line: of its first epoch.
    """
    from mdistill.engine import audit, build
    from mdistill.engine.active_trial import session as session_now
    from mdistill.engine.cuda_graph import choose_engine

    experiment = build.build(
        [config],
        device,
        data_root=args.data_root,
        checkpoint_root=args.checkpoint_root,
        output_root=args.run,
        download=args.download,
        check_teacher=False,
    )
    now = session_now(experiment, config, choose_engine(config.run.engine, device))
    fields = audit.differing_fields(session, now)
    result: dict[str, Any] = {"fields": fields, "not_recorded": audit.unrecorded_fields(session, now)}
    recorded = line.get("first_steps")
    other = " and ".join(what for field, what in audit.IDENTITY.items() if field in fields)
    if "cell" in fields and not other:
        other = "other settings than config.yaml has now"
    if other:
        return {"verdict": "different", "why": f"the run had {other}, so nothing was replayed", **result}
    if recorded is None and not args.first_epoch:
        why = (
            "an earlier version, which recorded no first steps, began the run, so fields alone were compared;"
            " --first-epoch replays its first epoch and compares the metrics"
        )
        return {"verdict": "unknown", "why": why, **result}
    close = audit.closeness(config.run, device.type == "cuda" or audit.ran_on_cuda(session))
    return {**replay(experiment, line, close=close, whole=args.first_epoch), **result}


def replay(
    experiment: "Experiment", line: Mapping[str, Any], *, close: tuple[float, float], whole: bool
) -> dict[str, Any]:
    """What replaying the first steps, or the ``whole`` first epoch, says beside its ``line`` of metrics."""
    from mdistill.engine import audit, trainer

    found, recorded = trainer.first_epoch(experiment, whole=whole), line.get("first_steps")
    result: dict[str, Any] = {}
    verdicts: list[audit.Verdict] = []
    if recorded is not None:
        steps = found["first_steps"]
        why = audit.misfit(recorded["terms"], steps["terms"])
        if why is not None:
            return {"verdict": "different", "why": why}
        same = recorded["weights"] == steps["weights"]
        compared = audit.compare(recorded["terms"], steps["terms"], same_weights=same, close=close)
        verdicts.append(compared.verdict)
        result = {"steps": len(next(iter(steps["terms"].values()))), **vars(compared)}
    if whole:
        verdict, apart = audit.compare_epochs(line, found)
        verdicts.append(verdict)
        result["epoch"] = {"verdict": verdict, "apart": apart}
    return {**result, "verdict": audit.worst(verdicts)}


def lines_of(run: Path, result: Mapping[str, Any]) -> Iterator[str]:
    """What a person reads; the verdict comes last."""
    fields = result["fields"]
    differ = "; ".join(f"{printable(key)}: was {_value(was)}, now {_value(now)}" for key, (was, now) in fields.items())
    yield f"audit of {run}"
    yield f"fields that differ: {differ or 'none'}"
    if result["not_recorded"]:
        yield f"fields that the run did not record: {', '.join(result['not_recorded'])}"
    if "steps" in result:
        yield f"first {result['steps']} steps: {_of_steps(result)}"
    if "epoch" in result:
        apart = "; ".join(
            f"{key}: was {_value(was)}, now {_value(now)}" for key, (was, now) in result["epoch"]["apart"].items()
        )
        yield f"metrics of the first epoch that differ: {apart or 'none'}"
    yield f"{result['verdict']}{': ' if 'why' in result else ''}{result.get('why', '')}"


def _of_steps(result: Mapping[str, Any]) -> str:
    weights = f"the weights after them are {'' if result['same_weights'] else 'not '}the same"
    if result["first"] is None:
        return f"every loss term is the same; {weights}"
    step, term = result["first"]
    return (
        f"apart from step {step} on ({printable(term)}), by {result['first_step']:.2g} of the loss in step 1 and at"
        f" most {result['largest']:.2g}; {weights}"
    )


def _value(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return text[:12] if len(text) == 64 else text  # a fingerprint


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(audit, parse, arguments, when_stopped="nothing was written")
