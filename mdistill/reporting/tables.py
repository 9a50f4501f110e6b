"""Plain-text tables."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from mdistill.errors import UserError
from mdistill.reporting.runs import RunRecord


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first column is flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


def comparison_table(records: Sequence[RunRecord], split: str = "test") -> str:
    """One row per run: parameters, last-epoch top-1 and top-5 in percent, seconds."""
    rows = [
        [
            record.label,
            f"{record.parameters:,}",
            f"{record.last[f'{split}/top1']:.2f}",
            f"{record.last[f'{split}/top5']:.2f}",
            f"{record.seconds:.0f}",
        ]
        for record in records
    ]
    return text_table(["run", "parameters", "top-1", "top-5", "seconds"], rows)


def paired_table(results: Mapping[str, Mapping[int, float]], baseline: str) -> str:
    """Mean and standard deviation over seeds, and the paired difference to ``baseline`` with its standard error.

    Args:
        results: label -> seed -> top-1 in percent.
        baseline: the label that the others are compared with, seed by seed.

    Raises:
        UserError: fewer than two seeds, or runs whose seeds differ.
    """
    seeds = sorted(results[baseline])
    rows = []
    for label, values in results.items():
        if sorted(values) != seeds or len(seeds) < 2:
            raise UserError(f"{label}: seeds {sorted(values)}; a paired comparison needs the same two or more, {seeds}")
        row = [label, f"{mean(values.values()):.2f}", f"{stdev(values.values()):.2f}"]
        if label == baseline:
            rows.append([*row, "", ""])
            continue
        gaps = [values[seed] - results[baseline][seed] for seed in seeds]
        rows.append([*row, f"{mean(gaps):+.2f}", f"{stdev(gaps) / len(gaps) ** 0.5:.2f}"])
    return text_table([f"top-1 over {len(seeds)} seeds", "mean", "std", "difference", "std. error"], rows)
