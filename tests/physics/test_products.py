from __future__ import annotations

import torch
from torch import Tensor

from physics.products import combined, energy_beyond, gram, inner_products
from tests.physics.helpers import complex_normal

ROWS = complex_normal(2, 3, 5)
OTHERS = complex_normal(4, 5, seed=1)  # broadcasts
WEIGHTS = complex_normal(2, 3, 2, seed=2)
SQUARES = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)


def test_products_are_those_of_the_columns() -> None:
    C, D = ROWS.mT, OTHERS.mT
    assert torch.allclose(gram(ROWS), C.mH @ C)
    assert torch.allclose(inner_products(ROWS, OTHERS), C.mH @ D)
    assert torch.allclose(combined(WEIGHTS, ROWS), (C @ WEIGHTS).mT)
    G = D * SQUARES.sqrt()
    expected = (C.mH @ C).abs().square().sum((-2, -1))
    expected = expected - 2.0 * (C.mH @ G).abs().square().sum((-2, -1))
    projected = inner_products(ROWS, OTHERS).conj()
    assert torch.allclose(energy_beyond(gram(ROWS), projected, SQUARES), expected)


def test_gradients_match_finite_differences() -> None:
    rows, others, weights = (t.clone().requires_grad_() for t in (ROWS, OTHERS, WEIGHTS))
    shared = ROWS[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(gram, (rows,))
    assert torch.autograd.gradcheck(inner_products, (rows, others))
    assert torch.autograd.gradcheck(inner_products, (others, rows))
    assert torch.autograd.gradcheck(combined, (weights, rows))
    assert torch.autograd.gradcheck(combined, (weights, shared))

    def beyond(R: Tensor, D: Tensor) -> Tensor:
        return energy_beyond(gram(R), inner_products(R, D).conj(), SQUARES)

    assert torch.autograd.gradcheck(beyond, (rows, others))
