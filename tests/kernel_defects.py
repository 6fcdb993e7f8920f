"""Defects of the fused attention kernel, planted one at a time; loading a model must notice each of them.

tests/gpu plants them in torch's kernel, tests/optimize/test_kernel_defects.py in one that is written out.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_opt.optimize.forward import attention
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import VarlenIndex
from dpo_opt.schemas.errors import ConfigError

TIES = ["untied", "tied"]


def _index(change: Callable[[VarlenIndex], VarlenIndex]) -> Callable[..., Tensor]:
    exact = attention.varlen_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, **settings: Any) -> Tensor:
        return exact(query, key, value, change(index), **settings)

    return attend


def _mixing_keys() -> Callable[..., Tensor]:
    exact = attention.varlen_attention

    def attend(query: Tensor, key: Tensor, *others: Any, **settings: Any) -> Tensor:
        return exact(query, key + 0.3 * key.roll(7, dims=2), *others, **settings)

    return attend


def _without_prefix(index: VarlenIndex) -> VarlenIndex:
    return index._replace(key_rows=None, key_starts=index.query_starts, longest_key=index.longest_query)


def _one_row_late(index: VarlenIndex) -> VarlenIndex:
    assert index.key_rows is not None
    return index._replace(key_rows=index.key_rows.roll(1))


KERNEL: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "keys of other sequences": _mixing_keys,
    "no prefix": lambda: _index(_without_prefix),
    "each key one row late": lambda: _index(_one_row_late),
}


def save(tiny_model: Path, folder: Path, *, ties: str) -> Path:
    """A random model in the shape of the tiny one, whose head is or is not its embedding."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = ties == "tied"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def assert_loads(folder: Path, device: torch.device) -> None:
    """Loading compares the forward that will train, in bf16 and with the fused kernel, and packs."""
    assert load_policy(folder, dtype=torch.bfloat16, device=device, trainable=True).packs


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The kernel has the defect while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attention", KERNEL[name]())
        yield


def assert_noticed(name: str, folder: Path, device: torch.device) -> None:
    """With the defect, what ``assert_loads`` asserts fails, and for the right reason."""
    with planted(name), pytest.raises(ConfigError, match=r"computed in bfloat16 on \w+, log-probs differ"):
        assert_loads(folder, device)
