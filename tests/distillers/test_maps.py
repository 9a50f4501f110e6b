"""Maths on feature maps against plain loops and torch's own."""

import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers.maps import of_one_size, pooled_to, unit
from mdistill.errors import UserError
from mdistill.models.base import Features

from . import examples


def test_unit_vectors_are_torch_s():
    vectors = examples.logits(0, 4, 30).view(4, 5, 6)
    for dim in (1, 2):
        torch.testing.assert_close(unit(vectors, dim), F.normalize(vectors, dim=dim), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_a_unit_vector_of_nothing_is_0_with_a_gradient_of_0(scale, dtype):
    vectors = (scale * examples.logits(0, 2, 3)).to(dtype).requires_grad_()
    unit(vectors, 1).sum().backward()
    assert vectors.grad.isfinite().all()
    assert scale == 1e4 or vectors.grad.abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 8), (6, 4), (12, 12), (16, 16)])
def test_pooling_is_torch_s_adaptive_one(size):
    maps = examples.logits(1, 6, 144).view(2, 3, 12, 12).requires_grad_()
    weights = examples.logits(2, 6, size[0] * size[1]).view(2, 3, *size)
    results = [function(maps) for function in (lambda x: pooled_to(x, *size), lambda x: F.adaptive_avg_pool2d(x, size))]
    gradients = [torch.autograd.grad((weights * result).sum(), maps)[0] for result in results]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_the_higher_map_is_pooled_to_the_lower_one():
    high, low = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    for pair in (of_one_size(high, low), tuple(reversed(of_one_size(low, high)))):
        torch.testing.assert_close(pair[0], F.avg_pool2d(high, 2))
        assert pair[1] is low


@pytest.mark.parametrize("name", ["at", "nst", "vid"])
def test_a_network_of_a_stem_alone_is_refused(name, monkeypatch):
    forward = examples.TinyNetwork.forward_features

    def stem_alone(self, image):
        features = forward(self, image)
        return Features(features.logits, features.stages[:1], features.preacts[:1], features.last_map, features.pooled)

    monkeypatch.setattr(examples.TinyNetwork, "forward_features", stem_alone)
    with pytest.raises(UserError, match=rf"^{name.upper()} compares the stages after the stem; the student has none$"):
        examples.build(name)
