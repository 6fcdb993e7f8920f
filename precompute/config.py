"""Every setting of the commands that read preference data, documented where it is declared."""

import datetime
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import Location
from dpo_opt.schemas.settings import Settings

Truncation = Literal["keep_start", "keep_end", "drop"]
"""What happens to a pair that is longer than ``max_length``."""

WrittenForm = Literal["trl", "openai", "sharegpt", "unpaired"]
"""A format of rows that ``dpo-opt convert`` writes."""

TrainOn = Literal["all", "last", "first-difference"]
"""Which of the assistant's turns in a completion count."""


def _day(value: str) -> str:
    """A date as the fingerprint writes it."""
    if datetime.date.fromisoformat(value).isoformat() != value:
        raise ValueError("a date is written as 2026-03-31")
    return value


TemplateDate = Annotated[str, AfterValidator(_day)]
"""A day such as ``2026-03-31``."""

Share = Annotated[float, Field(gt=0, le=1)]


def _listed(value: object) -> object:
    """Accept a single source in place of a list of sources."""
    values = [value] if isinstance(value, str | Path) else value
    return [str(v) if isinstance(v, Path) else v for v in values] if isinstance(values, list) else values


Sources = Annotated[list[str], BeforeValidator(_listed)]


class DataConfig(Settings):
    """Settings of every command that reads preference data: which data, and how."""

    reads_once: ClassVar[bool] = False
    """The command takes no second look at the data, so that a Hub dataset need not be fetched for it."""

    data: Annotated[Sources, Field(min_length=1)]
    """Preference pairs: files (JSON, CSV, Parquet, Arrow), folders, globs, URLs, a Hub ORG/NAME@REVISION."""
    data_share: list[Share] = []
    """Share of the pairs used from each --data, one per --data. The pair's text decides which are used."""
    column: dict[str, str] = {}
    """Name of the column that holds a part, such as prompt=question. Repeat it for each renamed column."""
    ignore_column: list[str] = []
    """A column to read as if it were not there, such as images. Repeat it for each such column."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Malformed rows. error: stop before any work. skip: leave the rows out, count and list them."""


class WholeDataConfig(DataConfig):
    """Settings of the commands that read all of the data, on several cores."""

    processes: NonNegativeInt = 0
    """Processes that parse the data. 0: one per core, or fewer for small data."""


_OF_THE_LAUNCHER = {
    *("worker_index", "num_workers", "launcher", "gpus_per_worker", "append"),
    *("submit", "job_option", "time_limit", "ray_address"),
}

_ONLY_OF = {"slurm": {"submit", "job_option", "time_limit"}, "ray": {"ray_address"}}


