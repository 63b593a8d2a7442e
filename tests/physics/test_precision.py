from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from physics import PlanarArray, steering_vector
from physics.precision import full_precision, in_full_precision

ROOT = Path(__file__).resolve().parents[2]

CUDA, CPU = "torch.backends.cuda.matmul", "torch.backends.mkldnn.matmul"

REQUESTS = {
    "precision high": "torch.set_float32_matmul_precision('high')",
    "precision medium": "torch.set_float32_matmul_precision('medium')",
    "older switch": f"{CUDA}.allow_tf32 = True",
    "newer switch": f"{CUDA}.fp32_precision = 'tf32'",
    "newer switch, CPU": f"{CPU}.fp32_precision = 'bf16'",
    "newer switch, all": "torch.backends.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
def test_trap_tf32_is_off_inside_and_as_it_was_after(request_: str) -> None:
    """In a process of its own: torch refuses a mixture of its older and newer switches."""
    script = f"""
import torch
from physics.precision import full_precision
def state():
    return {CUDA}.fp32_precision, {CPU}.fp32_precision
{request_}
before = state()
try:
    with full_precision():
        assert not {{"tf32", "bf16"}} & set(state()), state()
        with full_precision():
            assert not {{"tf32", "bf16"}} & set(state()), state()
        raise KeyError
except KeyError:
    pass
assert state() == before, (before, state())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_trap_autocast_is_off_inside_and_on_again_after() -> None:
    a = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_precision():
            assert (a @ a).dtype == torch.float32
        assert in_full_precision(torch.matmul)(a, a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_trap_steering_under_autocast_keeps_every_digit(device: torch.device) -> None:
    position = torch.tensor([[0.4, 0.2, 1.0]], device=device)
    plain = steering_vector(position, PlanarArray())
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(steering_vector(position, PlanarArray()), plain)
