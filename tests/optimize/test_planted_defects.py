"""What looks at a run before its first step notices planted defects, and passes what is sound.

Two checks look: the probe when a model is loaded (a few random tokens, fp32), and parity with the cache (real
pairs, the dtype of the run). A defect of the code is there for both.
"""

from pathlib import Path

import numpy as np
import pytest
from planted_defects import CACHE, FORWARD, Scored, failed

from dpo_opt.schemas.shard_folder import ShardFolder


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
