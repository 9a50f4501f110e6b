"""The student alone."""

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers import DISTILLERS
from mdistill.errors import UserError

from . import examples


def test_is_cross_entropy_and_nothing_else():
    distiller = examples.build("vanilla", ce_weight=0.5).eval()
    batch = examples.batch()
    output = distiller(batch, examples.epoch())
    assert list(output.terms) == ["ce"]
    torch.testing.assert_close(output.total, 0.5 * F.cross_entropy(distiller.student(batch.image), batch.target))


def test_refuses_a_teacher():
    with pytest.raises(UserError, match="Vanilla takes no teacher"):
        DISTILLERS.build("vanilla", examples.network(0), examples.network(1), examples.data_info(), ce_weight=1.0)


def test_refuses_to_train_on_nothing():
    with pytest.raises(UserError, match=r"^distiller: Vanilla has nothing to train on: ce_weight all 0"):
        examples.build("vanilla", ce_weight=0.0)
