"""A dispatch mode under which a step that could not be captured in a graph fails."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = (
    "_local_scalar_dense",  # .item(), float(), bool(), `if tensor`, F.one_hot
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "histc",
    "repeat_interleave",
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
COPIES = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)  # on the CPU these reach no dispatcher


class NoHostReads(TorchDispatchMode):
    """Raises on operations whose result the host reads or whose shape depends on values."""

    def __enter__(self) -> "NoHostReads":
        self._copies = _NoCopies()
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in FORBIDDEN and not (name == "repeat_interleave" and "Tensor" not in func._overloadname):
            raise AssertionError(f"the host would wait for, or a shape would depend on, values: {func}")
        if name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise AssertionError(f"indexing with a mask: {func}")
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in COPIES:
            raise AssertionError(f"a copy to the host: {func}")
        return func(*args, **(kwargs or {}))
