"""Slurm's part of a launch: the script of an array, that of a job behind it, and their submission.

Any task may be killed at any moment, so a script does little. It passes Slurm's warning on to its program,
and asks to be run again if the program stopped because of the warning.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import read_all
from dpo_opt.schemas.storage import write_text

_JOB = "job"
"""The file that holds the id of the array that was submitted last."""
_NOTICE = 120
"""Seconds between the warning and the time limit: time for a running kernel and then for Python to end."""

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
finished() { ls "$results" 2>/dev/null | cksum; }
pass_on() { told=$1; [ -z "$worker" ] || kill -s "${warning:-$1}" "$worker" 2>/dev/null; }
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
before=$(finished)

"${command[@]}" &
worker=$!
# The signal may have come before there was anybody to pass it on to.
[ -z "$told" ] || kill -s "${warning:-$told}" "$worker" 2>/dev/null
while wait "$worker"; code=$?; kill -0 "$worker" 2>/dev/null; do :; done

if [ "$code" -ne 75 ] && { [ -z "$told" ] || [ "$code" -le 128 ]; }; then
    exit "$code"
fi
if [ "$told" = USR1 ] && [ "$SECONDS" -ge "$enough" ] && [ "$(finished)" = "$before" ]; then
    echo "error: no $result was finished within the time limit of $limit; the task is not repeated" >&2
    echo "  fix: $remedy" >&2
    exit 75
fi
# A task in another state was cancelled, and shall end, or requeued, and needs no help.
if [ "$(squeue --noheader --jobs="$task" --format=%T)" = RUNNING ]; then
    scontrol requeue "$task"
fi
exit 75
"""


class Jobs(NamedTuple):
    """The jobs of a launch."""

    folder: Path
    """Of their scripts and logs, absolute. What they work on is the folder around it."""
    time_limit: str
    """As sbatch takes it, for one task."""
    job_option: Sequence[str]
    """The user's own options of sbatch, each ``name=value``."""
    taken: Mapping[str, str]
    """From ``set_by_scripts``."""
    option: str
    """The option that names the folder around."""
    twice: str
    """Why a second array on that folder is refused."""


class Program(NamedTuple):
    """What a task runs."""

    lines: Sequence[str]
    """Lines of bash that set ``command``, and ``results``: a folder in which finished work appears."""
    result: str
    """What a piece of finished work is called."""
    remedy: str
    """What helps where none was finished within the time limit."""


def set_by_scripts(*, array: str, logs: str) -> dict[str, str]:
    """Options of sbatch that the scripts depend on, and what to do instead of setting them.

    Args:
        array: What to do for the number of tasks.
        logs: Where the logs are.
    """
    return {
        "array": array,
        "time": "pass --time-limit",
        "dependency": "submit with `sbatch --dependency`: run without --submit to see the commands",
        **dict.fromkeys(("output", "error", "open-mode"), f"read the logs in {logs}"),
        **dict.fromkeys(("signal", "ntasks", "parsable", "wrap"), "leave it out"),
    }


