"""``dpo-opt kl`` finds a KL that is known: that of two small models over all texts of a few tokens."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import result_of
from fakes import write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dpo_opt.analysis.kl import estimate_kl
from dpo_opt.analysis.load import scan_kl_samples
from dpo_opt.optimize.forward.next_tokens import compare_next_tokens
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.kl_samples import KLSample, write_kl_samples
from dpo_opt.schemas.pairs import TokenSequence, content_hash

EOS = 1
STEPS = 6
PROMPTS = ("a", "b", "c a", "b b a")
SAMPLES = 1000


def letters_model(seed: int) -> PreTrainedModel:
    """A random model of three letters, a beginning and an end, far from another seed's."""
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def between(a: PreTrainedModel, b: PreTrainedModel, share: float) -> PreTrainedModel:
    """A model with weights on the way from one model to another."""
    found = letters_model(0)
    ends = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    found.load_state_dict({name: torch.lerp(x, y, share) for (name, x), y in ends})
    return found


def save(model: PreTrainedModel, folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": EOS, "a": 2, "b": 3, "c": 4}, unk_token="c"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


@torch.no_grad()
def enumerated_kl(
    policy: PreTrainedModel, reference: PreTrainedModel, prompt: list[int], steps: int
) -> float:
    """Sum over all texts of up to ``steps`` tokens that end with EOS or are cut: p(text) log p/q, in nats."""
    texts, found = torch.tensor([prompt]), 0.0
    policy_logps = reference_logps = torch.zeros(1, dtype=torch.float64)
    for step in range(steps):
        both = []
        for model, logps in ((policy, policy_logps), (reference, reference_logps)):
            logits = model(input_ids=texts, use_cache=False).logits[:, -1].double()
            both.append((logps[:, None] + logits.log_softmax(-1)).flatten())
        vocabulary = len(both[0]) // len(texts)
        tokens = torch.arange(vocabulary).repeat(len(texts))
        ended = (tokens == EOS) | (step == steps - 1)
        found += float((both[0].exp() * (both[0] - both[1]))[ended].sum())
        policy_logps, reference_logps = both[0][~ended], both[1][~ended]
        texts = torch.cat([texts.repeat_interleave(vocabulary, 0), tokens[:, None]], 1)[~ended]
    return found


def dpo_opt_kl(*arguments: object) -> dict[str, Any]:
    (found,) = result_of("kl", *arguments, "--backend", "hf")["kl"]
    return dict(found)


class Measured(NamedTuple):
    exact: float
    result: dict[str, Any]
    table: Path

    def per_sample(self, name: str) -> np.ndarray:
        """(prompts, samples) of one estimator's sums, computed here from the table."""
        rows = pq.read_table(self.table).to_pylist()
        r = [np.subtract(s["policy_token_logps"], s["ref_token_logps"], dtype=np.float64) for s in rows]
        sums = {
            "k1": [x.sum() for x in r],
            "k3": [(np.exp(-x) - 1 + x).sum() for x in r],
            "rb": [np.sum(s["token_kl"], dtype=np.float64) for s in rows],
        }[name]
        return np.array(sums).reshape(len(PROMPTS), SAMPLES)

    def standard_error(self, name: str) -> float:
        """Of the mean over these prompts, which are all there are here."""
        return float(np.sqrt(self.per_sample(name).var(axis=1, ddof=1).mean() / (len(PROMPTS) * SAMPLES)))


@pytest.fixture(scope="module", params=["near", "far"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp(request.param)
    policy, other = letters_model(3), letters_model(1)
    reference = other if request.param == "far" else between(policy, other, 0.045)
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    letters = {"a": 2, "b": 3, "c": 4}
    ids = [[0, *(letters[letter] for letter in prompt.split())] for prompt in PROMPTS]
    exact = float(np.mean([enumerated_kl(policy, reference, prompt, STEPS) for prompt in ids]))
    result = dpo_opt_kl(
        save(policy, folder / "policy"), "--reference", save(reference, folder / "reference"),
        "--prompts", prompts, "--output", folder / "kl.parquet", "--num-samples", SAMPLES,
        "--max-new-tokens", STEPS,
    )  # fmt: skip
    return Measured(exact, result, folder / "kl.parquet")


def test_every_estimator_is_within_three_standard_errors_of_the_enumerated_kl(measured: Measured) -> None:
    assert 0.4 < measured.exact < 0.6 or measured.exact > 10
    assert measured.result["samples"] == len(PROMPTS) * SAMPLES
    for name in ("k1", "k3", "rb"):
        found = measured.result[f"{name}_sequence"]["value"]
        assert found == pytest.approx(measured.per_sample(name).mean())
        assert abs(found - measured.exact) < 3 * measured.standard_error(name), name
        # Too wide a margin would let anything pass.
        assert measured.standard_error(name) < 0.08 * measured.exact, name


def test_rao_blackwell_is_less_noisy(measured: Measured) -> None:
    most = 0.5 if measured.exact < 1 else 1.0
    assert measured.standard_error("rb") <= most * measured.standard_error("k1")


def test_end_tokens_count_and_cut_samples_are_stated(measured: Measured) -> None:
    rows = pq.read_table(measured.table).to_pylist()
    ends = [row["completion_ids"][-1] == EOS for row in rows]
    assert 0 < sum(ends) < len(ends)
    assert [row["finished"] for row in rows] == ends
    assert all(len(row["completion_ids"]) == STEPS for row, end in zip(rows, ends, strict=True) if not end)
    assert all(len(row["policy_token_logps"]) == len(row["completion_ids"]) for row in rows)
    assert measured.result["unfinished"]["value"] == pytest.approx(1 - np.mean(ends))
    assert rows[0]["prompt"] == "<s> a"


def test_without_the_end_tokens_the_kl_would_be_missed(measured: Measured) -> None:
    """The planted fault: an EOS that is not counted is a part of the divergence that is lost."""
    rows = pq.read_table(measured.table).to_pylist()
    kl = [np.sum(row["token_kl"][: -1 if row["finished"] else None], dtype=np.float64) for row in rows]
    assert abs(np.mean(kl) - measured.exact) > 3 * measured.standard_error("rb")


def test_the_mean_log_ratio_of_a_dataset_is_not_a_kl(measured: Measured) -> None:
    """On texts of the reference it is below 0, which no KL is; it is minus the KL in the other direction."""
    folder = measured.table.parent
    policy, reference = (HfScorer(folder / name, dtype="float32") for name in ("policy", "reference"))
    prompts = [np.array([0, 2], dtype=np.int32)]
    (written,) = reference.sample(prompts, num_samples=SAMPLES, max_new_tokens=STEPS, temperature=1.0, seed=1)
    dataset = [TokenSequence(prompts[0], completion.completion_ids) for completion in written]
    logratios = [
        float(own.sum() - other.sum())
        for own, other in zip(policy.token_logps(dataset), reference.token_logps(dataset), strict=True)
    ]
    error = np.std(logratios) / math.sqrt(SAMPLES)
    assert np.mean(logratios) < -3 * error
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("reference", "policy")]
    reverse = enumerated_kl(*models, [0, 2], STEPS)
    assert abs(np.mean(logratios) + reverse) < 3 * error


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.25])
def test_samples_that_are_not_the_policys_are_never_called_kl(measured: Measured, temperature: float) -> None:
    folder = measured.table.parent
    policy, reference = (HfScorer(folder / name, dtype="float32") for name in ("policy", "reference"))
    prompts = [np.array([0, *ids], dtype=np.int32) for ids in itertools.product((2, 3, 4), repeat=3)]
    written = policy.sample(prompts, num_samples=40, max_new_tokens=STEPS, temperature=temperature, seed=1)
    sequences = [
        TokenSequence(p, c.completion_ids) for p, cs in zip(prompts, written, strict=True) for c in cs
    ]
    compared = compare_next_tokens(
        policy.states(sequences), reference.states(sequences), [s.completion_ids for s in sequences]
    )
    samples = [
        KLSample(
            prompt_id=content_hash(sequence.prompt_ids),
            sample=i % 40,
            finished=bool(sequence.completion_ids[-1] == EOS),
            prompt_ids=sequence.prompt_ids,
            completion_ids=sequence.completion_ids,
            policy_token_logps=tokens.policy_logps,
            ref_token_logps=tokens.ref_logps,
            policy_token_entropies=tokens.policy_entropies,
            token_kl=tokens.kl,
        )
        for i, (sequence, tokens) in enumerate(zip(sequences, compared, strict=True))
    ]
    table = folder / f"{temperature}.parquet"
    write_kl_samples(table, samples)
    if temperature == 1.0:
        assert estimate_kl(scan_kl_samples(table)).samples == len(samples)
        return
    with pytest.raises(DataError, match=r"the samples are not the policy's.*(less|more) surprising"):
        estimate_kl(scan_kl_samples(table))
