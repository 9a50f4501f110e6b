"""Solvers own the backward pass: they turn a step's named losses into a change of the weights."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mdistill import distributed
from mdistill.distillers.base import StepOutput
from mdistill.errors import UserError
from mdistill.registry import NonNegative, Registry

SOLVERS: Registry["Solver"] = Registry("solver")


class Solver(ABC):
    """What ``train_step`` calls after the forward pass.

    Builders take the distiller's ``param_groups()``; their keyword-only parameters come from the ``solver:`` section.
    """

    backward_passes = 1  # a step, over one forward pass

    def check(self, output: StepOutput) -> None:  # noqa: B027
        """Refuse a method whose steps this solver cannot take, told from the terms of one; by default takes all.

        Reads which terms there are, not their values, so any output of the method will do, before any training.

        Raises:
            UserError: says what is missing and what to change.
        """

    @abstractmethod
    def step(self, output: StepOutput) -> None:
        """Backward and update. No host sync."""

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming steps (each group's ``lr_scale`` multiplies it)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""


@SOLVERS.register("sgd")
class SGD(Solver):
    """Stochastic gradient descent with momentum on the sum of all terms; weight decay joins the gradient.

    One fused update for all weights. On CUDA each group's rate is a tensor there, which a captured step reads anew.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        momentum: NonNegative,
        nesterov: bool = False,
        weight_decay: NonNegative,
    ) -> None:
        if nesterov and momentum == 0:
            raise UserError("solver.nesterov: true needs solver.momentum above 0, found 0")
        self.optimizer = fused_sgd(param_groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        self._parameters = [parameter for group in param_groups for parameter in group["params"]]

    def step(self, output: StepOutput) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        output.total.backward()  # type: ignore[no-untyped-call]
        distributed.average_gradients(self._parameters)
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        set_group_rates(self.optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state)


def fused_sgd(param_groups: list[dict[str, Any]], **settings: Any) -> torch.optim.SGD:
    """torch's SGD, one update for all weights; its rates are set by ``set_group_rates``."""
    groups = [{"lr_scale": 1.0, **group, "lr": rate_tensor(group["params"][0].device)} for group in param_groups]
    return torch.optim.SGD(groups, fused=True, **settings)


def set_group_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """``lr`` times each group's ``lr_scale``, in place where the rate is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``; its rates stay where the weights are."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:  # where the weights are, whatever the device of the saved run
        group["lr"] = rate_tensor(group["params"][0].device, float(group["lr"]))


def rate_tensor(device: torch.device, value: float = 0.0) -> Tensor | float:
    """A rate: on CUDA a tensor there, which a captured step reads anew."""
    return torch.tensor(value, device=device) if device.type == "cuda" else value
