from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks._roofline import Machine, flops_of, work_of

MACHINE = Machine(
    launch=1e-6,
    copy_bytes=[1000, 100_000],
    copy_rates=[1e9, 1e8],
    flops=1e9,
    convolutions=4e9,
    functions=1e6,
    draws=1e5,
)


def test_a_small_operation_is_bound_by_its_launch() -> None:
    x = torch.ones(4)
    work = work_of(lambda: x + x, MACHINE)
    assert (work.n_operations, work.bound) == (1, "launch latency")
    assert work.least == pytest.approx(1e-6)


def test_a_large_copy_is_bound_by_memory_at_the_rate_of_its_size() -> None:
    x = torch.ones(10_000)
    work = work_of(lambda: x.clone(), MACHINE)
    assert work.n_bytes == 80_000
    assert work.bound == "memory bandwidth"
    assert work.least == pytest.approx(80_000 / 1e8)


def test_views_cost_nothing() -> None:
    x = torch.ones(8, 8)
    assert work_of(lambda: x.mT.reshape(8, 8)[0], MACHINE).n_operations == 0


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1), (torch.complex64, 4)])
def test_products_count_their_multiplications_and_additions(
    dtype: torch.dtype, factor: int
) -> None:
    a, b = torch.ones(3, 20, 50, dtype=dtype), torch.ones(3, 50, 30, dtype=dtype)
    work = work_of(lambda: a @ b, MACHINE)
    slow = sum(
        2 * factor for _ in range(3) for _ in range(20) for _ in range(30) for _ in range(50)
    )
    assert work.flops == slow


def test_a_convolution_and_both_its_gradients_count_every_tap_at_their_own_rate() -> None:
    image = torch.ones(2, 3, 7, 5, requires_grad=True)
    weight = torch.ones(4, 3, 3, 3, requires_grad=True)
    products = sum(1 for _ in range(2 * 4 * 7 * 5) for _ in range(3 * 3 * 3))
    slow = replace(MACHINE, launch=0.0, copy_rates=[1e20, 1e20], convolutions=1e3)

    def forward() -> Tensor:
        return torch.nn.functional.conv2d(image, weight, padding=1)

    with torch.no_grad():
        work = work_of(forward, slow)
    assert work.flops == 2 * products
    assert work.least == pytest.approx(2 * products / 1e3)
    both = work_of(lambda: forward().backward(torch.ones(2, 4, 7, 5)), slow)
    assert 6 * products <= both.flops < 6.2 * products
    assert both.least == pytest.approx(6 * products / 1e3, rel=1e-3)
    image.requires_grad_(False)
    one = work_of(lambda: forward().backward(torch.ones(2, 4, 7, 5)), slow)
    assert 4 * products <= one.flops < 4.2 * products


def test_functions_and_draws_have_rates_of_their_own() -> None:
    x = torch.ones(1000)
    assert work_of(lambda: x.cos(), MACHINE).least == pytest.approx(1e-3 + 1000 / 1e9)
    assert work_of(lambda: x.clone().normal_(), MACHINE).least > 1e-2


def test_a_factorisation_counts_every_matrix() -> None:
    matrices = torch.eye(6, dtype=torch.complex64).expand(5, 6, 6).contiguous()
    made: list[Tensor] = [matrices]
    assert flops_of("linalg_cholesky_ex", (matrices,), made) == pytest.approx(4 * 5 * 6**3 / 3)
    assert work_of(lambda: torch.linalg.eigh(matrices), MACHINE).flops > 0


def test_the_gradient_of_a_call_is_tallied_too() -> None:
    w = torch.ones(30, 30, requires_grad=True)
    x = torch.ones(30, 30)
    forward = work_of(lambda: (x @ w).sum(), MACHINE)
    both = work_of(lambda: (x @ w).sum().backward(), MACHINE)
    assert both.flops >= forward.flops + 2 * 30**3


def test_a_real_machine_has_finite_limits_and_no_call_beats_them_by_far() -> None:
    machine = Machine.measured(torch.device("cpu"))
    assert machine.launch > 0
    assert machine.flops > 1e8
    assert machine.convolutions > 1e8
    assert min(machine.copy_rates) > 1e7
    assert machine.rate(1) == machine.copy_rates[0]
    assert machine.rate(10**12) == machine.copy_rates[-1]
