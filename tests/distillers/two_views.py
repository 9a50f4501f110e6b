"""Methods of two views on given logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mdistill.distillers.base import Signals
from mdistill.distillers.functional import standardize

from . import examples


def terms(
    method: str, settings: Mapping[str, Any], given: Mapping[str, Tensor], *, epoch: int = 1
) -> dict[str, Tensor]:
    """Every term of ``method`` with changed ``settings`` on the logits ``given``, named as those of ``golden_more``."""
    distiller = examples.build(method, **settings).eval()
    weak, strong = (
        Signals(
            student_logits=standardize(student) if distiller.standardize_logits else student,
            teacher_logits=standardize(teacher) if distiller.standardize_logits else teacher,
            raw_student_logits=student,
            raw_teacher_logits=teacher,
            target=given["target"],
            index=torch.arange(len(student)),
            epoch=examples.epoch(epoch),
        )
        for student, teacher in (
            (given["student"], given["teacher"]),
            (given["student_strong"], given["teacher_strong"]),
        )
    )
    signals = replace(weak, strong=strong)
    return {**distiller.task(signals), **distiller.distillation(signals)}


def total(found: Mapping[str, Tensor], *names: str) -> Tensor:
    """The sum of the terms ``names``, or of all."""
    return torch.stack([found[name] for name in names or found]).sum()
