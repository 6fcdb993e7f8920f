"""Train with TRL's own DPOTrainer from reference shards: no reference model is loaded or run.

TRL 1.16 tokenizes and scores whatever dataset it is given, one that holds ids and log-probs too. So there are
two parts: a dataset with the columns that TRL would compute, and a mix-in that lets TRL keep them.

    class Trainer(ReferenceFromShards, DPOTrainer):
        pass

    trainer = Trainer(
        model=MODEL,
        args=DPOConfig(output_dir=RUN, max_length=None, precompute_ref_log_probs=True),
        train_dataset=trl_dataset(SHARDS, model=MODEL),
    )
"""

import itertools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import MANIFEST
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import UNPAIRED
from dpo_opt.schemas.sidecars import WEIGHT
from dpo_opt.schemas.storage import publish, sha256_file

if TYPE_CHECKING:
    from datasets import Dataset

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SUMS = ("ref_chosen_logps", "ref_rejected_logps")
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in _IDS] + [(name, pa.float32()) for name in _SUMS])
"""The columns that TRL's trainer reads: token ids, and each completion's reference log-prob in nats."""

_HOOKS = ("_prepare_dataset", "_precompute_ref_logps")
_ROWS_AT_ONCE = 1024


def trl_dataset(
    shards: str | AnyPath, *, model: str | Path | None = None, cache_folder: str | Path | None = None
) -> "Dataset":
    """Every pair of a finished folder, in row order, as TRL's trainer has it after its own precompute.

    The pairs are copied once into an Arrow file, a thousand rows in memory at a time, which `datasets` maps
    into memory. It is named by the manifest's hash: the next run, and the other processes of this one, use it
    again.

    Args:
        shards: Folder of reference shards.
        model: What will be trained, a folder or a Hub name: compared with what was scored.
        cache_folder: Where the Arrow file stands. Default: `dpo-opt` in the cache folder of `datasets`.

    Raises:
        ConfigError: `datasets` is not installed, there is no such model, the rows are no pairs, or part of a
            completion is context.
        DataError: The folder is not finalized, or its bytes changed.
        FingerprintError: The model is not the one that was scored.
    """
    try:
        import datasets
        from filelock import FileLock
    except ImportError as error:
        raise ConfigError("datasets is not installed", fix="pip install trl==1.16.0 datasets") from error
    folder = ShardFolder.open(location(shards))
    if folder.manifest.fingerprint.rows == UNPAIRED:
        raise ConfigError(
            "the rows of the folder have one completion and a label each",
            where=str(folder.path),
            why="TRL's DPOTrainer compares two completions of a prompt",
            fix="train with `dpo-opt train --loss-type kto`",
        )
    if model is not None:
        _require_scored(folder, model)
    if folder.has_column(WEIGHT):
        warnings.warn(
            f"{folder.path}: its pairs have weights, which TRL has no place for: all will count alike",
            stacklevel=2,
        )
    base = Path(cache_folder) if cache_folder else Path(datasets.config.HF_DATASETS_CACHE) / "dpo-opt"
    path = base.expanduser() / f"trl-{sha256_file(folder.path / MANIFEST)}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            _write(folder, path)
    return datasets.Dataset.from_file(str(path))


def _require_scored(folder: ShardFolder, model: str | Path) -> None:
    from dpo_opt.optimize.identity import require_same_model
    from dpo_opt.schemas.fingerprint import MODEL_FIELDS
    from dpo_opt.schemas.models import find_model

    require_same_model(
        folder,
        find_model(str(model)),
        fields=MODEL_FIELDS,
        fix="train what was scored, or score this one into another folder with `dpo-opt precompute`",
    )


def _write(folder: ShardFolder, path: Path) -> None:
    pairs = folder.pairs()
    with (
        publish(path) as private,
        arrow_file(private, "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as out,
    ):
        while some := list(itertools.islice(pairs, _ROWS_AT_ONCE)):
            _require_whole_completions(some, folder)
            out.write_batch(_batch(some))


def _require_whole_completions(pairs: list[ScoredPair], folder: ShardFolder) -> None:
    for pair in pairs:
        if pair.chosen_mask is not None or pair.rejected_mask is not None:
            raise ConfigError(
                f"row {pair.row} has tokens inside a completion that do not count",
                where=str(folder.path),
                why="TRL trains on every token of a completion, also on those of users and tools",
                fix="train with `dpo-opt train`, which leaves them out",
            )


def _batch(pairs: list[ScoredPair]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {name: [getattr(pair, name) for pair in pairs] for name in SCHEMA.names}, schema=SCHEMA
    )


class ReferenceFromShards:
    """Mix-in, named before ``trl.DPOTrainer``: datasets from ``trl_dataset`` are used as they are.

    Raises:
        ConfigError: The settings would cut the ids, load a reference model, or need log-probs by token.
    """

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        missing = [name for name in _HOOKS if not hasattr(super(ReferenceFromShards, cls), name)]
        if missing:
            raise ConfigError(
                f"{cls.__name__}'s trainer has no {' or '.join(missing)}",
                why="it is not TRL's DPOTrainer, or one that would tokenize and score the pairs again",
                fix="pip install trl==1.16.0, and name ReferenceFromShards before DPOTrainer",
            )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Check what TRL would tokenize."""
        from datasets import Dataset

        where = f"the {dataset_name} dataset"
        if not isinstance(dataset, Dataset) or not set(SCHEMA.names) <= set(dataset.column_names):
            raise ConfigError(
                f"it does not have the columns {', '.join(SCHEMA.names)}",
                where=where,
                why="its log-probs would have to be computed with the reference model",
                fix="pass a dataset from trl_dataset(SHARDS), or a part of it (`train_test_split`)",
            )
        if not args.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs is False",
                where="DPOConfig",
                why="TRL would load a reference model and leave the log-probs of the shards aside",
                fix="pass DPOConfig(precompute_ref_log_probs=True)",
            )
        if args.ld_alpha is not None:
            raise ConfigError(
                f"ld_alpha is {args.ld_alpha}",
                where="DPOConfig",
                why="it weighs the reference's tokens one by one, and TRL takes one sum per completion",
                fix="leave ld_alpha out, or train with `dpo-opt train`",
            )
        if args.max_length is not None and (longest := _longest(dataset)) > args.max_length:
            raise ConfigError(
                f"max_length is {args.max_length} and the longest sequence has {longest} tokens",
                where="DPOConfig",
                why="TRL would cut completions whose reference log-probs are those of the whole",
                fix="pass DPOConfig(max_length=None): the shards hold what their own --max-length left",
            )
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Nothing is left to compute."""
        this: Any = self
        # Under FSDP TRL loads one by itself, and drops it before it trains.
        if this.ref_model is not None and not this.is_fsdp_enabled:
            raise ConfigError(
                "there is a reference model",
                where="DPOTrainer",
                why="it would take memory and never be run: the shards say what it would",
                fix="leave ref_model out",
            )
        return dataset


def _longest(dataset: "Dataset") -> int:
    """Tokens of the longest sequence, a thousand rows in memory at a time."""
    longest = 0
    ids = dataset.select_columns(list(_IDS)).with_format("arrow")
    for table in ids.iter(batch_size=_ROWS_AT_ONCE):
        prompt, chosen, rejected = (pc.list_value_length(table[name]) for name in _IDS)
        sequences = pc.add(prompt, pc.max_element_wise(chosen, rejected))
        longest = max(longest, pc.max(sequences).as_py())
    return longest
