"""What many tests share: a tiny data set, tiny networks, and the command-line tools as functions."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdistill.cli.eval import main as eval_main
from mdistill.cli.train import main as train_main
from mdistill.data import DATASETS, InMemoryDataset
from mdistill.engine.teacher import FrozenTeacher
from mdistill.models import MODELS
from mdistill.models.base import Features

from .pretend_cuda import pretend

ROOT = Path(__file__).resolve().parents[1]


PRETENDED = os.environ.get("MDISTILL_PRETEND_CUDA") == "1"
"""Whether the tests that need a GPU run on a pretended one."""


@pytest.fixture(autouse=True)
def _pretended_cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    with pretend() if "gpu" in request.keywords and _is_pretended(request.node) else nullcontext():
        yield


def _is_pretended(item: pytest.Item) -> bool:
    return PRETENDED or (not torch.cuda.is_available() and "pretended" in item.keywords)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords and not _is_pretended(item):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each batch that any frozen teacher was asked about."""
    sizes: list[int] = []
    ask = FrozenTeacher.__call__

    def asked(teacher: FrozenTeacher, image: Tensor) -> Tensor:
        sizes.append(len(image))
        return ask(teacher, image)

    monkeypatch.setattr(FrozenTeacher, "__call__", asked)
    return sizes


def tiny_arrays(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blurred blobs of one colour a class, with noise: learnable in a few steps."""
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    colours = np.random.default_rng(99).integers(0, 256, (classes, 1, 1, 3))
    noise = generator.integers(0, 100, (images, 32, 32, 3))
    return ((colours[labels] * 0.6) + noise).astype(np.uint8), labels


@DATASETS.register("tiny")
def tiny(root: Path, download: bool, *, images: int = 150, classes: int = 10) -> InMemoryDataset:
    """A data set of the tests; its builder reads nothing."""
    return InMemoryDataset(
        tiny_arrays(images, classes),
        tiny_arrays(60, classes, seed=1),
        num_classes=classes,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


class TinyNet(nn.Module):
    """Four-by-four pooling, BatchNorm and two linear layers: milliseconds a step, buffers and features included."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(48, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_features(x).logits

    def forward_features(self, x: torch.Tensor) -> Features:
        stem = nn.functional.avg_pool2d(self.bn(x), x.shape[-1] // 4)
        preact = self.hidden(stem.flatten(1))
        pooled = torch.tanh(preact)
        last_map = pooled[:, :, None, None]
        preacts = (stem, preact[:, :, None, None])
        return Features(self.classifier(pooled), (stem, last_map), preacts, last_map, pooled)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """As if one were there that does nothing: a batch of one image needs none, and its activation is another."""
        return [nn.BatchNorm2d(len(self.hidden.bias), track_running_stats=False, device=self.hidden.bias.device)]


@MODELS.register("tiny_net")
def tiny_net(num_classes: int, *, width: int = 16) -> TinyNet:
    return TinyNet(num_classes, width)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A base configuration on the tiny data set: three epochs of three steps, the last one smaller."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {name: tiny, batch_size: 64, eval_batch_size: 50}\n"
        "solver: {name: sgd, epochs: 3, lr: 0.05, milestones: [2], gamma: 0.1, momentum: 0.9, weight_decay: 5e-4}\n"
    )
    return path


@pytest.fixture
def student_cfg(tmp_path: Path, recipe: Path) -> Path:
    """The tiny network alone."""
    path = tmp_path / "alone.yaml"
    path.write_text(f"base: {recipe.name}\nstudent: {{name: tiny_net}}\ndistiller: {{name: vanilla, ce_weight: 1.0}}\n")
    return path


@pytest.fixture
def kd_cfg(tmp_path: Path, recipe: Path) -> Path:
    """The tiny network taught by a wider one, whose run folder is under the checkpoint root."""
    path = tmp_path / "kd.yaml"
    path.write_text(
        f"base: {recipe.name}\n"
        "teacher: {name: tiny_net, width: 32, checkpoint: teacher.pt}\n"
        "student: {name: tiny_net}\n"
        "distiller: {name: kd, ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}\n"
    )
    return path


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """Weights for the teacher of ``kd_cfg``, in the checkpoint root ``tmp_path``."""
    torch.manual_seed(5)
    path = tmp_path / "teacher.pt"
    torch.save({"model": TinyNet(10, 32).state_dict()}, path)
    return path


def refused(capsys: pytest.CaptureFixture[str], code: int, expected: int = 2) -> str:
    """The one line that a command printed when it refused."""
    assert code == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def load_tool(name: str) -> ModuleType:
    """A file of ``tools/`` as a module."""
    path = ROOT / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., int]:
    """``mdistill train`` in this process: output under tmp_path/runs, checkpoints under tmp_path, on the CPU."""

    def call(cfg: Path, *arguments: str) -> int:
        flags = ["--device", "cpu", "--output", str(tmp_path / "runs"), "--checkpoint-root", str(tmp_path)]
        return train_main(["--cfg", str(cfg), *flags, *arguments])

    return call


@pytest.fixture
def evaluate_tool() -> Callable[[Sequence[str]], int]:
    """``mdistill eval`` in this process."""
    return eval_main
