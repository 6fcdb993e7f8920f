"""Every setting of ``dpo-opt precompute``, documented where it is declared."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from dpo_opt.schemas.settings import Settings


class PrecomputeConfig(Settings):
    """Scoring a dataset once under the reference."""

    model: str
    """Reference model: a folder or a Hub name."""
    data: Path
    """Preference pairs: .jsonl, .jsonl.gz, .jsonl.zst or .parquet."""
    shards: Path
    """Folder to fill; running the same command again goes on where it stopped."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """What scores. auto: vLLM where it is installed, else transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the reference. auto: the dtype its checkpoint declares."""
    max_length: PositiveInt | None = None
    """Most tokens of prompt plus completion. Default: 1024, or the model's context if that is shorter."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """What happens to a longer pair: cut the completions' ends, cut the prompt's start, or leave it out."""
    pairs_per_shard: PositiveInt = 1024
    """Source rows per shard: the unit that is lost when a job is killed."""
