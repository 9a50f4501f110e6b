"""The gradients of task and distillation terms apart, for solvers that read both: two backward passes a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdistill import distributed
from mdistill.distillers.base import StepOutput
from mdistill.errors import UserError

Gradients = list[Tensor | None]  # of each weight; None where the loss does not reach


def require_both_terms(name: str, output: StepOutput) -> None:
    """Refuse, for the solver ``name``, a method without task terms or without distillation terms.

    Raises:
        UserError: says which are missing.
    """
    if not output.task:
        missing, remedy = "task", "set distiller.ce_weight above 0"
    elif not output.distillation:
        missing, remedy = "distillation", "choose a method with one"
    else:
        return
    raise UserError(
        f"solver.name: {name} needs a task and a distillation term, this method has no {missing} term;"
        f" {remedy} or choose another solver.name"
    )


def two_gradients(output: StepOutput, parameters: Sequence[Tensor]) -> tuple[Gradients, Gradients]:
    """Of the sum of the task terms and of that of the distillation terms, each over all processes.

    By ``backward``, which lays them out as the fused update wants them; ``torch.autograd.grad`` does not.
    """
    found: list[Gradients] = []
    for terms in (output.task, output.distillation):
        for parameter in parameters:
            parameter.grad = None
        total = torch.stack(list(terms.values())).sum()
        total.backward(retain_graph=not found)  # type: ignore[no-untyped-call]
        distributed.sum_gradients(parameters, output.share)
        found.append([parameter.grad for parameter in parameters])
    task, distillation = found
    return task, distillation


def set_gradients(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Give each weight its gradient; None leaves it out of the coming update."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
