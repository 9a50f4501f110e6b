"""``mdistill methods``: what it prints, and that docs/methods.md is as it would write it."""

import shutil
from pathlib import Path

import pytest

from mdistill.cli import common
from mdistill.cli.methods import main
from mdistill.distillers import DISTILLERS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "cifar100"


@pytest.mark.slow
def test_the_page_is_up_to_date(capsys):
    """After a change of a method or its settings: python tools/methods.py --write."""
    assert main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_stale_page_is_reported_and_mended(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "methods.md", tmp_path / "docs")
    monkeypatch.setattr(common, "project_root", lambda: tmp_path)
    shutil.copytree(CONFIGS, tmp_path / "configs" / "cifar100")
    page = tmp_path / "docs" / "methods.md"
    whole = page.read_text()
    page.write_text(whole.replace("### `rld`", "### `old`"))
    assert main(["--check"]) == 1
    assert capsys.readouterr().err == (
        "error: docs/methods.md should be written anew: python tools/methods.py --write\n"
    )
    assert main(["--write"]) == 0
    assert page.read_text() == whole
    assert main(["--check"]) == 0


@pytest.mark.slow
def test_the_command_lists_all_methods_or_some_whole(capsys):
    assert main([]) == 0
    everything = capsys.readouterr().out
    assert [line.split(":")[0] for line in everything.splitlines() if line and line[0] != " "][
        :-1
    ] == DISTILLERS.names()
    assert main(["dkd", "lr"]) == 0
    some = capsys.readouterr().out
    assert some.startswith("dkd: ce_weight CE + alpha TCKD")
    assert "settings  alpha 1, beta 8, temperature 4, ce_weight 1, warmup_epochs 20" in some
    assert "nckd_loss differs from the paper: softened by T" in some
    assert "\nlabel_revision: " in some
    assert main(["kdd"]) == 2
    assert "unknown method 'kdd'; did you mean" in capsys.readouterr().err
    assert main(["kd", "--write"]) == 2
    assert "name none" in capsys.readouterr().err
