"""Solvers own the backward pass: they turn a step's named losses into a change of the weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdistill import distributed
from mdistill.distillers.base import StepOutput
from mdistill.errors import UserError, shown
from mdistill.models.weights import tensor_misfit
from mdistill.registry import NonNegative, Positive, Registry

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


class OptimizerSolver(Solver):
    """One of torch's optimisers on the sum of all terms, in one backward pass.

    Args:
        optimizer: made of the groups by ``groups_with_rates``.
        clip_grad_norm: the longest gradient, of all weights together; see ``clip_factor``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> None:
        self.optimizer = optimizer
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._longest = clip_grad_norm

    def step(self, output: StepOutput) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        output.total.backward()  # type: ignore[no-untyped-call]
        distributed.sum_gradients(self._parameters, output.share)
        clip_gradients(self._parameters, self._longest)
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        set_group_rates(self.optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state)


@SOLVERS.register("sgd")
class SGD(OptimizerSolver):
    """Stochastic gradient descent with momentum on the sum of all terms; weight decay joins the gradient.

    One fused update for all weights. On CUDA each group's rate is a tensor there, which a captured step reads anew.

    Args:
        clip_grad_norm: the longest gradient, of all weights together and without weight decay; see ``clip_factor``.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        momentum: NonNegative,
        nesterov: bool = False,
        weight_decay: NonNegative,
        clip_grad_norm: Positive | None = None,
    ) -> None:
        if nesterov and momentum == 0:
            raise UserError("solver.nesterov: true needs solver.momentum above 0, found 0")
        optimizer = fused_sgd(param_groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        super().__init__(optimizer, clip_grad_norm)

    def misfit(self, state: dict[str, Any], *, stepped: bool) -> str | None:
        problem = optimizer_misfit("solver", self.optimizer, state)
        momentum = any(group["momentum"] for group in self.optimizer.param_groups)
        if not problem and stepped and momentum and not state["state"]:
            return "solver.state holds no momentum"
        return problem


def fused_sgd(param_groups: list[dict[str, Any]], **settings: Any) -> torch.optim.SGD:
    """torch's SGD, one update for all weights; its rates are set by ``set_group_rates``."""
    optimizer = torch.optim.SGD(groups_with_rates(param_groups), fused=True, **settings)
    optimizer.register_step_pre_hook(_begin_late_momenta)
    return optimizer


def groups_with_rates(param_groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``param_groups`` as torch's optimisers take them, each with a rate of 0 that ``set_group_rates`` writes."""
    return [{"lr_scale": 1.0, **group, "lr": rate_tensor(group["params"][0].device)} for group in param_groups]


def without_decay_of_norms(param_groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``param_groups``, the norms and biases of each in a group of their own that no weight decay reaches.

    These are the weights of fewer than 2 dimensions.
    """
    groups = []
    for group in param_groups:
        norms = [parameter for parameter in group["params"] if parameter.ndim < 2]
        others = [parameter for parameter in group["params"] if parameter.ndim >= 2]
        groups += [{**group, "params": others}] if others else []
        groups += [{**group, "params": norms, "weight_decay": 0.0}] if norms else []
    return groups


def clip_gradients(parameters: Iterable[Tensor], longest: float | None) -> None:
    """Scale the gradients of ``parameters``, in place, by their ``clip_factor``; None leaves them as they are."""
    if longest is not None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, clip_factor(gradients, longest))


def clip_factor(gradients: Sequence[Tensor], longest: float) -> Tensor:
    """min(1, ``longest`` / (|g| + 1e-6)), |g| the L2 norm of all ``gradients`` as one vector: ().

    Pascanu, Mikolov, Bengio, arXiv:1211.5063, Algorithm 1. Computed on the device, without a read by the host.
    """
    return (longest / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)


def set_group_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """``lr`` times each group's ``lr_scale``, in place where the rate is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``; rates stay where the weights are, and averages lie in memory as these do."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = rate_tensor(group["params"][0].device, float(group["lr"]))
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            for name in entry.keys() & _averages(optimizer):
                if entry[name] is not None:
                    entry[name] = torch.empty_like(parameter, requires_grad=False).copy_(entry[name])


def _begin_late_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give weights that get their first gradient after others did a momentum of 0, as that of all is at first.

    The fused update knows only states that begin together.
    """
    if optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                if parameter.grad is not None and parameter not in optimizer.state:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


SGD_STATE = {"momentum_buffer"}
ADAM_STATE = {"exp_avg", "exp_avg_sq", "step"}


def _averages(optimizer: torch.optim.Optimizer) -> set[str]:
    """What the update keeps of a weight, in tensors of its shape."""
    return SGD_STATE if isinstance(optimizer, torch.optim.SGD) else ADAM_STATE - {"step"}


def optimizer_misfit(place: str, optimizer: torch.optim.Optimizer, saved: Any) -> str | None:
    """Why ``saved`` is no state of ``optimizer``, SGD or AdamW: what its update reads goes unchecked there."""
    sgd = isinstance(optimizer, torch.optim.SGD)
    required = {"params", "lr", "lr_scale", "weight_decay", *(("momentum",) if sgd else ("betas", "eps"))}
    names = SGD_STATE if sgd else ADAM_STATE
    live = optimizer.state_dict()
    if not isinstance(saved, dict) or saved.keys() != live.keys():
        return f"{place} should hold {' and '.join(live)}"
    groups, buffers = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or len(groups) != len(live["param_groups"]) or not isinstance(buffers, dict):
        return f"{place}.param_groups should be {len(live['param_groups'])} groups, and {place}.state a mapping"
    for number, (group, own) in enumerate(zip(groups, live["param_groups"], strict=True)):
        if not isinstance(group, dict) or not group.keys() >= required:
            return f"{place}.param_groups.{number} should hold {', '.join(sorted(required))}"
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
        if not isinstance(entry, dict) or entry.keys() != names:
            return f"{where} should hold {', '.join(sorted(names))} alone"
        parameter, group = parameters[index]
        if sgd and entry["momentum_buffer"] is None and not group["momentum"]:
            continue
        problem = _entry_misfit(where, entry, parameter)
        if problem:
            return problem
    return None


def _entry_misfit(where: str, entry: Mapping[str, Any], parameter: Tensor) -> str | None:
    """Why ``entry`` is not what is kept of ``parameter``: shapes, types, and of AdamW numbers that cannot be."""
    for name in sorted(entry.keys() - {"step"}):
        problem = tensor_misfit(f"{where}.{name}", entry[name], parameter)
        if problem:
            return problem
    if "step" not in entry:
        return None
    problem = tensor_misfit(f"{where}.step", entry["step"], torch.zeros((), dtype=torch.float32))
    if problem:
        return problem
    steps = entry["step"].item()
    if not 1 <= steps < 2**24 or steps != int(steps):  # of float32, in which torch counts
        return f"{where}.step is {steps}, not a number of steps"
    if (entry["exp_avg_sq"] < 0).any():
        return f"{where}.exp_avg_sq holds negative numbers, not averages of squares"
    return None


def rate_tensor(device: torch.device, value: float = 0.0) -> Tensor | float:
    """A rate: on CUDA a tensor there, which a captured step reads anew."""
    return torch.tensor(value, device=device) if device.type == "cuda" else value
