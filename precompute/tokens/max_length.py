"""The longest sequence, in tokens: as set, or as the model allows."""

from pathlib import Path

from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.models import context_length

_DEFAULT_MAX_LENGTH = 1024


def resolve_max_length(folder: Path, max_length: int | None) -> int:
    """The most tokens of prompt plus completion: as set, or else as the model allows.

    Raises:
        ConfigError: It is beyond the model's context.
    """
    context = context_length(folder)
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(
            f"--max-length {max_length} is beyond the model's context of {counted(context, 'token')}",
            where=str(folder),
            why="log-probs past the context mean nothing",
            fix=f"pass --max-length {context} or less",
        )
    return max_length or min(_DEFAULT_MAX_LENGTH, context or _DEFAULT_MAX_LENGTH)
