"""``mdistill quickstart``: trains what the configurations of its folder say and sums it up."""

from pathlib import Path

import pytest

from mdistill.cli import common, quickstart
from mdistill.models import MODELS


@pytest.mark.slow
def test_quickstart_ends_with_a_table_and_a_picture_and_repeats_nothing(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = tmp_path / "configs" / "quickstart"
    texts = {
        "vanilla/wide.yaml": "student: {name: tiny_net, width: 32}\ndistiller: {name: vanilla, ce_weight: 1.0}\n"
        "variant: wide\n",
        "vanilla/alone.yaml": "student: {name: other_net}\ndistiller: {name: vanilla, ce_weight: 1.0}\n",
        "kd/pair.yaml": "teacher: {name: tiny_net, width: 32, checkpoint: tiny/vanilla/tiny_net/wide/seed0}\n"
        "student: {name: other_net}\ndistiller: {name: kd, ce_weight: 0.5, kd_weight: 0.5, temperature: 2}\n",
    }
    for name, text in texts.items():
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text(f"base: ../_recipe.yaml\n{text}")
    (configs / "_recipe.yaml").write_text(recipe.read_text())
    if "other_net" not in MODELS.names():
        MODELS.register("other_net")(lambda num_classes: MODELS.build("tiny_net", num_classes))
    monkeypatch.setattr(common, "project_root", lambda: tmp_path)
    output = tmp_path / "out"
    assert quickstart.main(["--output", str(output), "--device", "cpu", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    table = first[first.index("run  ") :].splitlines()
    assert table[0].split() == ["run", "parameters", "top-1", "top-5", "seconds"]
    assert [line.split("  ")[0] for line in table[2:5]] == ["tiny_net", "other_net", "other_net + kd"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "what to try next:" in first
    assert (output / "tiny/vanilla/tiny_net/wide/seed0/student.pt").exists()
    assert (output / "tiny/kd/tiny_net_other_net/seed1/student.pt").exists()
    assert quickstart.main(["--output", str(output), "--device", "cpu", "--seed", "1"]) == 0
    again = capsys.readouterr().out
    assert again.count("is complete: 3 of 3 epochs") == 3
    assert again[again.index("run  ") :].splitlines()[:5] == table[:5]
