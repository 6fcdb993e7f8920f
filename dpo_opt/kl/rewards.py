"""What rates samples: a column of their table, a user's Python function, a third model's implicit reward."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.analysis.run_files import shards_of_run
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.fingerprint import TOKENIZER_FIELDS
from dpo_opt.schemas.kl_samples import read_kl_record
from dpo_opt.schemas.models import checkpoint_dtype, find_model
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.weights import weights_digest
from dpo_opt.user_function import load_user_function

if TYPE_CHECKING:
    from dpo_opt.commands.frontier import FrontierConfig


class Rater(Protocol):
    """Gives every sample of a table a number."""

    @property
    def name(self) -> str:
        """What results are called by."""
        ...

    @property
    def sha256(self) -> str | None:
        """Of the file or the weights behind the numbers; None where there are none."""
        ...

    def rate(self, table: Path, *, run: Path) -> list[float]:
        """A finite number for each sample of one of a run's tables, in its order.

        Raises:
            DataError: A sample gets none.
        """
        ...


def make_rater(config: "FrontierConfig") -> Rater:
    """What the settings name.

    Raises:
        ConfigError: They name none, or several, or one that cannot be loaded.
    """
    given = {
        "--reward-column": config.reward_column,
        "--reward-function": config.reward_function,
        "--reward-model": config.reward_model,
    }
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        raise ConfigError(
            f"{' and '.join(named)} are given" if named else "no reward is named",
            why="a frontier has one reward",
            fix=f"pass one of {', '.join(given)}",
        )
    if config.reward_column is not None:
        return ColumnRater(config.reward_column)
    if config.reward_function is not None:
        return FunctionRater(config.reward_function)
    assert config.reward_model is not None
    return ModelRater(config.reward_model)


class ColumnRater:
    """Rewards that a user added to the tables as a column."""

    sha256 = None

    def __init__(self, column: str) -> None:
        self._column = column
        self.name = f"column {column}"

    def rate(self, table: Path, *, run: Path) -> list[float]:
        """See ``Rater``."""
        with arrow_file(table) as raw:
            names = pq.read_schema(raw).names
        if self._column not in names:
            raise DataError(
                f"there is no column {quoted(self._column)} (there are {', '.join(map(quoted, names))})",
                where=str(table),
                fix="add it, with a number for each sample, or pass another --reward-column",
            )
        column = _read(table, [self._column])[self._column]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise DataError(
                f"the column {quoted(self._column)} holds {column.type}, not numbers",
                where=str(table),
                fix="write it as numbers",
            )
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            raise DataError(
                f"the column {quoted(self._column)} has no finite number in row {bad[0]}",
                where=str(table),
                why="the mean of the others would be that of other samples",
                fix="give every sample a number",
            )
        return list(map(float, values))


class FunctionRater:
    """A user's function of the texts, ``FILE.py:NAME``."""

    def __init__(self, named: str) -> None:
        self._function = load_user_function(named)
        self.name = named
        self.sha256 = self._function.sha256

    def rate(self, table: Path, *, run: Path) -> list[float]:
        """See ``Rater``."""
        texts = _read(table, ["prompt", "completion"])
        if texts.num_columns < 2 or any(column.null_count for column in texts.columns):
            raise DataError(
                "the table has no texts: an earlier version wrote it",
                where=str(table),
                why="a function rates texts",
                fix=f"rm {quoted(table)}, then measure it again with `dpo-opt kl`",
            )
        return self._function(texts["prompt"].to_pylist(), texts["completion"].to_pylist())


class ModelRater:
    """A third model's implicit reward: its log-prob of a completion less the reference's, in nats.

    It is the reward that the model is optimal for, divided by its beta and up to a number that depends on the
    prompt alone (Rafailov et al., arXiv 2305.18290, equation 5).
    """

    def __init__(self, model: str) -> None:
        self._folder = find_model(model)
        self.name = f"log-ratio of {model}"
        self.sha256 = weights_digest(self._folder)

    def rate(self, table: Path, *, run: Path) -> list[float]:
        """See ``Rater``.

        Raises:
            FingerprintError: The model has another tokenizer than the run: the ids mean other texts to it.
        """
        from dpo_opt.optimize.identity import require_same_model
        from dpo_opt.optimize.transformers_scorer import HfScorer

        require_same_model(
            ShardFolder.open(shards_of_run(run)),
            self._folder,
            fields=TOKENIZER_FIELDS,
            fix="pass a --reward-model with the run's tokenizer, or rate texts with --reward-function",
        )
        columns = _read(table, ["prompt_ids", "completion_ids", "ref_token_logps"]).to_pylist()
        sequences = [
            TokenSequence(np.array(row["prompt_ids"], np.int32), np.array(row["completion_ids"], np.int32))
            for row in columns
        ]
        record = read_kl_record(table)
        dtype = checkpoint_dtype(self._folder) if record is None else record.dtype
        logps = HfScorer(self._folder, dtype=dtype).token_logps(sequences)
        return [
            float(own.sum(dtype=np.float64) - np.sum(row["ref_token_logps"], dtype=np.float64))
            for own, row in zip(logps, columns, strict=True)
        ]


def _read(table: Path, columns: list[str]) -> pa.Table:
    with arrow_file(table) as raw, pq.ParquetFile(raw) as file:
        return file.read(columns=columns)