class PrecomputeConfig(WholeDataConfig):
    """Settings of ``dpo-opt precompute``: score every pair once under the reference."""

    model: str
    """Reference model: a folder, or a Hub ORG/NAME@REVISION."""
    shards: Location
    """Folder for the log-probs. Running the same command again continues where it stopped."""
    append: bool = False
    """Score the rows that were added at the end of the data since the folder was made."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """Scoring engine. auto: vLLM on a GPU if it is installed, else hf (transformers; faster on a CPU)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the reference model. auto: the dtype that its checkpoint declares."""
    engine_option: list[str] = []
    """vllm: an argument of its engine, such as tensor_parallel_size=2. Repeat it for each argument."""
    max_length: PositiveInt | None = None
    """Most tokens of prompt plus completion. Default: 1024, or the model's context if that is shorter."""
    truncation: Truncation = "keep_start"
    """Longer pairs. keep_start: cut completion ends. keep_end: cut the prompt's start. drop: leave out."""
    train_on: TrainOn = "all"
    """Turns of the assistant in a completion that count. first-difference: the first that differs, alone."""
    template_date: TemplateDate | None = None
    """Day that a chat template is told which asks for it (2026-03-31). Default: the folder's, else today."""
    pairs_per_shard: PositiveInt = 1024
    """Source rows per shard file. A killed job loses at most the shard it was scoring."""
    worker_index: NonNegativeInt | None = None
    """This worker's number, from 0. Default: taken from the Slurm array or RANK, else it does all work."""
    num_workers: PositiveInt | None = None
    """Number of workers. Without --worker-index this command starts them all."""
    launcher: Literal["local", "slurm", "ray"] = "local"
    """Where the --num-workers workers run: processes on this machine, a Slurm array, or Ray."""
    gpus_per_worker: NonNegativeInt = 1
    """GPUs for each worker. local: defaults to 0 on a machine without GPUs."""
    submit: bool = False
    """slurm: also submit the job scripts instead of only writing them."""
    job_option: list[str] = []
    """slurm: an option of sbatch, such as partition=gpu. Repeat it for each option."""
    time_limit: str = "04:00:00"
    """slurm: sbatch's --time for one task. A task that reaches it is requeued."""
    ray_address: str | None = None
    """ray: address of the cluster. Default: RAY_ADDRESS, else a new cluster on this machine."""

    @property
    def launched(self) -> bool:
        """Whether this process starts workers, instead of being one."""
        return self.launcher != "local" or (self.num_workers is not None and self.worker_index is None)

    def for_workers(self) -> str:
        """These settings as YAML for a worker's ``--config``, with absolute paths.

        The launcher's own settings are left out, or each worker would launch workers again.
        """
        settings = self.model_dump(mode="json", exclude=_OF_THE_LAUNCHER, exclude_defaults=True)
        settings["shards"] = str(self.shards.absolute())
        settings["data"] = [_absolute(name) for name in self.data]
        settings["model"] = _absolute(self.model)
        return yaml.safe_dump(settings, sort_keys=False)

    @model_validator(mode="after")
    def _know_the_worker(self) -> Self:
        self._refuse_options_of_other_launchers()
        if self.launcher != "local":
            if self.worker_index is not None:
                raise ConfigError(
                    f"--worker-index is for one worker, and --launcher {self.launcher} starts all of them",
                    why="it numbers its workers itself",
                    fix="leave --worker-index out",
                )
            if self.num_workers is None:
                raise ConfigError(
                    f"--launcher {self.launcher} needs --num-workers",
                    why="nothing else says how many workers to start",
                    fix="pass --num-workers",
                )
        elif self.worker_index is not None and self.num_workers is None:
            raise ConfigError(
                "--worker-index needs --num-workers",
                why="a worker begins with its share of the shards",
                fix="pass --num-workers",
            )
        if self.num_workers is not None and (self.worker_index or 0) >= self.num_workers:
            raise ConfigError(
                f"--worker-index {self.worker_index} is not below --num-workers {self.num_workers}",
                why="workers are numbered from 0",
                fix=f"pass a --worker-index from 0 to {self.num_workers - 1}",
            )
        return self

    def _refuse_options_of_other_launchers(self) -> None:
        for launcher, names in _ONLY_OF.items():
            for name in names & self.model_fields_set if launcher != self.launcher else ():
                if getattr(self, name) != type(self).model_fields[name].get_default(
                    call_default_factory=True
                ):
                    option = f"--{name.replace('_', '-')}"
                    raise ConfigError(
                        f"{option} is an option of --launcher {launcher}",
                        why=f"with --launcher {self.launcher} it would have no effect",
                        # A launcher that was named explicitly is the one that is meant.
                        fix=f"leave {option} out"
                        if "launcher" in self.model_fields_set
                        else f"pass --launcher {launcher}",
                    )


def _absolute(name: str) -> str:
    """A path or a pattern of paths from any folder; what names nothing here is a URL or on the Hub."""
    if "://" in name:
        return name
    path = Path(name).expanduser().absolute()
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return str(path) if path.exists() or next(matches, None) is not None else name


