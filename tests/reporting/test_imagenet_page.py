"""The figures in docs/imagenet.md are those of results/published.csv."""

from pathlib import Path

from mdistill.reporting.published import Figure, read_published

ROOT = Path(__file__).resolve().parents[2]
PAIRS = (("torchvision/resnet34", "torchvision/resnet18"), ("torchvision/resnet50", "mobilenet_v1"))


def table() -> str:
    """One row for each method and variant; a figure that several sources have stands once."""
    figures = [figure for figure in read_published(ROOT / "results" / "published.csv") if figure.dataset == "imagenet"]
    lines = [
        "| method | ResNet34 -> ResNet18 | ResNet50 -> MobileNetV1 | source |",
        "|---|---:|---:|---|",
        row("teacher alone", [alone(figures, teacher) for teacher, _ in PAIRS]),
        row("student alone", [alone(figures, student) for _, student in PAIRS]),
    ]
    methods = sorted({(figure.method, figure.variant) for figure in figures if figure.method != "vanilla"})
    for method, variant in methods:
        own = [figure for figure in figures if (figure.method, figure.variant) == (method, variant)]
        of_pairs = [[figure for figure in own if (figure.teacher, figure.student) == pair] for pair in PAIRS]
        lines.append(row(f"`{'_'.join(part for part in (method, variant) if part)}`", of_pairs))
    return "\n".join(lines)


def alone(figures: list[Figure], network: str) -> list[Figure]:
    return [figure for figure in figures if figure.method == "vanilla" and figure.student == network]


def row(name: str, of_pairs: list[list[Figure]]) -> str:
    cells = []
    for own in of_pairs:
        values = {figure.metric: f"{figure.value:.2f}" for figure in own}
        assert len({(figure.metric, figure.value) for figure in own}) == len(values), name  # sources agree
        cells.append(" / ".join(values[metric] for metric in ("top1", "top5") if metric in values))
    stand = [figure for own in of_pairs for figure in own]
    sources = dict.fromkeys(f"{each.source}, Table {each.table}" if each.table else each.source for each in stand)
    return f"| {name} | {' | '.join(cells)} | {'; '.join(sources)} |"


def test_the_page_has_the_published_figures() -> None:
    assert f"\n{table()}\n" in (ROOT / "docs" / "imagenet.md").read_text()
