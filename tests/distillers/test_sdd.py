import pytest
import torch
from torch.nn import functional as F

from mdistill.distillers import sdd
from mdistill.distillers.dkd import dkd_loss
from mdistill.distillers.kd import kd_loss
from mdistill.distillers.maps import pooled_to
from mdistill.distillers.nkd import target_loss
from mdistill.distillers.sdd import complementary, regional_logits
from mdistill.errors import UserError

from . import examples
from .golden_more import cases, check

METHODS = ["sdd_kd", "sdd_dkd", "sdd_nkd"]
TRAINED = ("student_map", "student_weight", "student_bias")


@pytest.mark.parametrize("case", cases("sdd", *METHODS))
def test_loss_is_the_published_code_s(case):
    given, arguments = case.tensors(), dict(case.arguments)
    given["student_map"] = given[f"student_map_{arguments.pop('map')}"]
    trained = {name: given[name].requires_grad_() for name in TRAINED}
    scales = tuple(int(scale) for scale in arguments.pop("scales").split("-"))
    student, teacher = (
        regional_logits(given[f"{side}_map"], given[f"{side}_weight"], given[f"{side}_bias"], scales)
        for side in ("student", "teacher")
    )
    assert int(complementary(teacher, given["target"]).sum()) == case.numbers["complementary"]
    loss = getattr(sdd, f"{case.method}_loss")(student, teacher, given["target"], **arguments)
    check(case, loss, trained)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
def test_regions_are_cells_of_the_map_and_the_first_is_the_whole(size):
    last_map = torch.randn(3, 5, size, size, dtype=torch.float64)
    classifier = torch.nn.Linear(5, 6, dtype=torch.float64)
    found = regional_logits(last_map, classifier.weight, classifier.bias, (1, 2, 4))
    cells = F.adaptive_avg_pool2d(last_map, 4)
    torch.testing.assert_close(found[:, 0], classifier(cells.mean(dim=(2, 3))))
    torch.testing.assert_close(found[:, 2], classifier(cells[:, :, :2, 2:].mean(dim=(2, 3))))
    torch.testing.assert_close(found[:, 5 + 7], classifier(cells[:, :, 1, 3]))
    if size != 7:  # which 4 does not divide, so that windows overlap
        torch.testing.assert_close(found[:, 0], classifier(last_map.mean(dim=(2, 3))))


def test_a_map_is_repeated_where_it_is_smaller():
    maps = torch.arange(4.0).view(1, 1, 2, 2)
    assert pooled_to(maps, 4, 4)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    torch.testing.assert_close(pooled_to(maps, 4, 2), F.adaptive_avg_pool2d(maps, (4, 2)))


def test_a_region_is_complementary_where_one_of_the_two_is_right():
    teacher = F.one_hot(torch.tensor([[0, 0, 1, 2], [1, 0, 1, 2]]), 3).float()  # the whole map right, then wrong
    assert complementary(teacher, torch.tensor([0, 0])).tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_with_equal_regions_each_variant_is_its_method_of_the_whole_image():
    student, teacher = (examples.logits(seed, 4, 6) for seed in range(2))
    target = examples.targets(2, 4, 6)
    regions = [logits[:, None].expand(4, 5, 6) for logits in (student, teacher)]
    torch.testing.assert_close(
        sdd.sdd_kd_loss(*regions, target, temperature=3.0), kd_loss(student, teacher, temperature=3.0)
    )
    both = {"alpha": 0.5, "beta": 2.0, "temperature": 3.0}
    torch.testing.assert_close(sdd.sdd_dkd_loss(*regions, target, **both), dkd_loss(student, teacher, target, **both))
    nkd = sdd.sdd_nkd_loss(*regions, target, gamma=0.0, temperature=3.0)
    torch.testing.assert_close(nkd, target_loss(student, teacher, target))


@pytest.mark.parametrize("scales", [[], [2, 4], [1, 2, 2]])
def test_wrong_scales_are_refused(scales):
    with pytest.raises(UserError, match=r"distiller.scales: should begin with 1, .* found \["):
        examples.build("sdd_kd", scales=scales)


def test_the_gradient_of_the_regions_reaches_the_student_s_classifier():
    distiller = examples.build("sdd_kd", ce_weight=0.0, scales=[1, 2]).train()
    examples.step(distiller, examples.batch())
    assert distiller.student.classifier.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
