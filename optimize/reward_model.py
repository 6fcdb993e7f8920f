"""A reward model: a sequence classifier with one label, whose logit says how good a completion is."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from dpo_opt.optimize.forward.policy import default_device
from dpo_opt.schemas.errors import ConfigError, DataError, first_line
from dpo_opt.schemas.models import context_length
from dpo_opt.schemas.pairs import IdArray

_BATCH_TOKENS = 16384


class RewardModel:
    """A reward model, loaded when it is made.

    Args:
        folder: The model folder.
        dtype: Dtype of weights and computation, such as ``bfloat16``.

    Raises:
        ConfigError: It cannot be loaded, has another number of labels, or has no head of its own: a language
            model would get one of random numbers.
    """

    def __init__(self, folder: Path, *, dtype: str) -> None:
        fix = "pass --reward-model with a model that was trained as one, such as TRL's RewardTrainer makes"
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"no sequence classifier can be made of it ({first_line(error)})", where=str(folder), fix=fix
            ) from error
        if found["missing_keys"]:
            raise ConfigError(
                f"it has no weights for {', '.join(sorted(found['missing_keys']))}",
                where=str(folder),
                why="they would be random, and so would the rewards",
                fix=fix,
            )
        if model.config.num_labels != 1:
            raise ConfigError(
                f"it has {model.config.num_labels} labels, and a reward is one number",
                where=str(folder),
                fix=fix,
            )
        self._model: Any = model.to(default_device()).eval()
        self._context = context_length(folder)

    @torch.no_grad()
    def rewards(self, sequences: Sequence[IdArray]) -> list[float]:
        """The reward of each sequence of prompt and completion.

        Args:
            sequences: (L,) each.

        Raises:
            DataError: One is longer than the model's context, or its reward is not finite.
        """
        longest = max(map(len, sequences), default=0)
        if self._context is not None and longest > self._context:
            raise DataError(
                f"a prompt and completion of {longest} tokens, and the reward model reads {self._context}",
                why="what was cut off would not be judged",
                fix="sample with a smaller --max-new-tokens, or pass another --reward-model",
            )
        found = [0.0] * len(sequences)
        # Only equal lengths together: no padding, from which some models cannot tell the last token.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for length, same in groupby(order, key=lambda i: len(sequences[i])):
            places = list(same)
            size = 1 if self._model.config.pad_token_id is None else max(1, _BATCH_TOKENS // length)
            for at in range(0, len(places), size):
                batch = places[at : at + size]
                ids = torch.tensor([sequences[i].tolist() for i in batch], device=self._model.device)
                logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
                for i, reward in zip(batch, logits.float().tolist(), strict=True):
                    found[i] = reward
        if not bool(torch.tensor(found).isfinite().all()):
            raise DataError(
                "a reward is not finite",
                why="it ranks nothing",
                fix="pass --dtype float32, or another --reward-model",
            )
        return found
