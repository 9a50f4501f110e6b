"""What is said of each method, and that the pages say the same."""

import shutil
from pathlib import Path

import pytest

from mdistill.distillers import DISTILLERS
from mdistill.errors import UserError
from mdistill.reporting.methods import COLUMNS, describe, markdown_section, markdown_table, replaced, text

from ..conftest import load_tool
from ..distillers.examples import METHODS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "cifar100"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_paper_a_loss_and_published_settings(name):
    method = describe(name, CONFIGS)
    assert method.loss
    assert len(method.loss) < 130
    assert (ROOT / method.config).is_file()
    assert set(method.settings) <= set(DISTILLERS.arguments(name))
    assert method.settings
    assert method.graph == "yes"
    if name != "vanilla":
        assert method.paper is not None
        assert method.paper.reference.startswith(("arXiv:", "doi:", "CVPR"))
        assert 2015 <= int(method.paper.year) <= 2026
        assert method.readings or name in {"rld"}


def test_known_facts_are_found():
    kd, mlkd, nd, uskd, rc = (describe(name, CONFIGS) for name in ("kd", "mlkd", "nd", "uskd", "rc"))
    assert kd.paper.title == "Distilling the Knowledge in a Neural Network"
    assert (kd.paper.year, kd.paper.reference) == ("2015", "arXiv:1503.02531v1")
    assert kd.settings == {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
    assert (kd.needs, kd.cache) == ("logits", "yes")
    assert (mlkd.needs, mlkd.cache, mlkd.paper.link) == ("logits; two views", "weak view", "CVPR 2023")
    assert (nd.needs, nd.cache) == ("features of both; classes", "no")
    assert (uskd.needs, uskd.cache) == ("no teacher; features of the student; classes", "no teacher")
    assert rc.paper.link == "[doi:10.1109/LSP.2023.3333240](https://doi.org/10.1109/LSP.2023.3333240)"
    assert rc.paper.year == "2023"


def test_a_method_without_paper_and_configuration_is_listed_too(tmp_path):
    method = describe("vanilla", tmp_path)
    assert (method.paper, method.settings, method.config, method.graph) == (None, {}, "", "yes")
    assert text(method).splitlines()[0].startswith("vanilla: ")
    assert markdown_section(method).startswith("### `vanilla`\n")


def test_a_table_has_a_row_for_each_and_a_cell_for_each_column():
    rows = markdown_table([describe(name, CONFIGS) for name in ("kd", "vanilla")]).splitlines()
    assert len(rows) == 4
    assert {row.count(" | ") for row in rows} == {len(COLUMNS) - 1}


def test_a_page_without_its_comments_is_refused():
    with pytest.raises(UserError, match="begin table"):
        replaced("nothing here", "table", "content")


def test_the_pages_are_up_to_date(capsys):
    """After a change of a method or its settings: python tools/methods.py --write."""
    assert load_tool("tools/methods").main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_found_and_mended(tmp_path, monkeypatch, capsys):
    tool = load_tool("tools/methods")
    for name, place in (("README", "README.md"), ("PAGE", "docs/methods.md")):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, path)
        monkeypatch.setattr(tool, name, path)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    shutil.copytree(CONFIGS, tmp_path / "configs" / "cifar100")
    page = tmp_path / "docs" / "methods.md"
    whole = page.read_text()
    page.write_text(whole.replace("### `rld`", "### `old`"))
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().err == (
        "error: docs/methods.md should be written anew: python tools/methods.py --write\n"
    )
    assert tool.main(["--write"]) == 0
    assert page.read_text() == whole
    assert tool.main(["--check"]) == 0


def test_the_tool_lists_all_methods_or_some_whole(capsys):
    tool = load_tool("tools/methods")
    assert tool.main([]) == 0
    everything = capsys.readouterr().out
    assert [line.split(":")[0] for line in everything.splitlines() if line and line[0] != " "][
        :-1
    ] == DISTILLERS.names()
    assert tool.main(["dkd", "lr"]) == 0
    some = capsys.readouterr().out
    assert some.startswith("dkd: ce_weight CE + alpha TCKD")
    assert "settings  alpha 1, beta 8, temperature 4, ce_weight 1, warmup_epochs 20" in some
    assert "nckd_loss differs from the paper: softened by T" in some
    assert "\nlabel_revision: " in some
    assert tool.main(["kdd"]) == 2
    assert "unknown method 'kdd'; did you mean" in capsys.readouterr().err
    assert tool.main(["kd", "--write"]) == 2
    assert "name none" in capsys.readouterr().err
