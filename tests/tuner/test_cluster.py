from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tuner.clusters import ray_head
from tests.tuner.support import environment

ROOT = Path(__file__).resolve().parents[2]
# Its arguments: none, or the address that a user names.
CHOICE = """
import sys
from tuner.cluster import _choose
from tuner.errors import StudyError
try:
    print("chosen:", _choose(*sys.argv[1:] or [None])[0])
except StudyError as error:
    print("refused:", error)
"""


@pytest.mark.long
def test_a_cluster_that_asks_for_a_token_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4, encoding="utf-8")
    (tmp_path / "ray").mkdir()
    keys = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with ray_head("--num-cpus=1", **keys) as head:
        # What `ray start --head` leaves on a machine of one's own.
        (tmp_path / "ray" / "ray_current_cluster").write_text(head.address, encoding="utf-8")

        def choice(*asked: str, **extra: str) -> str:
            return subprocess.check_output(
                [sys.executable, "-c", CHOICE, *asked],
                cwd=ROOT,
                env=environment(RAY_TMPDIR=str(tmp_path), **extra),
                text=True,
            ).strip()

        said = choice()
        assert said.startswith(f"refused: the Ray cluster at {head.address} asks for a token")
        assert "export RAY_AUTH_MODE=token" in said
        assert choice("local") == "chosen: None"
        assert choice(**keys) == f"chosen: {head.address}"
        token.write_text("f" * 64, encoding="utf-8")  # another cluster's
        assert "asks for a token" in choice(**keys)
    assert choice() == "chosen: None", "a head that is gone is none"