def leave_to_the_folder(config: Settings, *names: str) -> None:
    """Refuse settings that a folder of shards answers, beside ``shards``.

    Raises:
        ConfigError: One of them is given too.
    """
    given = [name for name in names if name in config.model_fields_set and getattr(config, name) is not None]
    if "shards" in config.model_fields_set and getattr(config, "shards", None) is not None and given:
        option = f"--{given[0].replace('_', '-')}"
        raise ConfigError(
            f"{option} is given beside --shards",
            why="the folder says it, and what is shown is to be what the folder holds",
            fix=f"leave {option} out, or --shards",
        )


class CheckConfig(WholeDataConfig):
    """Settings of ``dpo-opt check``: find what is wrong with the data before it costs GPU time."""

    reads_once = True

    model: str | None = None
    """Count in this model's tokens and forecast truncation, disk and GPU hours. Default: count characters."""
    eval_data: Sources = []
    """Evaluation data. Its prompts should not also be in DATA."""
    shards: Location | None = None
    """Reference log-probs of this data, if there are any: also report how the reference ranks the pairs."""
    max_length: PositiveInt | None = None
    """Most tokens per pair, for the forecast. Default: 1024, or the model's context if that is shorter."""
    truncation: Truncation = "keep_start"
    """What the forecast assumes happens to longer pairs (see precompute --truncation)."""
    train_on: TrainOn = "all"
    """Turns of the assistant in a completion that count (see precompute --train-on)."""
    template_date: TemplateDate | None = None
    """Day that a chat template is told which asks for it. Default: that of --shards, else today."""
    pairs_per_shard: PositiveInt = 1024
    """Source rows per shard file, for the forecast."""
    near_duplicates: bool = False
    """Also look for pairs that nearly repeat another pair (MinHash)."""
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Estimated Jaccard similarity from which two pairs count as nearly the same."""
    html: Path | None = None
    """Also write the result as one self-contained HTML page."""

    @model_validator(mode="after")
    def _leave_the_date_to_the_folder(self) -> Self:
        leave_to_the_folder(self, "template_date")
        return self


class PreviewConfig(DataConfig):
    """Settings of ``dpo-opt preview``: show pairs as the model will see them."""

    reads_once = True

    model: str
    """Model whose tokenizer and chat template are used."""
    pairs: PositiveInt = 3
    """How many pairs to show."""
    start: NonNegativeInt = 0
    """First row to show, counted from 0."""
    max_length: PositiveInt | None = None
    """Most tokens of prompt plus completion. Default: 1024, or the model's context if that is shorter."""
    truncation: Truncation = "keep_start"
    """What happens to a longer pair (see precompute --truncation)."""
    train_on: TrainOn = "all"
    """Turns of the assistant in a completion that count (see precompute --train-on)."""
    template_date: TemplateDate | None = None
    """Day that a chat template is told which asks for it, as 2026-03-31. Default: today."""
    shards: Location | None = None
    """Reference log-probs whose rules are taken: --max-length, --truncation, --train-on, --template-date."""

    @model_validator(mode="after")
    def _leave_the_rules_to_the_folder(self) -> Self:
        leave_to_the_folder(self, "max_length", "truncation", "train_on", "template_date")
        return self


class ConvertConfig(WholeDataConfig):
    """Settings of ``dpo-opt convert``: write a cleaned, deduplicated dataset, split by prompt."""

    output: Path
    """New folder for train.jsonl, eval.jsonl, _removed.jsonl and _convert.json."""
    to: WrittenForm = "trl"
    """Rows. trl: prompt, chosen, rejected. openai, sharegpt: theirs. unpaired: prompt, completion, label."""
    eval_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts that goes to eval.jsonl. A hash decides which ones: of a conversation that of the
    first message of the user, so that conversations that begin alike stay together."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """Malformed rows. error: stop. skip: leave the rows out and list them in _removed.jsonl."""
    near_duplicates: bool = False
    """Also remove pairs that nearly repeat an earlier pair (MinHash)."""
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Estimated Jaccard similarity from which two pairs count as nearly the same."""
