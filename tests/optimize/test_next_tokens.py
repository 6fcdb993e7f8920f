"""What two models say at sampled tokens, compared with whole softmaxes in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_opt.optimize.forward import next_tokens
from dpo_opt.optimize.forward.next_tokens import NextTokens, compare_next_tokens
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.pairs import TokenSequence


def sequences() -> list[TokenSequence]:
    random = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return random.integers(2, 100, length).astype(np.int32)

    prompts = [ids(4), ids(9)]
    # Neighbours of one prompt share its forward; the order must stay that of the list.
    return [TokenSequence(prompts[i], ids(length)) for i, length in ((0, 3), (0, 11), (1, 1), (0, 6))]


def textbook(policy: Path, reference: Path, sequence: TokenSequence) -> np.ndarray:
    """(4, C): policy's and reference's log-probs, the policy's entropies, and the KL at each token."""
    joined = torch.from_numpy(np.concatenate(sequence[:2]).astype(np.int64))[None]
    own, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(joined)
        .logits[0, len(sequence.prompt_ids) - 1 : -1]
        .detach()
        .double()
        .log_softmax(-1)
        .numpy()
        for folder in (policy, reference)
    )
    at = np.arange(len(own)), sequence.completion_ids
    p = np.exp(own)
    return np.stack([own[at], other[at], -(p * own).sum(1), (p * (own - other)).sum(1)])


def compared(policy: HfScorer, reference: HfScorer) -> list[NextTokens]:
    asked = sequences()
    return compare_next_tokens(
        policy.states(asked), reference.states(asked), [s.completion_ids for s in asked]
    )


@pytest.mark.parametrize("rows", [4, 4096])
def test_every_number_is_that_of_the_whole_softmax(
    rows: int, tiny_model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_tokens, "_ROWS", rows)
    policy, reference = (HfScorer(folder, dtype="float32") for folder in (tiny_model, other_model))
    for found, sequence in zip(compared(policy, reference), sequences(), strict=True):
        expected = textbook(tiny_model, other_model, sequence)
        np.testing.assert_allclose(np.stack([v for v in found if v is not None]), expected, atol=2e-5)
        assert (expected[3] > 0.01).all()
    own = policy.token_logps(sequences())
    for found, logps in zip(compared(policy, policy), own, strict=True):
        np.testing.assert_allclose(found.policy_logps, logps, atol=1e-6)
        assert found.kl is not None
        assert not found.kl.any()


def test_vocabularies_of_two_sizes_have_no_kl_at_a_token(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for found in compared(HfScorer(tiny_model, dtype="float32"), HfScorer(tmp_path, dtype="float32")):
        assert found.kl is None
        assert np.isfinite(found.ref_logps).all()
