"""Lower bound on the time of a call's operations on this machine.

Every operation that PyTorch dispatches must at least be launched, move its operands and results
through memory, and do its arithmetic. With the machine's rates measured in the same process, the
largest of the three is the operation's bound, and the sum over the operations is the call's: a
roofline per operation (Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model", CACM 2009), with the launch as a third ceiling.

The bound holds for the operations as written. Fusing them could go below it.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPY_BYTES = [2**k for k in range(16, 29, 2)]  # 64 KiB to 256 MiB: from the caches to memory
_MATRICES = (256, 512, 1024, 2048)  # sizes of the matrix products that measure the arithmetic rate
_CHANNELS = (16, 64, 128)  # of the convolutions that measure it
_LAUNCHES = 2000
_COMPLEX_MULTIPLY_ADD = 4  # real multiply-adds per complex one
_ELEMENTS = 2**16  # length of the vectors that measure functions, which stay in the cache
# fmt: off
_FUNCTIONS = {
    "atan2", "cos", "erf", "exp", "expm1", "gelu", "gelu_backward", "log", "log1p",
    "log_sigmoid_forward", "logsumexp", "pow", "polar", "reciprocal", "rsqrt", "sigmoid",
    "sigmoid_backward", "sin", "softplus", "softplus_backward", "sqrt", "tanh", "_log_softmax",
    "_softmax",
}
_DRAWS = {"bernoulli_", "exponential_", "multinomial", "normal_", "rand", "randn", "uniform_"}
# fmt: on


@dataclass(frozen=True)
class Machine:
    """Measured peak rates of this machine."""

    launch: float  # [s] of the smallest operation
    copy_bytes: list[int]  # sizes of operands and results together
    copy_rates: list[float]  # [byte/s] at these sizes
    flops: float  # [1/s] real operations in products of float32 and complex64 matrices
    convolutions: float  # [1/s] the same in convolutions of float32 images
    functions: float  # [1/s] cosines of float32
    draws: float  # [1/s] normal numbers of float32

    @classmethod
    def measured(cls, device: torch.device) -> Machine:
        """Measure with the current number of threads."""
        launch = _launch(device)
        rates = [_copy_rate(size, launch, device) for size in _COPY_BYTES]
        flops, convolutions = _flops(device), _convolution_flops(device)
        generator = torch.Generator(device).manual_seed(0)
        functions = _element_rate(lambda x: x.cos(), launch, device)
        draws = _element_rate(lambda x: x.normal_(generator=generator), launch, device)
        return cls(launch, _COPY_BYTES, rates, flops, convolutions, functions, draws)

    def rate(self, n_bytes: int) -> float:
        """Bytes per second of an operation that touches ``n_bytes``."""
        index = min(bisect_left(self.copy_bytes, n_bytes), len(self.copy_bytes) - 1)
        return self.copy_rates[index]


@dataclass
class Work:
    """Work of a call's operations."""

    n_operations: int = 0
    n_bytes: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"launch latency": 0.0, "memory bandwidth": 0.0, "arithmetic": 0.0}
    )

    @property
    def bound(self) -> str:
        """The resource that accounts for most of the least time."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least(self) -> float:
        """Lower bound of the time of these operations in seconds."""
        return sum(self.seconds.values())


class _Tally(TorchDispatchMode):
    """Sums the work of all operations; views count as free."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine, self.work = machine, Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":
            self._count(name, args, given, made)
        return result

    def _count(self, name: str, args: Any, given: list[Tensor], made: list[Tensor]) -> None:
        n_bytes = sum(t.numel() * t.element_size() for t in (*given, *made))
        flops = flops_of(name, args, made)
        needs = {
            "launch latency": self.machine.launch,
            "memory bandwidth": n_bytes / self.machine.rate(n_bytes),
            "arithmetic": flops / self._rate(name) + self._element_seconds(name, made),
        }
        largest = max(needs, key=lambda need: needs[need])
        work = self.work
        work.n_operations += 1
        work.n_bytes += n_bytes
        work.flops += flops
        work.seconds[largest] += needs[largest]

    def _rate(self, name: str) -> float:
        return self.machine.convolutions if "convolution" in name else self.machine.flops

    def _element_seconds(self, name: str, made: list[Tensor]) -> float:
        """Seconds of functions and random numbers, which take many cycles per element."""
        n_elements = sum(t.numel() * (2 if t.is_complex() else 1) for t in made)
        if name in _DRAWS:
            return n_elements / self.machine.draws
        return n_elements / self.machine.functions if name.removesuffix("_") in _FUNCTIONS else 0.0


