"""Solvers own the backward pass: they turn a step's named losses into a change of the weights."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mdistill import distributed
from mdistill.distillers.base import StepOutput
from mdistill.errors import UserError, shown
from mdistill.models.weights import tensor_misfit
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

    def misfit(self, state: dict[str, Any], *, stepped: bool) -> str | None:
        """Why ``state``, from a file, cannot be loaded, with its place first; None, as by default, if it can.

        Args:
            stepped: whether it is of after the first step.
        """
        return None


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
        distributed.sum_gradients(self._parameters, output.share)
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        set_group_rates(self.optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state)

    def misfit(self, state: dict[str, Any], *, stepped: bool) -> str | None:
        problem = optimizer_misfit("solver", self.optimizer, state)
        momentum = any(group["momentum"] for group in self.optimizer.param_groups)
        if not problem and stepped and momentum and not state["state"]:
            return "solver.state holds no momentum"
        return problem


def fused_sgd(param_groups: list[dict[str, Any]], **settings: Any) -> torch.optim.SGD:
    """torch's SGD, one update for all weights; its rates are set by ``set_group_rates``."""
    groups = [{"lr_scale": 1.0, **group, "lr": rate_tensor(group["params"][0].device)} for group in param_groups]
    optimizer = torch.optim.SGD(groups, fused=True, **settings)
    optimizer.register_step_pre_hook(_begin_late_momenta)
    return optimizer


def set_group_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """``lr`` times each group's ``lr_scale``, in place where the rate is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``; rates stay where the weights are, and momenta lie in memory as these do."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = rate_tensor(group["params"][0].device, float(group["lr"]))
        for parameter in group["params"]:
            momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
            if momentum is not None:
                laid_out = torch.empty_like(parameter, requires_grad=False)
                optimizer.state[parameter]["momentum_buffer"] = laid_out.copy_(momentum)


def _begin_late_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give weights that get their first gradient after others did a momentum of 0, as that of all is at first.

    The fused update knows only states that begin together.
    """
    if optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                if parameter.grad is not None and parameter not in optimizer.state:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


REQUIRED = {"params", "lr", "lr_scale", "momentum", "weight_decay"}  # of a group in a file


def optimizer_misfit(place: str, optimizer: torch.optim.Optimizer, saved: Any) -> str | None:
    """Why ``saved`` is no state of ``optimizer``, an SGD: what its update reads goes unchecked there."""
    live = optimizer.state_dict()
    if not isinstance(saved, dict) or saved.keys() != live.keys():
        return f"{place} should hold {' and '.join(live)}"
    groups, buffers = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or len(groups) != len(live["param_groups"]) or not isinstance(buffers, dict):
        return f"{place}.param_groups should be {len(live['param_groups'])} groups, and {place}.state a mapping"
    for number, (group, own) in enumerate(zip(groups, live["param_groups"], strict=True)):
        if not isinstance(group, dict) or not group.keys() >= REQUIRED:
            return f"{place}.param_groups.{number} should hold {', '.join(sorted(REQUIRED))}"
        for key in own.keys() & group.keys() - {"lr"}:  # another version of torch may have others
            if type(group[key]) is not type(own[key]) or group[key] != own[key]:
                return f"{place}.param_groups.{number}.{key} is {shown(group[key], 60)}, not {shown(own[key], 60)}"
        rate = group["lr"].item() if isinstance(group["lr"], Tensor) and group["lr"].numel() == 1 else group["lr"]
        if type(rate) is not float or not 0 <= rate <= 1e9:
            return f"{place}.param_groups.{number}.lr is {shown(rate, 60)}, not a rate"
    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in buffers.items():
        where = f"{place}.state.{shown(index, 60)}"
        if type(index) is not int or not 0 <= index < len(parameters):
            return f"{where} is of none of the {len(parameters)} weights"
        if not isinstance(entry, dict) or entry.keys() != {"momentum_buffer"}:
            return f"{where} should hold momentum_buffer alone"
        momentum = entry["momentum_buffer"]
        parameter, group = parameters[index]
        if momentum is None and not group["momentum"]:
            continue
        problem = tensor_misfit(f"{where}.momentum_buffer", momentum, parameter)
        if problem:
            return problem
    return None


def rate_tensor(device: torch.device, value: float = 0.0) -> Tensor | float:
    """A rate: on CUDA a tensor there, which a captured step reads anew."""
    return torch.tensor(value, device=device) if device.type == "cuda" else value
