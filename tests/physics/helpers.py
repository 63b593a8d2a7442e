"""Draws and measures that the tests of physics share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def eps(dtype: torch.dtype) -> float:
    """Rounding unit of the dtype's real part."""
    return float(torch.finfo(dtype.to_real()).eps)


def complex_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Circular normal draws of unit variance."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit_codes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Codes of unit modulus and uniform phase."""
    return torch.polar(
        torch.ones(shape, dtype=dtype.to_real()),
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype.to_real())
        * (2 * torch.pi),
    )


def relative_error(value: Tensor, reference: Any) -> float:
    """||value - reference|| / ||reference|| in complex128; 0 where both are zero."""
    reference = torch.as_tensor(reference, dtype=torch.complex128)
    error = torch.linalg.vector_norm(value.detach().cpu().to(torch.complex128) - reference)
    norm = torch.linalg.vector_norm(reference)
    return float(error / norm) if norm > 0 else float(error)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's output held."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 8)
        return result
