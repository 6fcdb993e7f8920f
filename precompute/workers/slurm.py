"""Workers as a Slurm array: Slurm queues, places, restarts and accounts for the workers."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.workers.slurm_scripts import (
    Jobs,
    Program,
    array_script,
    hand_over,
    last_script,
    require_submittable,
    set_by_scripts,
    this_python,
)
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.manifest import COMMITS, SLURM


def launch_array(config: PrecomputeConfig) -> dict[str, Any]:
    """Write the scripts of a planned folder: an array of workers with their settings, and ``finalize``.

    With ``config.submit``, submit them too.

    Returns:
        ``submitted``, and the job ids ``array_job`` and ``finalize_job``, or the ``commands`` to run.

    Raises:
        ConfigError: The folder is in a store, a setting cannot be written in a script, there is no sbatch, or
            sbatch refuses.
    """
    shards_dir = config.shards.absolute()
    if not isinstance(shards_dir, Path):
        raise ConfigError(
            "--launcher slurm needs a --shards folder on a shared file system",
            where=str(shards_dir),
            why="its scripts and logs stand in that folder",
            fix="pass such a folder, or submit an array of `dpo-opt precompute` with this URL yourself",
        )
    jobs = Jobs(
        folder=shards_dir / SLURM,
        time_limit=config.time_limit,
        job_option=config.job_option,
        taken=set_by_scripts(array="pass --num-workers", logs="SHARDS/slurm/logs"),
        option="--shards",
        twice="two arrays would wait for each other's shards on twice the machines",
    )
    if config.submit:
        require_submittable(jobs)
    # The name holds their hash, so that tasks of an earlier launch keep their own settings.
    settings_text = config.for_workers()
    digest = hashlib.sha256(settings_text.encode()).hexdigest()
    settings = jobs.folder / f"settings-{digest[:8]}.yaml"
    worker = Program(
        [
            f"command=({this_python('precompute', '--config', str(settings))})",
            f"results={shlex.quote(str(shards_dir / COMMITS))}",
        ],
        result="shard",
        remedy="a longer --time-limit, or another --shards folder with fewer --pairs-per-shard",
    )
    array = f"0-{(config.num_workers or 1) - 1}"
    scripts = {
        "score": array_script(jobs, "score", worker, array=array, gpus=config.gpus_per_worker),
        "finalize": last_script(jobs, "finalize", this_python("finalize", "--shards", str(shards_dir))),
    }
    return hand_over(
        jobs,
        scripts,
        beside={settings: settings_text},
        submit=config.submit,
        without_last=f"`dpo-opt finalize --shards {quoted(config.shards)}`",
    )
