"""Every setting of ``dpo-opt merge``, documented where it is declared."""

from pathlib import Path
from typing import Literal

from dpo_opt.schemas.settings import Settings


class MergeConfig(Settings):
    """A LoRA adapter and its base made into one model."""

    model: str
    """The base that the adapter was trained on: a folder or a Hub name."""
    adapter: Path
    """Folder of the adapter, such as RUN/final."""
    output: Path
    """New folder for the merged model."""
    dtype: Literal["auto", "float32"] = "auto"
    """Dtype of its weights. auto: as in the base; in bfloat16 small changes are lost, as is reported."""
