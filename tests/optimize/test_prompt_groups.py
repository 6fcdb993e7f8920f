"""What pairs of a step have in common is computed once, and changes no loss and no gradient."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.balance import ForwardCost
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import packed_size, pair_group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.prompt_groups import prompt_groups, unique_groups
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.schemas.pairs import ScoredPair

ALONE = World(0, 1, 0, torch.device("cpu"), None)
COST = ForwardCost(1.0, 1.0, 1.0)
CONFIG = TrainConfig.model_validate({"shards": "s", "model": "m", "output_dir": "o"})
RNG = np.random.default_rng(5)


def ids(count: int) -> np.ndarray:
    return RNG.integers(2, 250, count).astype(np.int32)


def pair_of(row: int, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> ScoredPair:
    return ScoredPair(
        row=row,
        source=f"s:{row}",
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_truncated=False,
        rejected_truncated=False,
        ref_chosen_token_logps=-RNG.random(len(chosen)).astype(np.float32) - 4,
        ref_rejected_token_logps=-RNG.random(len(rejected)).astype(np.float32) - 4,
    )


def ranked(prompts: int, completions: int) -> list[ScoredPair]:
    """All pairs of each prompt's completions, the prompts in turn: equal prompts do not stand together."""
    columns = []
    for number in range(prompts):
        prompt, answers = ids(9 + number), [ids(5 + 2 * i) for i in range(completions)]
        columns.append([(prompt, a, b) for a, b in itertools.combinations(answers, 2)])
    found = [sides for row in zip(*columns, strict=True) for sides in row]
    return [pair_of(row, *sides) for row, sides in enumerate(found)]


class Step(NamedTuple):
    results: PairResults
    gradients: dict[str, Tensor]
    rows: int
    """Rows that were fed to the model."""


