"""``torch.autocast`` for tensors on the meta device, which PyTorch's own passes over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Operations by how autocast computes them (docs.pytorch.org/docs/stable/amp.html, "Autocast Op Reference"; those that
# models here use). Attention is in the first list too, and is cast where it is replaced.
LOWER = set("linear matmul __matmul__ __rmatmul__ mm mv bmm addmm addbmm baddbmm einsum conv1d conv2d conv3d".split())
FULL = {
    "cuda": set(
        "layer_norm group_norm pow __pow__ rsqrt reciprocal exp log log1p softplus softmax log_softmax logsumexp sum "
        "prod cumsum norm cross_entropy nll_loss mse_loss".split()
    ),
    "cpu": set("prod norm nll_loss mse_loss".split()),
}


class MetaAutocast(TorchFunctionMode):
    """Casts the operands of operations as ``torch.autocast`` does.

    Args:
        dtype: of matrix products; ``None`` casts nothing.
        device: ``cuda`` or ``cpu``, whose lists of operations differ.
    """

    def __init__(self, dtype: torch.dtype | None, device: str = "cuda") -> None:
        super().__init__()
        self.dtype = dtype
        self.full = FULL[device]
        # Trained weights are cast once in a forward pass. Without one running nothing is kept.
        self.cached: dict[Tensor, Tensor] | None = {}

    def end_forward(self) -> None:
        """Drop the cast weights, as autocast does where it ends; what is computed again is cast again."""
        self.cached = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.dtype is None or not (name in LOWER or name in self.full):
            return func(*args, **kwargs)
        dtype = self.dtype if name in LOWER else torch.float32
        return func(*self.cast(args, dtype), **dict(zip(kwargs, self.cast(kwargs.values(), dtype), strict=True)))

    def cast(self, values: Iterable[Any], dtype: torch.dtype | None = None) -> list[Any]:
        """Return the values with floating tensors cast."""
        wanted = dtype or self.dtype
        return [self._cast(v, wanted) if wanted is not None and isinstance(v, Tensor) else v for v in values]

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and dtype == self.dtype) or self.cached is None:
            return tensor.to(dtype)
        if tensor not in self.cached:
            self.cached[tensor] = tensor.to(dtype)
        return self.cached[tensor]