def work_of(call: Callable[[], object], machine: Machine) -> Work:
    """Operations, memory traffic and arithmetic of one call, and their least time."""
    with _Tally(machine) as tally:
        call()
    return tally.work


def flops_of(name: str, args: Any, made: list[Tensor]) -> float:
    """Real operations of one dispatched operation, with textbook counts for matrix operations.

    Everything else counts one per real number produced. Source of the counts: Golub and Van Loan,
    "Matrix computations", 4th ed. 2013.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not made or not tensors:
        return 0.0
    out = made[0]
    factor = _COMPLEX_MULTIPLY_ADD if any(t.is_complex() for t in tensors) else 1
    if name in ("mm", "bmm"):
        return 2.0 * factor * out.numel() * tensors[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2.0 * factor * out.numel() * tensors[1].shape[-1]
    if name == "convolution":
        weight = tensors[1]
        return 2.0 * factor * out.numel() * math.prod(weight.shape[1:])
    if name == "convolution_backward":  # for the image and for the weights, each as much as forward
        output, _, weight = tensors[:3]
        n_products = sum(gradient.ndim > 1 for gradient in made)
        return 2.0 * factor * output.numel() * math.prod(weight.shape[1:]) * n_products
    n = tensors[0].shape[-1] if tensors[0].ndim else 1
    n_matrices = tensors[0].numel() / max(1, n * n)
    if name in ("linalg_cholesky_ex", "cholesky"):
        return factor * n_matrices * n**3 / 3
    if name == "_linalg_eigh":
        return factor * n_matrices * 9 * n**3
    if name in ("linalg_solve_triangular", "triangular_solve"):
        return factor * out.numel() * n
    if name == "_linalg_svd":
        rows, columns = sorted(tensors[0].shape[-2:], reverse=True)
        n_matrices = tensors[0].numel() / max(1, rows * columns)
        return factor * n_matrices * (14 * rows * columns**2 + 8 * columns**3)
    return float(sum(t.numel() * (2 if t.is_complex() else 1) for t in made))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    call()
    synchronize(device)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _launch(device: torch.device) -> float:
    small = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1.0)

    return _median_seconds(many, device, 9) / _LAUNCHES


def _copy_rate(n_bytes: int, launch: float, device: torch.device) -> float:
    """Copy rate for operand and result of ``n_bytes`` together, without the launch time."""
    source = torch.ones(n_bytes // 8, device=device)
    target = torch.empty_like(source)
    repeats = max(1, 2**24 // n_bytes)

    def many() -> None:
        for _ in range(repeats):
            target.copy_(source)

    each = _median_seconds(many, device, 7) / repeats
    # A copy shorter than a launch is hidden by it; half the measured time is then used instead.
    return n_bytes / max(each - launch, 0.5 * each)


def _element_rate(
    function: Callable[[Tensor], Tensor], launch: float, device: torch.device
) -> float:
    """Elements per second of an element-wise function."""
    x = torch.linspace(0.1, 6.0, _ELEMENTS, device=device)

    def many() -> None:
        for _ in range(64):
            function(x)

    each = _median_seconds(many, device, 7) / 64
    return _ELEMENTS / max(each - launch, 0.5 * each)


def _flops(device: torch.device) -> float:
    """Best rate of products of several sizes, since no size is the fastest on every machine."""
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for dtype, factor in ((torch.float32, 1), (torch.complex64, _COMPLEX_MULTIPLY_ADD)):
        for n in _MATRICES:
            a, b = (
                torch.randn((n, n), dtype=dtype, device=device, generator=generator)
                for _ in range(2)
            )
            seconds = _median_seconds(partial(torch.matmul, a, b), device, 5)
            best = max(best, 2.0 * factor * n**3 / seconds)
    return best


def _convolution_flops(device: torch.device) -> float:
    """Best rate of 3 x 3 convolutions of several widths, whose kernels differ from products."""
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for width in _CHANNELS:
        image = torch.randn((16, width, 32, 16), device=device, generator=generator)
        weight = torch.randn((width, width, 3, 3), device=device, generator=generator)
        call = partial(torch.nn.functional.conv2d, image, weight, padding=1)
        seconds = _median_seconds(call, device, 5)
        best = max(best, 2.0 * image.numel() * 9 * width / seconds)
    return best
