"""The names of the registered networks, as parameters of tests."""

import pytest

from mdistill.models import MODELS

ZOO = [name for name in MODELS.names() if MODELS.get(name).__module__.startswith("mdistill.")]  # not other tests' own
CIFAR = [name for name in ZOO if MODELS.get(name).__module__.startswith("mdistill.models.cifar.")]
FAMILIES = ["mobilenet_v1", "mobilenet_v2", "resnet8", "resnet18", "shufflenet_v1", "shufflenet_v2", "vgg8", "wrn_16_1"]
"""One small network of each."""
EACH = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
"""Every registered network."""
EACH_CIFAR = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in CIFAR]
