"""Progress of the candidate search, which precedes a trial's first epoch."""

from __future__ import annotations

from model.data import CHUNK
from model.front_end import CandidateSearch, default_cache
from tuner.config import StudyConfig

#: File times have the resolution of the kernel tick, up to 10 ms behind the clock (CONFIG_HZ=100),
#: so that a file written after ``since`` may have a time just before it. Seconds.
_TICK = 0.02


def candidates_found(study: StudyConfig, since: float) -> tuple[int, int] | None:
    """Return the scenes whose candidates were found since a time, and their total in a first epoch.

    Counts the cache files that trials on this machine write, one per chunk. Files of another study
    that runs at the same time are counted too; files from before are not.

    Args:
        study: the study whose trials search for candidates.
        since: Unix time.

    Returns:
        None if no file was written since, or none will be, because the network family has no
        candidates or the scenes are recorded.
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
    except OSError:  # the folder is being cleared
        return None
    return (sum(sizes[:n_new]), sum(sizes)) if n_new else None
