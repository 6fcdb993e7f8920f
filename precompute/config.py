"""Every setting of the commands that read preference data, documented where it is declared."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import Location
from dpo_opt.schemas.settings import Settings

Truncation = Literal["keep_start", "keep_end", "drop"]
"""What happens to a pair that is longer than ``max_length``."""

Share = Annotated[float, Field(gt=0, le=1)]


def _listed(value: object) -> object:
    """One source may be given as it is."""
    values = [value] if isinstance(value, str | Path) else value
    return [str(v) if isinstance(v, Path) else v for v in values] if isinstance(values, list) else values


Sources = Annotated[list[str], BeforeValidator(_listed)]


class DataConfig(Settings):
    """Which preference data is read, and how."""

    data: Annotated[Sources, Field(min_length=1)]
    """Preference pairs: files (.jsonl, .json, .parquet), folders, globs, URLs, or a Hub ORG/NAME@REVISION."""
    data_share: list[Share] = []
    """Share of the pairs of each --data that is used, chosen by content; one per --data."""
    column: dict[str, str] = {}
    """Column that holds a part, such as prompt=question; once for every renamed column."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop everything before it begins, or be left out, counted and listed."""


class WholeDataConfig(DataConfig):
    """Reading all of it, on several cores."""

    processes: NonNegativeInt = 0
    """Processes that parse the data. 0: as many as there are cores, where there is enough to do."""


_OF_THE_LAUNCHER = {
    *("worker_index", "num_workers", "launcher", "gpus_per_worker", "append"),
    *("submit", "job_option", "time_limit", "ray_address"),
}

_ONLY_OF = {"slurm": {"submit", "job_option", "time_limit"}, "ray": {"ray_address"}}


class PrecomputeConfig(WholeDataConfig):
    """Scoring a dataset once under the reference."""

    model: str
    """Reference model: a folder, or a Hub ORG/NAME@REVISION."""
    shards: Location
    """Folder to fill; running the same command again goes on where it stopped."""
    append: bool = False
    """Score rows that were added at the end of the data, beside those that the folder already holds."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """What scores. auto: vLLM on a GPU where it is installed, else transformers (faster on CPU cores)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the reference. auto: the dtype its checkpoint declares."""
    engine_option: list[str] = []
    """vllm: an argument of its engine, such as tensor_parallel_size=2; once for each."""
    max_length: PositiveInt | None = None
    """Most tokens of prompt plus completion. Default: 1024, or the model's context if that is shorter."""
    truncation: Truncation = "keep_start"
    """What happens to a longer pair: cut the completions' ends, cut the prompt's start, or leave it out."""
    pairs_per_shard: PositiveInt = 1024
    """Source rows per shard: the unit that is lost when a job is killed."""
    worker_index: NonNegativeInt | None = None
    """This worker's number, from 0. Default: from the Slurm array or RANK, else all work is done here."""
    num_workers: PositiveInt | None = None
    """How many workers there are. Without --worker-index: how many to start."""
    launcher: Literal["local", "slurm", "ray"] = "local"
    """What runs --num-workers workers: processes of this machine, a Slurm array, or Ray."""
    gpus_per_worker: NonNegativeInt = 1
    """GPUs that each worker gets. local: where it is not given, none on a machine without GPUs."""
    submit: bool = False
    """slurm: submit the jobs, not only write them."""
    job_option: list[str] = []
    """slurm: an option of sbatch, such as partition=gpu; once for each."""
    time_limit: str = "04:00:00"
    """slurm: the longest that one task may run before it is requeued, as sbatch spells it."""
    ray_address: str | None = None
    """ray: the cluster. Default: the one in RAY_ADDRESS, else one on this machine."""

    @property
    def launched(self) -> bool:
        """Whether this process starts workers, instead of being one."""
        return self.launcher != "local" or (self.num_workers is not None and self.worker_index is None)

    def for_workers(self) -> str:
        """These settings as YAML for a worker's ``--config``, wherever it stands.

        Not who runs it, or it would launch again.
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
                        # Whoever named a launcher means that one.
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


class CheckConfig(WholeDataConfig):
    """Auditing a dataset before any GPU time."""

    model: str | None = None
    """Count in tokens of this model, and forecast truncation, disk and GPU hours; else in characters."""
    eval_data: Sources = []
    """Evaluation data, whose prompts should not stand in the training data."""
    shards: Location | None = None
    """Folder of reference shards of this data: also say how the reference itself ranks the pairs."""
    max_length: PositiveInt | None = None
    """Length for the estimates. Default: 1024, or the model's context if that is shorter."""
    truncation: Truncation = "keep_start"
    """What the truncation forecast assumes."""
    pairs_per_shard: PositiveInt = 1024
    """Source rows per shard, for the estimate."""
    near_duplicates: bool = False
    """Also look for pairs that nearly repeat another one (MinHash)."""
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Estimated Jaccard similarity from which two pairs count as nearly the same."""
    html: Path | None = None
    """Also write the result as a self-contained page."""


class PreviewConfig(DataConfig):
    """Showing pairs as the model will see them."""

    model: str
    """Model whose tokenizer and chat template are used."""
    pairs: PositiveInt = 3
    """How many pairs to show."""
    start: NonNegativeInt = 0
    """First row to show."""
    max_length: PositiveInt | None = None
    """Most tokens of prompt plus completion. Default: 1024, or the model's context if that is shorter."""
    truncation: Truncation = "keep_start"
    """What happens to a longer pair."""


class ConvertConfig(WholeDataConfig):
    """Writing a cleaned, deduplicated dataset, split by prompt."""

    output: Path
    """New folder for train.jsonl, eval.jsonl, removed.jsonl and convert.json."""
    eval_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of prompts that goes to eval.jsonl, by a hash of the prompt."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """What a malformed row does: stop everything, or be left out and listed in removed.jsonl."""
    near_duplicates: bool = False
    """Also remove pairs that nearly repeat an earlier one (MinHash)."""
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Estimated Jaccard similarity from which two pairs count as nearly the same."""
