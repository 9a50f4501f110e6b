"""Averages of a network's weights against means written out."""

import pytest
import torch
from torch import Tensor

from mdistill.optim.averaging import AveragedNetwork

from ..distillers import examples
from ..distillers import golden_more as golden

State = dict[str, Tensor]


def state(network: torch.nn.Module) -> State:
    return {key: value.clone() for key, value in network.state_dict().items()}


def averaged(steps: int, **settings: object) -> tuple[AveragedNetwork, list[State]]:
    """An average after a few steps, one an epoch, that change weights, statistics and counters; the states after each.

    Settings are those of ``AveragedNetwork``.
    """
    network, states = examples.network(0).train(), []
    average = AveragedNetwork(network, **settings)
    for number in range(1, steps + 1):
        network(examples.batch(number).image).square().sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.01 * parameter.grad
        average.update(network, examples.epoch(number))
        states.append(state(network))
    return average, states


@pytest.mark.parametrize("first_epoch", [1, 3])
def test_the_plain_average_is_the_mean_of_all_states_from_its_first_epoch_on(first_epoch):
    average, states = averaged(5, first_epoch=first_epoch)
    for key, value in average.network.state_dict().items():
        if value.is_floating_point():
            expected = torch.stack([state[key] for state in states[first_epoch - 1 :]]).mean(dim=0)
            torch.testing.assert_close(value, expected)
        else:
            assert value == states[-1][key]
    assert average.count == 6 - first_epoch


class Path(torch.nn.Module):
    """Weights and statistics that are set by hand."""

    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("running_mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("case", golden.cases("wakd"))
def test_with_the_statistics_of_its_first_step_it_equals_the_released_code(case: golden.Case) -> None:
    given, first, network, found = case.tensors(), case.arguments["first_step"], Path(), []
    average = AveragedNetwork(network, first_epoch=first, statistics="first")
    for number in range(1, len(given["weights"]) + 1):
        with torch.no_grad():
            network.weight.copy_(given["weights"][number - 1])
            network.running_mean.copy_(given["running_means"][number - 1])
            network.num_batches_tracked.add_(1)
        average.update(network, torch.tensor(number))
        found.append(state(average.network))
    for key, name in (("weight", "average"), ("running_mean", "running_mean")):
        golden.close(torch.stack([each[key] for each in found[first - 1 :]]), case.results()[name], name)
    assert found[-1]["num_batches_tracked"] == first


def test_before_its_first_epoch_it_is_the_network():
    average, states = averaged(2, first_epoch=3)
    torch.testing.assert_close(state(average.network), states[-1])


def test_the_exponential_average_forgets_by_its_decay():
    """By hand: the mean of two steps, then 3/5 of it and 2/5 of the third, and so on (1/3 is below 2/5)."""
    average, states = averaged(4, decay=0.6)
    actual = average.network.state_dict()
    for key in (key for key, value in actual.items() if value.is_floating_point()):
        expected = (states[0][key] + states[1][key]) / 2
        for later in states[2:]:
            expected = 0.6 * expected + 0.4 * later[key]
        torch.testing.assert_close(actual[key], expected)


def test_it_needs_no_gradient():
    average, _ = averaged(1)
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_a_restored_average_is_the_same():
    average, _ = averaged(4, first_epoch=2)
    other = AveragedNetwork(examples.network(1), first_epoch=2)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(state(other), state(average), rtol=0, atol=0)
    assert other.count == 3
