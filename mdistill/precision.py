"""The precision of the networks and of the kernels. Losses, logits and optimiser are float32 under all of them."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mdistill.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]
"""fp32: IEEE float32. tf32: convolutions on TF32 units where the device has them. bf16: autocast to bfloat16."""


def set_numerics(precision: Precision, *, deterministic: bool) -> None:
    """Set torch's backends for this process; bf16 also needs ``computing`` around each forward pass."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # as torch's default: losses are float32 throughout
    _set_convolutions(precision)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def computing(precision: Precision | None, device: torch.device) -> Iterator[None]:
    """Run networks on ``device`` in ``precision``; None leaves everything as the caller has it.

    Autocast is on for bf16 alone, also within a caller's. The setting of convolutions is as before afterwards.
    """
    if precision is None:
        yield
        return
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    _set_convolutions(precision)
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def require_precision(precision: Precision, device: torch.device, where: str) -> None:
    """Make sure that ``device`` has units for ``precision``; ``where`` is the setting that asks for it.

    Raises:
        UserError: bf16 on a processor without bfloat16 arithmetic. (tf32 is float32 where there are no TF32 units.)
    """
    if precision != "bf16":
        return
    if device.type == "cuda":
        has, needed = torch.cuda.is_bf16_supported(including_emulation=False), "a GPU of the Ampere generation or newer"
    else:
        has, needed = _cpu_has_bf16(), "a processor with bfloat16 units (AVX512-BF16, AMX or Arm BF16)"
    if not has:
        raise UserError(f"{where}: bf16 needs {needed}, which this one is not; use fp32 or tf32")


def _cpu_has_bf16() -> bool:
    if platform.machine() in {"aarch64", "arm64"}:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported()


def _set_convolutions(precision: Precision) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def cpu_kernels() -> str:
    """Which kernels a CPU runs, by its instruction set, such as ``AVX512 with AMX``: other ones round otherwise."""
    units = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{torch.backends.cpu.get_cpu_capability()}{units}"
