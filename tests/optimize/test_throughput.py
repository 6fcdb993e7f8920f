import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torchrun_steps import ALONE
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from dpo_opt.optimize.forward.balance import ForwardCost, forward_cost, group_cost
from dpo_opt.optimize.forward.packing import pair_group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.stream import PairStream
from dpo_opt.optimize.throughput import Throughput
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder

H100 = "NVIDIA H100 80GB HBM3"
COST = ForwardCost(per_row=1e9, per_key=1e3, per_scored=1e6)


@pytest.fixture(scope="module")
def pairs(shards: Path) -> Sequence[ScoredPair]:
    stream = PairStream(ShardFolder.open(shards), eval_split=0)
    return stream.fetch(stream.epoch(seed=0, epoch=0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that it is, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def on_gpu(policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> Policy:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return Policy(policy.model, torch.device("cuda"), dtype, policy.packs)


def test_pairs_per_second_leave_pauses_out_and_begin_anew(
    policy: Policy, pairs: Sequence[ScoredPair], clock: list[float]
) -> None:
    throughput = Throughput(policy, COST, ALONE)
    throughput.add(pairs[:8])
    throughput.add(pairs[8:12])
    clock[0] += 30.0
    throughput.leave_out(6.0)
    assert throughput.metrics() == {"pairs_per_second": 12 / 24}
    throughput.add(pairs[:3])
    clock[0] += 2.0
    assert throughput.metrics() == {"pairs_per_second": 1.5}


def test_mfu_is_the_models_arithmetic_over_that_of_all_gpus(
    policy: Policy, pairs: Sequence[ScoredPair], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ALONE._replace(size=4)
    throughput = Throughput(on_gpu(policy, monkeypatch, H100, torch.bfloat16), COST, world)
    throughput.add(pairs[:2])
    clock[0] += 0.5
    forward = sum(group_cost(pair_group(pair), COST) for pair in pairs[:2])
    assert throughput.metrics()["mfu"] == pytest.approx(3 * forward / 0.5 / (4 * 989e12), rel=1e-12)
    clock[0] += 0.5
    assert throughput.metrics()["mfu"] == 0


def test_frozen_weights_take_two_passes(
    policy: Policy, pairs: Sequence[ScoredPair], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for frozen in (False, True):
        policy.model.get_input_embeddings().requires_grad_(not frozen)
        throughput = Throughput(on_gpu(policy, monkeypatch, H100, torch.bfloat16), COST, ALONE)
        throughput.add(pairs)
        clock[0] += 1
        found.append(throughput.metrics()["mfu"])
    assert found[1] == pytest.approx(found[0] * 2 / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "known"),
    [
        ("NVIDIA H100 NVL", torch.bfloat16, True),
        ("NVIDIA A100-SXM4-80GB", torch.float16, True),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False),
        ("A device of next year", torch.bfloat16, False),
    ],
)
def test_without_a_known_peak_there_is_no_mfu(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, known: bool
) -> None:
    throughput = Throughput(on_gpu(policy, monkeypatch, name, dtype), COST, ALONE)
    assert ("mfu" in throughput.metrics()) == known


def test_of_experts_only_those_count_that_a_row_visits() -> None:
    config = {
        "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "num_experts": 8,
    }  # fmt: skip
    costs = []
    for visited in (1, 2):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**config, num_experts_per_tok=visited))
        policy = Policy(model, torch.device("cpu"), torch.float32, packs=True)
        costs.append(forward_cost(policy).per_row)
    # gate, up and down of one more expert in both layers
    assert costs[1] - costs[0] == 2 * 2 * 3 * 16 * 8