def step(policy: Policy, pairs: list[ScoredPair], *, budget: int, weights: list[float] | None = None) -> Step:
    fed = []
    hook = policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, arguments: fed.append(arguments[0].numel())
    )
    policy.model.zero_grad(set_to_none=True)
    results = forward_pairs(
        policy,
        pairs,
        CONFIG,
        batching=Batching(budget=budget, cost=COST, world=ALONE),
        weights=weights,
        backward=True,
        stop=StopSignals(),
    )
    hook.remove()
    found = {n: p.grad.to_dense().clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return Step(results, found, sum(fed))


def require_same(one: Step, other: Step) -> None:
    for name, ours, right in zip(PairResults._fields, one.results, other.results, strict=True):
        torch.testing.assert_close(ours, right, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert one.gradients.keys() == other.gradients.keys()
    for name, ours in one.gradients.items():
        torch.testing.assert_close(ours, other.gradients[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("weights", [None, [0.5 + 0.1 * i for i in range(12)]])
def test_losses_and_gradients_are_those_of_pairs_one_by_one(
    policy: Policy, packs: bool, weights: list[float] | None
) -> None:
    if not packs:
        policy.model.get_decoder().set_attn_implementation("sdpa")
        policy = dataclasses.replace(policy, packs=False)
    pairs = ranked(prompts=2, completions=4)
    # No two pairs fit into a single row, so each is by itself.
    alone = step(policy, pairs, budget=1, weights=weights)
    together = step(policy, pairs, budget=10_000, weights=weights)
    require_same(together, alone)
    assert together.rows < alone.rows / 2
    # Groups that the budget cuts share what it lets them share.
    require_same(step(policy, pairs, budget=45, weights=weights), alone)


def test_each_completion_is_fed_once_behind_its_prompt(policy: Policy) -> None:
    pairs = ranked(prompts=2, completions=4)
    prompts = [9, 10]
    completions = [5, 7, 9, 11]
    # The last token of a sequence predicts nothing.
    expected = sum(prompt + sum(count - 1 for count in completions) for prompt in prompts)
    assert step(policy, pairs, budget=10_000).rows == expected
    assert [len(group) for group in unique_groups(pairs)] == [4, 4]


def test_no_group_of_several_pairs_is_larger_than_the_budget() -> None:
    pairs = ranked(prompts=1, completions=6)
    for budget in (1, 30, 40, 60, 1000):
        groups = prompt_groups(pairs, rows=packed_size, budget=budget)
        assert sorted(number for group in groups for number in group.pairs) == list(range(len(pairs)))
        for group in groups:
            assert len(group.pairs) == 1 or packed_size(group.sequences) <= budget
            for number, (chosen, rejected) in zip(group.pairs, group.sides, strict=True):
                assert group.sequences[chosen].completion_ids.tolist() == pairs[number].chosen_ids.tolist()
                assert (
                    group.sequences[rejected].completion_ids.tolist() == pairs[number].rejected_ids.tolist()
                )


def test_equal_completions_of_other_prompts_or_with_other_masks_are_not_shared(policy: Policy) -> None:
    prompt, answer, others = ids(6), ids(5), [ids(4), ids(4)]
    pairs = [pair_of(0, prompt, answer, others[0]), pair_of(1, ids(6), answer, others[1])]
    assert [len(g.sequences) for g in prompt_groups(pairs, rows=packed_size, budget=1000)] == [2, 2]
    some = np.array([False, True, True, False, True])
    masked = [
        dataclasses.replace(pair_of(0, prompt, answer, others[0]), chosen_mask=some),
        pair_of(1, prompt, answer, others[1]),
    ]
    (group,) = prompt_groups(masked, rows=packed_size, budget=1000)
    assert len(group.sequences) == 4
    require_same(step(policy, masked, budget=1000), step(policy, masked, budget=1))


def test_a_pair_that_stands_twice_counts_twice(policy: Policy) -> None:
    pair = pair_of(0, ids(6), ids(5), ids(4))
    twice = step(policy, [pair, pair], budget=1000)
    once = step(policy, [pair], budget=1000)
    assert twice.rows == once.rows
    assert twice.results.losses.tolist() == once.results.losses.tolist() * 2
    for name, gradient in once.gradients.items():
        torch.testing.assert_close(twice.gradients[name], gradient, atol=1e-7, rtol=1e-5)


def test_a_completion_that_is_chosen_here_and_rejected_there_gets_both_gradients(policy: Policy) -> None:
    prompt, middle = ids(6), ids(5)
    pairs = [pair_of(0, prompt, ids(4), middle), pair_of(1, prompt, middle, ids(7))]
    assert [len(group) for group in unique_groups(pairs)] == [3]
    require_same(step(policy, pairs, budget=1000), step(policy, pairs, budget=1))


# Prompts that begin alike ----------------------------------------------------------------------------------


def conversation(row: int, *, turns: int, system: np.ndarray | None = None) -> list[ScoredPair]:
    """A pair of each turn: what was chosen stands in the next turn's prompt."""
    prompt = np.concatenate([ids(3) if system is None else system, ids(6)])
    found = []
    for turn in range(turns):
        answer = ids(7)
        found.append(pair_of(row + turn, prompt, answer, ids(5)))
        prompt = np.concatenate([prompt, answer, ids(4)])
    return found


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("budget", [40, 60, 10_000])
def test_turns_of_a_conversation_are_computed_once_and_change_nothing(
    policy: Policy, packs: bool, budget: int
) -> None:
    if not packs:
        policy.model.get_decoder().set_attn_implementation("sdpa")
        policy = dataclasses.replace(policy, packs=False)
    talks = [conversation(10 * i, turns=3) for i in range(3)]
    # The turns of a conversation do not stand together.
    pairs = [pair for turn in zip(*talks, strict=True) for pair in turn]
    alone = step(policy, pairs, budget=1)
    require_same(step(policy, pairs, budget=budget), alone)
    if packs and budget > 100:
        # The last turn's prompt and chosen completion, and what was rejected in each turn.
        assert step(policy, pairs, budget=budget).rows == 3 * (9 + 11 + 11 + 6 + 3 * 4)


def test_only_what_saves_much_is_joined(policy: Policy) -> None:
    header = ids(2)
    short = [conversation(10 * i, turns=1, system=header)[0] for i in range(4)]
    assert len(prompt_groups(short, rows=packed_size, budget=1000)) == 4
    system = ids(30)
    long = [conversation(10 * i, turns=1, system=system)[0] for i in range(4)]
    (group,) = prompt_groups(long, rows=packed_size, budget=1000)
    # Behind another prompt's beginning both completions repeat what their own prompt goes on with.
    assert packed_size(group.sequences) == 30 + 6 + 6 + 4 + 3 * (6 + 6 + 6 + 4)
    require_same(step(policy, long, budget=1000), step(policy, long, budget=1))


def test_several_processes_get_the_gradients_of_one(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair for i in range(6) for pair in conversation(10 * i, turns=3)]
    alone = step(policy, pairs, budget=1)
    assert any(len(g.pairs) > 1 for g in prompt_groups(pairs, rows=packed_size, budget=100, ranks=2))
    monkeypatch.setattr("dpo_opt.optimize.step.sum_over_ranks", lambda values, _: values)
    policy.model.zero_grad(set_to_none=True)
    shares = [
        forward_pairs(
            policy,
            pairs,
            CONFIG,
            batching=Batching(budget=100, cost=COST, world=World(rank, 2, rank, torch.device("cpu"), None)),
            weights=None,
            backward=True,
            stop=StopSignals(),
        )
        for rank in range(2)
    ]
    results = PairResults(*(one + other for one, other in zip(*shares, strict=True)))
    found = {n: p.grad.to_dense() for n, p in policy.model.named_parameters() if p.grad is not None}
    require_same(Step(results, found, 0), alone)


@pytest.mark.parametrize(("budget", "ranks"), [(100, 1), (10_000, 3), (10_000, 12)])
def test_joined_prompts_leave_every_process_its_share(budget: int, ranks: int) -> None:
    system = ids(30)
    pairs = [conversation(10 * i, turns=1, system=system)[0] for i in range(48)]
    groups = prompt_groups(pairs, rows=packed_size, budget=budget, ranks=ranks)
    assert sorted(number for group in groups for number in group.pairs) == list(range(48))
    assert 2 * ranks <= len(groups)
    assert len(groups) < 48 or ranks == 12, "nothing was joined"
    assert all(packed_size(group.sequences) <= budget for group in groups)
    for group in groups:
        for number, sides in zip(group.pairs, group.sides, strict=True):
            for side, expected in zip(
                sides, (pairs[number].chosen_ids, pairs[number].rejected_ids), strict=True
            ):
                assert group.sequences[side].prompt_ids is pairs[number].prompt_ids
                assert group.sequences[side].completion_ids is expected


def test_prompts_that_part_early_keep_their_own_completions_together() -> None:
    """Behind another prompt each of the completions would repeat what their prompt has of its own."""
    system = ids(20)
    prompts = [np.concatenate([system, ids(40)]) for _ in range(2)]
    pairs = [pair_of(i, prompts[i % 2], ids(5), ids(5)) for i in range(8)]
    groups = prompt_groups(pairs, rows=packed_size, budget=10_000)
    assert [len(group.pairs) for group in groups] == [4, 4]


def transcripts(shared_data: Path, count: int) -> list[ScoredPair]:
    """A pair of each turn of real conversations of three turns and more, with what others were answered."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    with gzip.open(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        talks = [json.loads(line)["chosen"].split("\n\nHuman: ")[1:] for line in lines]
    found: list[ScoredPair] = []
    other = ids(30)
    for talk in [talk for talk in talks if len(talk) >= 3 and sum(map(len, talk)) < 800][:count]:
        prompt = ids(0)
        for turn in talk:
            asked, _, answer = turn.partition("\n\nAssistant: ")
            texts = (f"\n\nHuman: {asked}\n\nAssistant: ", answer)
            question, chosen = (
                np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
                for text in texts
            )
            prompt = np.concatenate([prompt, question])
            found.append(pair_of(len(found), prompt, chosen, other))
            prompt, other = np.concatenate([prompt, chosen]), chosen
    return found


def test_turns_of_real_transcripts_are_exact_and_take_half_the_rows(shared_data: Path) -> None:
    pairs = transcripts(shared_data, 40)
    assert len(pairs) > 100
    apart = sum(packed_size(group) for pair in pairs for group in [pair_group(pair)])
    for budget, least in ((2048, 1.8), (512, 1.2)):
        groups = prompt_groups(pairs, rows=packed_size, budget=budget)
        ratio = apart / sum(packed_size(group.sequences) for group in groups)
        print(f"{len(pairs)} pairs, {budget} rows: {ratio:.2f}x fewer rows")
        assert ratio > least
    model = shared_data / "models" / "stories260K"
    policy = load_policy(model, dtype=torch.float32, device=torch.device("cpu"), trainable=True)
    require_same(step(policy, pairs[:24], budget=2048), step(policy, pairs[:24], budget=1))
