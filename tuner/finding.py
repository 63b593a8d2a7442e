"""How far the search for candidates has come, which a first epoch waits for."""

from __future__ import annotations

from model.data import CHUNK
from model.front_end import CandidateSearch, default_cache
from tuner.config import StudyConfig

#: A file's time is that of the kernel's last tick, up to 10 ms before the clock's (CONFIG_HZ=100):
#: a file that was written after ``since`` may bear a time just before it. Seconds.
_TICK = 0.02


def candidates_found(study: StudyConfig, since: float) -> tuple[int, int] | None:
    """Simulated scenes whose candidates were found since a time, and all of a first epoch.

    Told by the files that trials of this machine keep them in, a file a chunk: those of another
    study that runs at the same time count too, those that were kept before do not.

    Args:
        study: whose trials look for candidates.
        since: Unix time.

    Returns:
        None where no file has come since, or none would: the family has no candidates, or scenes
        are recorded ones.
    """
    data = study.data
    if study.network.front_end is None or data.shards is not None:
        return None
    sizes = [
        min(CHUNK, count - start)
        for count in (data.val_scenes, data.train_scenes)
        for start in range(0, count, CHUNK)
    ]
    try:
        folder = (data.cache or default_cache()) / CandidateSearch.folder
        files = [*folder.glob("*.safetensors")]
        n_new = sum(path.stat().st_mtime >= since - _TICK for path in files)
    except OSError:  # somebody clears the folder
        return None
    return (sum(sizes[:n_new]), sum(sizes)) if n_new else None
