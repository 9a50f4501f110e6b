"""A linear classifier on frozen features: which features, which classifier, and what must not change."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data import InMemoryDataset
from mdistill.data.sampling import random_words
from mdistill.distillers.simkd import Projector, Reusing
from mdistill.engine.transfer import pooled_features, scores, standardized, train_classifier, transfer
from mdistill.errors import RunFailed, UserError
from mdistill.file_schemas import TransferSettings
from mdistill.models import MODELS

from ..conftest import TinyNet, tiny_arrays

CPU = torch.device("cpu")


def data(images: int = 40, classes: int = 4) -> InMemoryDataset:
    arrays = tiny_arrays(images, classes), tiny_arrays(20, classes, seed=1)
    return InMemoryDataset(*arrays, num_classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3, padding=0, flip=False)


def images(number: int) -> Iterator[Tensor]:
    yield from torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(4)


@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_features_are_the_input_of_the_classifier(name: str) -> None:
    network = MODELS.build(name, 10)
    network(torch.cat(list(images(6))))  # so that statistics are not as they begin
    found = pooled_features(network, images(6), name=name, precision="fp32")
    assert network.training
    network.eval()
    with torch.no_grad():
        whole = torch.cat(list(images(6)))
        assert torch.allclose(network.classifier(found), network(whole), atol=1e-5)
        assert torch.allclose(found, network.forward_features(whole).pooled, atol=1e-5)
        both = pooled_features(network, images(6), name=name, precision="fp32", mirror=True)
        assert torch.equal(both[:6], found)
        assert torch.allclose(both[6:], network.forward_features(whole.flip(3)).pooled, atol=1e-5)


def test_features_of_a_student_that_reuses_the_teachers_classifier() -> None:
    """They are of the projector, and its forward pass computes what it did."""
    network, classifier = MODELS.build("resnet8", 10), nn.Linear(8, 10)
    student = Reusing(network, Projector(64, 8, factor=2), classifier, (8, 8)).eval()
    found = pooled_features(student, images(4), name="student", precision="fp32")
    with torch.no_grad():
        assert torch.allclose(classifier(found), student(torch.cat(list(images(4)))), atol=1e-5)


def test_nothing_inside_the_student_changes() -> None:
    network = TinyNet(10, 16).train()
    network(torch.cat(list(images(8))))
    before = copy.deepcopy(network.state_dict())
    settings = TransferSettings(epochs=3, milestones=(2,), mirror=True, standardize=True)
    result = transfer(network, data(), settings, seed=0, name="tiny_net", precision="fp32", device=CPU)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert result.width == 16
    assert result.train_top1 >= 50


@pytest.mark.parametrize("changes", [{}, {"nesterov": False, "weight_decay": 0.01}, {"momentum": 0.0, "gamma": 0.5}])
def test_the_classifier_is_that_of_torchs_own_sgd(changes: dict[str, float]) -> None:
    """A layer, cross-entropy, autograd and ``torch.optim.SGD``, step by step."""
    settings = TransferSettings(epochs=7, batch_size=8, lr=0.3, milestones=(2, 5)).model_copy(update=changes)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 5, generator=generator)
    target = torch.randint(0, 3, (30,), generator=generator)
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    nesterov = settings.nesterov and settings.momentum > 0
    solver = torch.optim.SGD(
        layer.parameters(), 0.3, settings.momentum, weight_decay=settings.weight_decay, nesterov=nesterov
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(solver, [2, 5], settings.gamma)
    for epoch in range(7):
        order = np.argsort(random_words(4, "transfer", epoch, 30), kind="stable")
        for start in range(0, 30, 8):
            rows = torch.from_numpy(order[start : start + 8])
            solver.zero_grad()
            F.cross_entropy(layer(features[rows]), target[rows]).backward()
            solver.step()
        schedule.step()
    found = train_classifier(features, target, 3, settings, seed=4)
    assert torch.allclose(found[:5].T, layer.weight, atol=1e-5)
    assert torch.allclose(found[5], layer.bias, atol=1e-5)
    with torch.no_grad():
        logits = layer(features)
    top1, top5, loss = scores(found, features, target)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    assert (top5, loss) == (100.0, pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-4))


def test_a_seed_decides_the_order_alone() -> None:
    network, target = TinyNet(10, 16), data(60)

    def run(seed: int) -> float:
        settings = TransferSettings(epochs=2, batch_size=7)
        return transfer(network, target, settings, seed=seed, name="n", precision="fp32", device=CPU).loss

    assert run(0) == run(0) != run(1)


def test_features_that_do_not_vary_stay_when_standardized() -> None:
    train, test = standardized(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 6.0]]))
    assert train.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert test.tolist() == [[0.0, 1.0]]


def test_what_goes_wrong_is_one_line() -> None:
    def attempt(network: nn.Module, **settings: float) -> None:
        chosen = TransferSettings(epochs=40).model_copy(update=settings)
        transfer(network, data(), chosen, seed=0, name="mine", precision="fp32", device=CPU)

    network = TinyNet(10, 16)
    with pytest.raises(RunFailed, match=r"mine: the linear classifier's weights are not finite after 40 epochs at a"):
        attempt(network, lr=1e9, weight_decay=1e9)
    nn.init.constant_(network.hidden.bias, float("nan"))
    with pytest.raises(RunFailed, match="mine: its features of the training images are not finite"):
        attempt(network)
    with pytest.raises(UserError, match="'mine' gives no features before its classifier: no forward_features"):
        attempt(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))


def test_settings_are_checked() -> None:
    check: Callable[..., TransferSettings] = TransferSettings.model_validate
    assert check({"milestones": [3, 5], "lr": 1}).milestones == (3, 5)
    with pytest.raises(ValueError, match="milestones should ascend, found"):
        check({"milestones": [5, 3]})
    with pytest.raises(ValueError, match="epochs"):
        check({"epochs": 0})
