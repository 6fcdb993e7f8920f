"""What looks at a run before its first step notices planted defects, and passes what is sound.

Two checks look: the probe when a model is loaded (a few random tokens, fp32), and parity with the cache (real pairs,
the dtype of the run). A defect of the code is there for both.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from planted_defects import CACHE, FORWARD, planted

from dpo_opt.optimize.attention import SEGMENT_ATTENTION
from dpo_opt.optimize.parity import Parity, measure_parity
from dpo_opt.optimize.policy import decoder_of, load_policy
from dpo_opt.optimize.probe import choose_layout
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pairs import ScoredPair

CPU = torch.device("cpu")


class Scored:
    """A policy that packs, and the pairs that were scored with it."""

    def __init__(self, folder: Path, pairs: list[ScoredPair], dtype: str) -> None:
        self.folder, self.pairs, self.dtype = folder, pairs, dtype
        self.policy = load_policy(folder, dtype=getattr(torch, dtype), device=CPU, trainable=True)
        assert self.policy.packs

    def parity(self, pairs: list[ScoredPair] | None = None) -> Parity:
        return measure_parity(self.policy, self.pairs if pairs is None else pairs, cached_dtype=self.dtype)

    def probe_objects(self) -> bool:
        """Whether loading would have refused the model, or not have packed it."""
        try:
            packs, _ = choose_layout(self.policy.model, CPU, folder=self.folder)
        except ConfigError:
            return True
        finally:
            decoder_of(self.policy.model).set_attn_implementation(SEGMENT_ATTENTION)
        return not packs

    def noticed_by(self, name: str) -> tuple[bool, list[str]]:
        """Of a defect of the forward: whether the probe objects, and which checks of parity fail."""
        with planted(name, self.policy):
            return self.probe_objects(), failed(self.parity())


def failed(parity: Parity) -> list[str]:
    return [check.name for check in parity.checks if not check.ok]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def scored(request: pytest.FixtureRequest, tiny_model: Path, shards: Path, bf16_shards: Path) -> Scored:
    folder = shards if request.param == "float32" else bf16_shards
    return Scored(tiny_model, list(ShardFolder.open(folder).pairs())[::2], request.param)


def test_what_is_sound_passes(scored: Scored) -> None:
    assert not scored.probe_objects()
    assert failed(scored.parity()) == []


@pytest.mark.parametrize("name", FORWARD)
def test_a_defect_of_the_forward_is_noticed(scored: Scored, name: str) -> None:
    objects, checks = scored.noticed_by(name)
    assert objects or checks
    test_what_is_sound_passes(scored)


@pytest.mark.parametrize("name", CACHE)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_defect_of_the_cache_is_noticed(scored: Scored, name: str) -> None:
    assert failed(scored.parity(CACHE[name](scored.pairs)))


def test_there_is_no_false_alarm(scored: Scored) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        count = int(rng.integers(2, len(scored.pairs)))
        sample = rng.choice(len(scored.pairs), size=count, replace=False)
        assert failed(scored.parity([scored.pairs[i] for i in sample])) == []
