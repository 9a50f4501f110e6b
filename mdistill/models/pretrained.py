"""Published weights of torchvision's and timm's networks, by name: where they come from and what images they expect."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.hub import download_url_to_file

from mdistill.errors import UserError, printable, suggestion
from mdistill.files import sha256_of
from mdistill.models.external import import_timm

PRETRAINED = "pretrained"
"""As a timm network's checkpoint: the weights of its tag, or of its first tag."""


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that a library names.

    Attributes:
        name: as the library calls them.
        file: where they are kept, under the checkpoint root.
        source: their address, for messages.
        fetch: writes them to a path.
        sha256: the first digits of the file's SHA-256; empty where none are published.
        num_classes: how many outputs their network has.
        mean, std: of the three channels, on the scale 0 to 1, as the images were normalised.
        image_size: pixels, height and width.
        convert: a state dict of the file into the network's own; None where the file has it.
    """

    name: str
    file: Path
    source: str
    fetch: Callable[[Path], None]
    sha256: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    convert: Callable[..., dict[str, Tensor]] | None = None

    def path(self, root: Path, section: str) -> Path:
        """The file below ``root``, which is downloaded where it is missing.

        Raises:
            UserError: it cannot be downloaded, or is not what was published.
        """
        path = root / self.file
        if not path.exists():
            print(f"{section}: downloading {self.name} from {self.source} to {path}", flush=True)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.fetch(path)
            except Exception as error:  # of the network, of the disk, or of the library's own
                reason = printable(" ".join(str(error).split()), 200) or type(error).__name__
                raise UserError(
                    f"{section}.checkpoint: {self.name} could not be downloaded from {self.source} ({reason});"
                    f" download it elsewhere and put it at {path}"
                ) from error
        elif self.sha256:
            found = sha256_of(path)
            if not found.startswith(self.sha256):
                raise UserError(
                    f"{section}.checkpoint: {path} is not {self.name}: its SHA-256 begins with {found[:8]}, not"
                    f" {self.sha256}; delete it to download it again"
                )
        return path


def published_weights(model: str, checkpoint: str, section: str) -> PublishedWeights | None:
    """What ``checkpoint`` names among the published weights of ``model``; None where it is a path.

    Args:
        model: a network's name, of the zoo or a library.
        checkpoint: ``ResNet50_Weights.IMAGENET1K_V1`` of torchvision's networks, ``pretrained`` of timm's.
        section: of the configuration, for messages.

    Raises:
        UserError: it names weights that there are not.
    """
    library, _, name = model.partition("/")
    if library == "torchvision" and (checkpoint == PRETRAINED or re.fullmatch(r"(\w+_Weights\.)?[A-Z]\w*", checkpoint)):
        return _of_torchvision(name, checkpoint, section)
    if library == "timm" and checkpoint == PRETRAINED:
        return _of_timm(name, section)
    return None


def _of_torchvision(name: str, checkpoint: str, section: str) -> PublishedWeights:
    from torchvision.models import get_model_weights

    entries = get_model_weights(name)
    known = [f"{entries.__name__}.{entry}" for entry in entries.__members__]
    own = [each for each in known if not each.endswith(".DEFAULT")]
    asked = checkpoint if "." in checkpoint else f"{entries.__name__}.{checkpoint}"
    if asked not in known:
        raise UserError(
            f"{section}.checkpoint: torchvision has no weights {checkpoint!r} of {name}{suggestion(asked, own)}"
            f" (it has: {', '.join(own)}; or give a path)"
        )
    if asked not in own:
        papers = f"; distillation papers use {own[0]}" if len(own) > 1 else ""
        raise UserError(
            f"{section}.checkpoint: {asked} may change with torchvision, name the weights: today it is"
            f" {entries.__name__}.{entries.DEFAULT.name}{papers}"
        )
    weights = entries[asked.partition(".")[2]]
    file = weights.url.rpartition("/")[2]
    digits = re.search(r"-([0-9a-f]{8,64})\.", file)
    sha256 = digits[1] if digits else ""
    preset = weights.transforms()
    return PublishedWeights(
        name=asked,
        file=Path("torchvision", file),
        source=weights.url,
        fetch=lambda path: download_url_to_file(weights.url, str(path), sha256 or None, progress=False),
        sha256=sha256,
        num_classes=len(weights.meta["categories"]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        image_size=preset.crop_size[0],
    )


def _of_timm(name: str, section: str) -> PublishedWeights:
    timm = import_timm()
    settings = timm.models.get_pretrained_cfg(name)
    if settings is None or not settings.has_weights:
        raise UserError(f"{section}.checkpoint: timm has no weights of {name}; give a path")
    tagged = f"{settings.architecture}.{settings.tag}" if settings.tag else settings.architecture
    if settings.hf_hub_id:
        file = settings.hf_hub_filename or "model.safetensors"
        source = f"{_hub_address()}/{settings.hf_hub_id}/resolve/main/{file}"
    else:
        source = settings.url if isinstance(settings.url, str) else settings.url[0]
        file = source.rpartition("/")[2]
    digits = None if settings.hf_hub_id else re.search(r"-([0-9a-f]{8,64})\.", file)
    sha256 = digits[1] if digits else ""

    def fetch(path: Path) -> None:
        download_url_to_file(
            source, str(path), sha256 or (_sha256_at_hub(source) if settings.hf_hub_id else None), progress=False
        )

    def convert(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """timm's own conversion: older names, position embeddings of another image size, a background class."""
        network: nn.Module = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": dict(state)},
            **{"num_classes": settings.num_classes, **arguments},
        )
        return cast(dict[str, Tensor], network.state_dict())

    return PublishedWeights(
        name=f"timm/{tagged}",
        file=Path("timm", tagged, file),
        source=source,
        fetch=fetch,
        sha256=sha256,
        num_classes=settings.num_classes,
        mean=tuple(settings.mean),
        std=tuple(settings.std),
        image_size=settings.input_size[-1],
        convert=convert,
    )


def _hub_address() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _sha256_at_hub(address: str) -> str | None:
    """What the hub says of a file; None where it gives no SHA-256."""
    from huggingface_hub import get_hf_file_metadata

    etag = get_hf_file_metadata(address).etag
    return etag if etag and re.fullmatch(r"[0-9a-f]{64}", etag) else None
