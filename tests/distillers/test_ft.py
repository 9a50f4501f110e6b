"""FT against published values and a plain loop; what its two phases train."""

import pytest
import torch

from mdistill.distillers.ft import decoder, encoder, ft_loss, paraphrase_loss
from mdistill.errors import UserError

from . import examples, golden_features


@pytest.mark.slow
@pytest.mark.parametrize("row", golden_features.cases("ft"))
def test_equals_published_values(row):
    given = golden_features.tensors(row)
    student, teacher = given["student_stage3"], given["teacher_stage3"]
    channels, width = teacher.shape[1], teacher.shape[1] // 2
    encode, decode = encoder(channels, width, norm=False), decoder(channels, width)
    own = golden_features.fill(encode, given, "paraphraser.") | golden_features.fill(decode, given, "paraphraser.")
    if row["arguments"] == "stage=paraphraser":
        golden_features.check(row, paraphrase_loss(decode(encode(teacher)), teacher), {**given, **own})
        return
    translate = encoder(student.shape[1], width, norm=True)
    own |= golden_features.fill(translate, given, "translator.")
    encode.requires_grad_(False)
    golden_features.check(row, ft_loss(translate(student), encode(teacher)), {**given, **own})


def test_equals_a_loop():
    student, teacher = (examples.logits(seed, 2, 12).view(2, 3, 2, 2) for seed in range(2))
    expected = 0.0
    for factors in zip(student.tolist(), teacher.tolist(), strict=True):
        sides = []
        for factor in factors:
            squares = [sum(channel[y][x] ** 2 for channel in factor) / 3 for y in range(2) for x in range(2)]
            length = sum(square**2 for square in squares) ** 0.5
            sides.append([square / length for square in squares])
        expected += sum(abs(s - t) for s, t in zip(*sides, strict=True))
    assert ft_loss(student, teacher).item() == pytest.approx(expected / 8, rel=1e-12)


def test_gradient_equals_finite_differences():
    student, teacher = (examples.logits(seed, 2, 12).view(2, 3, 2, 2) for seed in range(2))
    assert torch.autograd.gradcheck(lambda x: ft_loss(x, teacher), student.requires_grad_())


def test_the_paraphraser_is_frozen_after_its_phase_and_the_student_before():
    distiller = examples.build("ft:paraphraser")
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    examples.step(distiller, examples.batch(), lr=0.1)
    changed = {name.split(".")[0] for name, value in distiller.state_dict().items() if not value.equal(before[name])}
    assert changed == {"paraphraser"}
    distiller.enter_phase(None)
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    examples.step(distiller, examples.batch(1), lr=0.1)
    changed = {name.split(".")[0] for name, value in distiller.state_dict().items() if not value.equal(before[name])}
    assert changed == {"student", "translator"}


def test_a_factor_without_a_channel_is_refused():
    with pytest.raises(UserError) as caught:
        examples.build("ft", paraphrase_rate=0.1)
    assert str(caught.value) == (
        "distiller.paraphrase_rate: 0.1 of the 5 channels of the teacher's last stage is less than one"
    )
