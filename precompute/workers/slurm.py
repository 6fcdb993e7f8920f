"""Workers as a Slurm array: writes the scripts. Slurm queues, places, restarts and accounts for the workers.

Any worker may be killed at any moment, so a script does little. It passes Slurm's warning on to its worker,
and asks to be run again if the worker stopped because of the warning.
"""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import read_all
from dpo_opt.schemas.manifest import COMMITS, SLURM
from dpo_opt.schemas.storage import write_text

_JOB = "job"
"""The file that holds the id of the array that was submitted last."""
_NOTICE = 120
"""Seconds between the warning and the time limit: time for a running kernel and then for Python to end."""

_OURS = {
    "array": "pass --num-workers",
    "time": "pass --time-limit",
    "dependency": "submit with `sbatch --dependency`: run without --submit to see the commands",
    **dict.fromkeys(("output", "error", "open-mode"), "read the logs in SHARDS/slurm/logs"),
    **dict.fromkeys(("signal", "ntasks", "parsable", "wrap"), "leave it out"),
}
"""Options that the scripts depend on, and what to do instead of setting them."""

# As sbatch spells it: minutes, minutes:seconds, hours:minutes:seconds, and each after days-.
_TIME = re.compile(
    r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?|((?P<h>\d+):(?=\d+:))?(?P<m>\d+)(:(?P<s>\d+))?",
    re.ASCII,
)

# bash runs a trap while it waits for a job in the background, and only later for one in the foreground.
# A worker that is still importing has no handler yet and dies of the signal: above 128, as good as 75.
# The job id of one of the tasks is the array's too, and `scontrol requeue` would take it for the whole array.
# Some sites send the same warning before they preempt, so only a late one says that the time was too short.
_BODY = """\
set -u
task=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
worker= told=
finished() { ls "$commits" 2>/dev/null | wc -l; }
pass_on() { told=$1; [ -z "$worker" ] || kill -s "$1" "$worker" 2>/dev/null; }
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
before=$(finished)

"${command[@]}" &
worker=$!
# The signal may have come before there was anybody to pass it on to.
[ -z "$told" ] || kill -s "$told" "$worker" 2>/dev/null
while wait "$worker"; code=$?; kill -0 "$worker" 2>/dev/null; do :; done

if [ "$code" -ne 75 ] && { [ -z "$told" ] || [ "$code" -le 128 ]; }; then
    exit "$code"
fi
if [ "$told" = USR1 ] && [ "$SECONDS" -ge "$enough" ] && [ "$(finished)" -le "$before" ]; then
    echo "error: no shard was finished within the time limit of $limit; the task is not repeated" >&2
    echo "  fix: a longer --time-limit, or another --shards folder with fewer --pairs-per-shard" >&2
    exit 75
fi
# A task in another state was cancelled, and shall end, or requeued, and needs no help.
if [ "$(squeue --noheader --jobs="$task" --format=%T)" = RUNNING ]; then
    scontrol requeue "$task"
fi
exit 75
"""


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
    sbatch = shutil.which("sbatch")
    if config.submit and sbatch is None:
        raise ConfigError(
            "there is no sbatch here",
            why="--submit hands the jobs to Slurm",
            fix="run the same command where Slurm is installed, such as a login node, or leave out --submit",
        )
    if config.submit:
        _require_no_job(shards_dir)
    score, finalize = shards_dir / SLURM / "score.sbatch", shards_dir / SLURM / "finalize.sbatch"
    # The name holds their hash, so that tasks of an earlier launch keep their own settings.
    settings_text = config.for_workers()
    digest = hashlib.sha256(settings_text.encode()).hexdigest()
    settings = shards_dir / SLURM / f"settings-{digest[:8]}.yaml"
    score_text, finalize_text = (
        _score_script(config, shards_dir, settings),
        _finalize_script(config, shards_dir),
    )
    (shards_dir / SLURM / "logs").mkdir(parents=True, exist_ok=True)
    write_text(settings, settings_text)
    write_text(score, score_text)
    write_text(finalize, finalize_text)
    if not config.submit or sbatch is None:
        # --parsable may print ID;CLUSTER.
        commands = [
            f"array=$(sbatch --parsable {shlex.quote(str(score))})",
            f'sbatch --dependency="afterany:${{array%%;*}}" {shlex.quote(str(finalize))}',
        ]
        return {"submitted": False, "commands": commands}
    array = _submit(sbatch, str(score), fix="change the option that sbatch names and run the same again")
    write_text(shards_dir / SLURM / _JOB, f"{array}\n")
    last = _submit(
        sbatch,
        f"--dependency=afterany:{array}",
        str(finalize),
        fix=f"the workers are submitted as job {array}; when they are done, "
        f"`dpo-opt finalize --shards {quoted(config.shards)}`",
    )
    logs = str(shards_dir / SLURM / "logs")
    return {"submitted": True, "array_job": array, "finalize_job": last, "logs": logs}


def _require_no_job(shards_dir: Path) -> None:
    """Refuse a second array on one folder while the first is queued or runs.

    Raises:
        ConfigError: It is.
    """
    squeue = shutil.which("squeue")
    jobs = read_all(shards_dir / SLURM, [_JOB])
    if squeue is None or not jobs:
        return
    job = jobs[_JOB].decode().strip()
    # squeue forgets an ended job after a while, and then fails; so an error means nothing here.
    asked = [squeue, "--noheader", f"--jobs={job}", "--format=%T"]
    states = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    if states:
        raise ConfigError(
            f"job {job} of this folder is there already ({', '.join(sorted(set(states)))})",
            where=str(shards_dir),
            why="two arrays would wait for each other's shards on twice the machines",
            fix=f"let it end, or `scancel {job}` and run the same command again",
        )