def require_submittable(jobs: Jobs) -> None:
    """Check that Slurm is here, and that no array is at work on the folder.

    Raises:
        ConfigError: It is not, or one is.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch here",
            why="--submit hands the jobs to Slurm",
            fix="run the same command where Slurm is installed, such as a login node, or leave out --submit",
        )
    require_no_array(jobs.folder, why=jobs.twice)


def require_no_array(folder: Path, *, why: str) -> None:
    """Refuse to go on while an array that was submitted from this folder is queued or runs.

    Args:
        folder: As in ``Jobs``.
        why: What would come of it.

    Raises:
        ConfigError: It is.
    """
    squeue = shutil.which("squeue")
    jobs = read_all(folder, [_JOB])
    if squeue is None or not jobs:
        return
    job = jobs[_JOB].decode().strip()
    # squeue forgets an ended job after a while, and then fails; so an error means nothing here.
    asked = [squeue, "--noheader", f"--jobs={job}", "--format=%T"]
    states = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    if states:
        raise ConfigError(
            f"job {job} of this folder is there already ({', '.join(sorted(set(states)))})",
            where=str(folder.parent),
            why=why,
            fix=f"let it end, or `scancel {job}` and run the same command again",
        )


def array_script(
    jobs: Jobs, name: str, program: Program, *, array: str, gpus: int, processes: int = 1
) -> str:
    """The script of an array.

    Args:
        jobs: Whose array it is.
        name: Of the job, behind ``dpo-opt-``, and of its logs.
        program: What each task runs.
        array: Numbers of the tasks, as sbatch takes them.
        gpus: Of each task. A job option that names the kind of GPU also gives their number.
        processes: Of each task.

    Raises:
        ConfigError: An option, the time limit or the folder cannot stand in a script.
    """
    options = _job_options(jobs)
    seconds = _seconds(jobs.time_limit)
    notice = min(_NOTICE, seconds // 2)
    own = {
        "job-name": f"dpo-opt-{name}",
        "array": array,
        "time": jobs.time_limit,
        # B: the signal goes to the script only, which then knows that the warning came.
        "signal": f"B:USR1@{notice}",
        "ntasks": str(processes),
    }
    if gpus and not any(_is_about_gpus(option) for option in options):
        own["gres"] = f"gpu:{gpus}"
    return "\n".join(
        [
            *_head(own, options, jobs, log=f"{name}-%A_%a.log"),
            *program.lines,
            f"result={shlex.quote(program.result)} remedy={shlex.quote(program.remedy)}",
            # Slurm may warn a minute early, and its clock starts before the script does.
            f"limit={shlex.quote(jobs.time_limit)} enough={max(0, seconds - notice - 120)}",
            _BODY,
        ]
    )


def last_script(jobs: Jobs, name: str, command: str) -> str:
    """The script of the job behind the array. It trains and scores nothing, so it needs no GPU.

    Raises:
        ConfigError: See ``array_script``.
    """
    # Account, partition and memory are those of the tasks.
    options = {n: v for n, v in _job_options(jobs).items() if not _is_about_gpus(n)}
    own = {"job-name": f"dpo-opt-{name}", "time": jobs.time_limit, "ntasks": "1"}
    return "\n".join([*_head(own, options, jobs, log=f"{name}-%j.log"), f"exec {command}\n"])


def hand_over(
    jobs: Jobs,
    scripts: Mapping[str, str],
    *,
    submit: bool,
    without_last: str,
    beside: Mapping[Path, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write the scripts, and submit them if asked.

    Args:
        jobs: Whose scripts they are.
        scripts: Name to text: of the array, then of the job behind it.
        beside: Other files that the tasks read.
        submit: Whether to submit them too.
        without_last: What to do where the array was submitted, and sbatch refuses the job behind it.

    Returns:
        ``submitted``, and the job ids ``array_job`` and ``NAME_job``, or the ``commands`` to run.

    Raises:
        ConfigError: sbatch refuses.
    """
    (jobs.folder / "logs").mkdir(parents=True, exist_ok=True)
    files = [jobs.folder / f"{name}.sbatch" for name in scripts]
    for file, text in [*beside.items(), *zip(files, scripts.values(), strict=True)]:
        write_text(file, text)
    first, last = map(str, files)
    if not submit:
        # --parsable may print ID;CLUSTER.
        commands = [
            f"array=$(sbatch --parsable {shlex.quote(first)})",
            f'sbatch --dependency="afterany:${{array%%;*}}" {shlex.quote(last)}',
        ]
        return {"submitted": False, "commands": commands}
    array = _submit(first, fix="change the option that sbatch names and run the same again")
    write_text(jobs.folder / _JOB, f"{array}\n")
    fix = f"the array is submitted as job {array}; when it is done, {without_last}"
    job = _submit(f"--dependency=afterany:{array}", last, fix=fix)
    *_, name = scripts
    return {"submitted": True, "array_job": array, f"{name}_job": job, "logs": str(jobs.folder / "logs")}


def this_python(*arguments: str) -> str:
    """The command line of ``dpo-opt`` in this environment, as bash reads it."""
    # -P: never import modules from the folder that a job starts in.
    return shlex.join([sys.executable, "-P", "-m", "dpo_opt", *arguments])


def _head(own: dict[str, str], options: dict[str, str], jobs: Jobs, *, log: str) -> list[str]:
    """The lines that sbatch reads.

    Raises:
        ConfigError: The folder's name cannot stand in one of them.
    """
    folder = str(jobs.folder / "logs")
    # A backslash would switch off the placeholders that give every task its own log.
    if not folder.isprintable() or "\\" in folder:
        raise ConfigError(
            f"the folder {str(jobs.folder.parent)!r} cannot be named in a Slurm script",
            fix=f"pass {jobs.option} with a path of letters, digits and punctuation other than a backslash",
        )
    # append: a task that is run again continues its log.
    log = f"{folder.replace('%', '%%')}/{log}"
    settings = {**own, "open-mode": "append", "output": log, **options}
    lines = [f"#SBATCH --{name}={_quoted(value)}" for name, value in settings.items()]
    return ["#!/bin/bash", *lines, "#SBATCH --requeue", ""]


def _job_options(jobs: Jobs) -> dict[str, str]:
    """Option to value.

    Raises:
        ConfigError: An option is no ``name=value``, or is one that the scripts set themselves.
    """
    options = {}
    for option in jobs.job_option:
        name, _, value = option.partition("=")
        if not (re.fullmatch(r"[a-z][a-z-]*", name) and value and value.isprintable()):
            raise ConfigError(
                f"--job-option {option!r} is not of the form name=value",
                why="each becomes one line of a Slurm script, #SBATCH --name=value",
                fix="for example --job-option partition=gpu",
            )
        if name in jobs.taken:
            what = f"--job-option {option!r}: the launcher sets {name} itself"
            raise ConfigError(what, fix=jobs.taken[name])
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


def _submit(*arguments: str, fix: str) -> str:
    """The id of the job.

    Raises:
        ConfigError: sbatch refuses; what it says is in the message.
    """
    done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    # ID, or ID;CLUSTER, after whatever the site has sbatch say.
    job = (done.stdout.split() or [""])[-1].partition(";")[0]
    if done.returncode != 0 or not job.isdecimal():
        said = " ".join((done.stderr or done.stdout).replace("sbatch: error:", "").split())
        raise ConfigError(
            f"sbatch refused the job (exit code {done.returncode}): {said}", where=arguments[-1], fix=fix
        )
    return job
