"""The numbers of a size: what tiny.yaml and full.yaml hold, each documented here."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError

from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.settings import Settings

_Share = Annotated[float, Field(gt=0, le=1)]


class Size(Settings):
    """One size of the experiment."""

    data_share: _Share
    """Of the pairs."""
    eval_share: Annotated[float, Field(gt=0, lt=1)]
    """Of the prompts: held out from training."""
    max_length: PositiveInt
    """Most tokens of prompt plus completion; longer pairs are left out."""
    train: dict[str, Any]
    """Settings of `dpo-opt train`."""
    num_prompts: PositiveInt
    """Held-out prompts that policies complete."""
    kl_samples: PositiveInt
    """Completions per prompt from which the KL is measured."""
    max_new_tokens: PositiveInt
    temperatures: list[NonNegativeFloat] = Field(min_length=1)
    """At which completions are judged (Rafailov et al. 2023, section 6.2)."""
    best_of: list[Annotated[int, Field(ge=2)]]
    """N of Best-of-N."""
    backend: Literal["auto", "vllm", "hf"]
    """What scores and samples."""


def read_size(named: str) -> Size:
    """A size by the name of its file here, or a file of that form.

    Raises:
        ConfigError: There is none, or a value is refused.
    """
    own = Path(__file__).parent / f"{named}.yaml"
    file = own if own.is_file() else Path(named)
    try:
        return Size.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValidationError, yaml.YAMLError) as error:
        raise ConfigError(
            f"no size can be read ({first_line(error)})",
            where=str(file),
            fix="pass --size tiny, full, or a file",
        ) from error