def _score_script(config: PrecomputeConfig, shards_dir: Path, settings: Path) -> str:
    options = _job_options(config.job_option)
    seconds = _seconds(config.time_limit)
    notice = min(_NOTICE, seconds // 2)
    own = {
        "job-name": "dpo-opt-score",
        "array": f"0-{(config.num_workers or 1) - 1}",
        "time": config.time_limit,
        # B: the signal goes to the script only, which then knows that the warning came.
        "signal": f"B:USR1@{notice}",
    }
    # A job option that names the kind of GPU also gives their number.
    if config.gpus_per_worker and not any(_is_about_gpus(name) for name in options):
        own["gres"] = f"gpu:{config.gpus_per_worker}"
    return "\n".join(
        [
            *_head(own, options, shards_dir, log="score-%A_%a.log"),
            f"command=({_python('precompute', '--config', str(settings))})",
            f"commits={shlex.quote(str(shards_dir / COMMITS))}",
            # Slurm may warn a minute early, and its clock starts before the script does.
            f"limit={shlex.quote(config.time_limit)} enough={max(0, seconds - notice - 120)}",
            _BODY,
        ]
    )


def _finalize_script(config: PrecomputeConfig, shards_dir: Path) -> str:
    # Account, partition and memory are those of the workers. It scores nothing, so it needs no GPU.
    options = {n: v for n, v in _job_options(config.job_option).items() if not _is_about_gpus(n)}
    return "\n".join(
        [
            *_head(
                {"job-name": "dpo-opt-finalize", "time": config.time_limit},
                options,
                shards_dir,
                log="finalize-%j.log",
            ),
            f"exec {_python('finalize', '--shards', str(shards_dir))}\n",
        ]
    )


def _head(own: dict[str, str], options: dict[str, str], shards_dir: Path, *, log: str) -> list[str]:
    """The lines that sbatch reads.

    Raises:
        ConfigError: The folder's name cannot stand in one of them.
    """
    folder = str(shards_dir / SLURM / "logs")
    # A backslash would switch off the placeholders that give every task its own log.
    if not folder.isprintable() or "\\" in folder:
        raise ConfigError(
            f"the folder {str(shards_dir)!r} cannot be named in a Slurm script",
            fix="pass --shards with a path of letters, digits and punctuation other than a backslash",
        )
    # append: a task that is run again continues its log.
    log = f"{folder.replace('%', '%%')}/{log}"
    settings = {**own, "ntasks": "1", "open-mode": "append", "output": log, **options}
    lines = [f"#SBATCH --{name}={_quoted(value)}" for name, value in settings.items()]
    return ["#!/bin/bash", *lines, "#SBATCH --requeue", ""]


def _python(*arguments: str) -> str:
    # -P: never import modules from the folder that a job starts in.
    return shlex.join([sys.executable, "-P", "-m", "dpo_opt", *arguments])


def _job_options(given: list[str]) -> dict[str, str]:
    """Option to value.

    Raises:
        ConfigError: An option is no ``name=value``, or is one that the scripts set themselves.
    """
    options = {}
    for option in given:
        name, _, value = option.partition("=")
        if not (re.fullmatch(r"[a-z][a-z-]*", name) and value and value.isprintable()):
            raise ConfigError(
                f"--job-option {option!r} is not of the form name=value",
                why="each becomes one line of a Slurm script, #SBATCH --name=value",
                fix="for example --job-option partition=gpu",
            )
        if name in _OURS:
            raise ConfigError(f"--job-option {option!r}: the launcher sets {name} itself", fix=_OURS[name])
        options[name] = value
    return options


def _is_about_gpus(name: str) -> bool:
    return "gpu" in name or name in ("gres", "tres-per-task")


def _quoted(value: str) -> str:
    """A value as sbatch reads it: unlike a shell, it takes a backslash for an escape in any quotes."""
    if re.fullmatch(r"[\w./:,=%+@-]*", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _seconds(time_limit: str) -> int:
    """How long a time limit is.

    Raises:
        ConfigError: It is not one that ends.
    """
    match = _TIME.fullmatch(time_limit)
    parts = {name: int(value or 0) for name, value in match.groupdict().items()} if match else {}
    seconds = sum(
        number * {"d": 86400, "h": 3600, "m": 60, "s": 1}[name[-1]] for name, number in parts.items()
    )
    if seconds == 0:
        raise ConfigError(
            f"--time-limit {time_limit!r} is no time limit of sbatch",
            why="a task is warned before its limit, and goes on after a restart",
            fix="for example --time-limit 04:00:00, or 1-12:00:00 for one and a half days",
        )
    return seconds


def _submit(sbatch: str, *arguments: str, fix: str) -> str:
    """The id of the job.

    Raises:
        ConfigError: sbatch refuses; what it says is in the message.
    """
    done = subprocess.run([sbatch, "--parsable", *arguments], capture_output=True, text=True, check=False)
    # ID, or ID;CLUSTER, after whatever the site has sbatch say.
    job = (done.stdout.split() or [""])[-1].partition(";")[0]
    if done.returncode != 0 or not job.isdecimal():
        said = " ".join((done.stderr or done.stdout).replace("sbatch: error:", "").split())
        raise ConfigError(
            f"sbatch refused the job (exit code {done.returncode}): {said}", where=arguments[-1], fix=fix
        )
    return job
