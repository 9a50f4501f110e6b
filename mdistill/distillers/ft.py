"""FT: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", arXiv:1802.04977.

Letters: B batch, C channels of a network's last stage, K channels of a factor, H and W height and width.
"""

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.data.batch import DataInfo
from mdistill.distillers.at import attention
from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals
from mdistill.distillers.maps import both_features, of_one_size, stage_shapes
from mdistill.errors import UserError
from mdistill.models.layers import LenientBatchNorm2d
from mdistill.registry import Positive

SLOPE = 0.1  # of the leaky ReLUs, below 0


def ft_loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Mean over batch and positions of |Q^s / |Q^s|_2 - Q^t / |Q^t|_2|, where Q is the mean of F^2 over the channels.

    Of two factors of unequal size the larger one is average-pooled to the smaller.

    Differs from the paper, which compares the whole factors, flattened and of unit length; here each is first averaged
    over its channels, as in the published code of the compared figures.

    Args:
        student_factor: (B, K, H, W), F^s, the student's last stage through the translator.
        teacher_factor: (B, K, H, W), F^t, the teacher's through the paraphraser's encoder.

    Returns:
        (), the mean over B and positions.
    """
    student, teacher = (attention(factor, power=2) for factor in of_one_size(student_factor, teacher_factor))
    return (student - teacher).abs().mean()


def paraphrase_loss(reconstructed: Tensor, teacher_stage: Tensor) -> Tensor:
    """Mean over all elements of (r - t)^2, by which the paraphraser learns.

    Args:
        reconstructed: (B, C, H, W), r, the teacher's last stage through the paraphraser.
        teacher_stage: (B, C, H, W), t.

    Returns:
        (), the mean over B, C, H and W.
    """
    return F.mse_loss(reconstructed, teacher_stage)


def encoder(channels: int, width: int, *, norm: bool) -> nn.Sequential:
    """From a stage (B, C, H, W) to its factor (B, K, H, W): three 3x3 convolutions, each with a leaky ReLU.

    Args:
        channels: C.
        width: K.
        norm: whether BatchNorm comes before each activation.
    """
    layers = nn.Sequential()
    for number, (inputs, outputs) in enumerate(((channels, channels), (channels, width), (width, width)), start=1):
        layers.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1))
        if norm:
            layers.add_module(f"norm{number}", LenientBatchNorm2d(outputs))
        layers.add_module(f"relu{number}", nn.LeakyReLU(SLOPE))
    return layers


def decoder(channels: int, width: int) -> nn.Sequential:
    """From a factor (B, K, H, W) back to its stage (B, C, H, W), by transposed convolutions.

    Args:
        channels: C.
        width: K.
    """
    layers = nn.Sequential()
    for number, (inputs, outputs) in enumerate(((width, width), (width, channels), (channels, channels)), start=1):
        layers.add_module(f"deconv{number}", nn.ConvTranspose2d(inputs, outputs, 3, padding=1))
        layers.add_module(f"relu{number}", nn.LeakyReLU(SLOPE))
    return layers


@DISTILLERS.register("ft")
class FT(Distiller):
    """``ce_weight`` CE + ``ft_weight`` distance of the translated last stage to the teacher's paraphrased one.

    In the first phase, ``paraphraser``, the paraphraser learns to reconstruct the teacher's last stage; it is frozen
    afterwards. The translator is trained with the student and left out at inference.

    Args:
        ft_weight: beta, the weight of the distance.
        paraphrase_rate: k = K / C, the width of the factor over that of the teacher's last stage; 0.5 is published.
    """

    needs = Needs(teacher="features", features=("stages",), labels="none")
    phases = ("paraphraser",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
        *,
        ft_weight: Positive,
        paraphrase_rate: Annotated[float, Field(gt=0, le=1)],
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        assert teacher is not None
        channels, teacher_channels = (shapes[-1][0] for shapes in stage_shapes(self, data))
        width = int(teacher_channels * paraphrase_rate)
        if width < 1:
            raise UserError(
                f"distiller.paraphrase_rate: {paraphrase_rate:g} of the {teacher_channels} channels of the teacher's"
                " last stage is less than one"
            )
        self.ft_weight = ft_weight
        self.paraphraser = nn.Sequential()
        self.paraphraser.add_module("encoder", encoder(teacher_channels, width, norm=False))
        self.paraphraser.add_module("decoder", decoder(teacher_channels, width))
        self.translator = encoder(channels, width, norm=True)

    def trained(self, phase: str | None) -> list[nn.Module]:
        """The paraphraser; then the student and the translator."""
        return [self.student, self.translator] if phase is None else [self.paraphraser]

    def first_phase(self, phase: str, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``paraphrase``."""
        _, teacher = both_features(signals)
        stage = teacher.stages[-1]
        return {"paraphrase": paraphrase_loss(self.run_module(self.paraphraser, stage), stage)}

    def distillation(self, signals: Signals) -> dict[str, Tensor]:
        """The one term, ``ft``."""
        student, teacher = both_features(signals)
        translated = self.run_module(self.translator, student.stages[-1])
        return {"ft": self.ft_weight * ft_loss(translated, self.run_module(self.paraphraser[0], teacher.stages[-1]))}
