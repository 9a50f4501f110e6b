"""What is reported of each method."""

from pathlib import Path

import pytest

from mdistill.distillers import DISTILLERS
from mdistill.errors import UserError
from mdistill.reporting.methods import COLUMNS, describe, markdown_section, markdown_table, replaced, text

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
    if name != "vanilla":
        assert method.paper is not None
        assert method.paper.reference.startswith(("arXiv:", "doi:", "CVPR", "ICLR"))
        assert 2014 <= int(method.paper.year) <= 2026
        assert method.differences or name in {"rld"}


def test_what_is_known_of_some_methods():
    kd, mlkd, nd, uskd, rc = (describe(name, CONFIGS) for name in ("kd", "mlkd", "nd", "uskd", "rc"))
    assert kd.paper.title == "Distilling the Knowledge in a Neural Network"
    assert (kd.paper.year, kd.paper.reference) == ("2015", "arXiv:1503.02531v1")
    assert kd.settings == {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
    assert (kd.kind, kd.needs, kd.cache) == ("logits", "logits", "yes")
    assert (mlkd.needs, mlkd.cache, mlkd.paper.link) == ("logits; two views", "weak view", "CVPR 2023")
    assert (nd.kind, nd.needs, nd.cache) == ("features", "features of both: pooled; classes", "yes")
    assert (uskd.kind, uskd.cache) == ("no teacher", "no teacher")
    assert uskd.needs == "no teacher; features of the student: stages; classes"
    assert rc.paper.link == "[doi:10.1109/LSP.2023.3333240](https://doi.org/10.1109/LSP.2023.3333240)"
    assert rc.paper.year == "2023"


def test_how_sure_the_settings_of_some_methods_are():
    kd, mcld, ctkd = (describe(name, CONFIGS) for name in ("kd", "mcld", "ctkd"))
    assert kd.certainty == ctkd.certainty == "certain"
    assert mcld.certainty == (
        "certain; temperature, queue_size inferred; queue_start, category_mean, category_denominator ours"
    )
    assert "\n- `kd_weight`, `temperature`, `ce_weight` certain: megvii-research/mdistiller" in markdown_section(kd)
    assert "  source    certain; temperature, queue_size inferred; queue_start" in text(mcld)
    assert "  queue_start ours: the paper does not say" in text(mcld, in_full=True)


def test_settings_that_nothing_is_said_of(tmp_path):
    (tmp_path / "kd").mkdir()
    (tmp_path / "kd" / "own.yaml").write_text(
        "data: {name: cifar100, batch_size: 64}\n"
        "solver: {name: sgd, epochs: 3, lr: 0.1, milestones: [], gamma: 0.1, momentum: 0.9, weight_decay: 0}\n"
        "teacher: {name: resnet8, checkpoint: a.pt}\nstudent: {name: resnet8}\n"
        "distiller: {name: kd, ce_weight: 1, kd_weight: 1, temperature: 4}\n"
        "sources: {distiller.temperature: 'ours: a guess'}\n"
    )
    method = describe("kd", tmp_path)
    assert method.certainty == "not said; temperature ours"
    assert method.sources == {"temperature": "ours: a guess"}


def test_a_method_without_paper_and_configuration_is_listed_too(tmp_path):
    method = describe("vanilla", tmp_path)
    assert (method.paper, method.settings, method.config, method.certainty) == (None, {}, "", "")
    assert text(method).splitlines()[0].startswith("vanilla: ")
    assert markdown_section(method).startswith("### `vanilla`\n")


def test_a_table_has_a_row_for_each_and_a_cell_for_each_column():
    rows = markdown_table([describe(name, CONFIGS) for name in ("kd", "vanilla")]).splitlines()
    assert len(rows) == 4
    assert {row.count(" | ") for row in rows} == {len(COLUMNS) - 1}


def test_a_page_without_its_comments_is_refused():
    with pytest.raises(UserError, match="begin table"):
        replaced("nothing here", "table", "content")
