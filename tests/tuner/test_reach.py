"""A storage that not all machines see is told before a trial starts."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import ray

from tests.tuner.clusters import STORE, ray_head, ray_start, started
from tests.tuner.support import run, write_study
from tuner.checkpoints import Storage
from tuner.cluster import connected
from tuner.errors import StudyError
from tuner.reach import check_data_reach, check_reach

pytestmark = pytest.mark.long


def test_a_storage_that_cannot_be_written_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cannot write to gopher://there/runs: .*Unrecognized"):
        check_reach(Storage("gopher://there/runs", "run"), 1, 0)
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"resources\.storage: cannot write to .*/file/runs"):
        check_reach(Storage(f"{tmp_path}/file/runs", "run"), 1, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_does_not_see_the_run_folder_is_named_before_a_trial_starts(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    (runs / "data").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    # A machine of its own as far as this folder goes: a mount that only this node has.
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {runs} && exec "$@"', "sh"]
    tried = subprocess.run([*apart, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a mount of one's own is not permitted here: {tried.stderr.strip()}")
    config = write_study(tmp_path, search={"trials": 1})
    resources = ("--num-cpus=1", "--num-gpus=0", f"--object-store-memory={STORE}")
    with ray_head("--num-cpus=1") as head:
        asked = ("--config", config, "--address", head.address)
        node = ray_start(f"--address={head.address}", *resources)
        with started([*apart, *node], "Ray runtime started", RISTUNE_MARK=head.mark):
            refused = run(*asked, "--out", runs / "run", timeout=300)
            assert refused.returncode == 2, refused.stdout + refused.stderr
            (line,) = refused.stderr.splitlines()
            assert f"resources.storage: {runs}/run is not seen by " in line
            assert f"is not seen by {platform.node()} (" in line
            assert " and " not in line.partition(";")[0], "the head sees it"
            assert not (runs / "run" / "config.yaml").exists(), "the folder is still free"
            with connected(head.address):
                check_reach(Storage(str(tmp_path), "elsewhere"), 1, 0)
                check_reach(Storage(str(runs), "run"), cpus=2, gpus=0)  # no node takes that
                here, sizes = f"{platform.node()} (", {"cpus": 1, "gpus": 0}
                with pytest.raises(
                    StudyError, match=r"data\.shards \(--data\): .*/runs/data"
                ) as lacks:
                    check_data_reach(runs / "data", **sizes)
                assert str(lacks.value).count(here) == 1
                check_data_reach(tmp_path / "data", **sizes)
                with pytest.raises(StudyError) as gone:
                    check_data_reach(tmp_path / "gone", **sizes)
                assert str(gone.value).count(here) == 2
                assert len(ray.nodes()) == 2
        seen = run(*asked, "--out", runs / "run", timeout=300)
        assert seen.returncode == 0, seen.stdout + seen.stderr
