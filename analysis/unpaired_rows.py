"""Folders of rows with one completion and a label: what must not be said of them, and what is not theirs."""

import polars as pl

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import Manifest, load_manifest
from dpo_opt.schemas.shards import UNPAIRED


def is_unpaired(manifest: Manifest) -> bool:
    """Whether a folder's rows have one completion and a label each."""
    return manifest.fingerprint.rows == UNPAIRED


def own_sides(shards: pl.LazyFrame) -> pl.LazyFrame:
    """Unpaired rows without the reference's log-probs of completions that answer other prompts."""
    return shards.with_columns(
        pl.when("label").then("ref_chosen_logps").alias("ref_chosen_logps"),
        pl.when(~pl.col("label")).then("ref_rejected_logps").alias("ref_rejected_logps"),
    )


def require_pairs(shards_dir: AnyPath | str, *, fix: str) -> None:
    """Refuse a folder of unpaired rows, for what compares two completions of a prompt.

    Args:
        shards_dir: The folder.
        fix: What to do instead.

    Raises:
        ConfigError: Its rows have one completion and a label each.
        DataError: The folder has no valid manifest.
    """
    if is_unpaired(load_manifest(location(shards_dir))):
        raise ConfigError(
            "the rows of the folder have one completion and a label each",
            where=str(shards_dir),
            why="how two completions of a prompt compare cannot be said of them",
            fix=fix,
        )
