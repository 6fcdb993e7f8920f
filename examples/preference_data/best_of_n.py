"""Best-of-N: of N completions of the reference the one that the trained policy prefers to it most.

The reward is the implicit one, log policy less log reference (Rafailov et al. 2023, equation 5), which the
same pairs taught: no judge that later decides the win rate has chosen the completion.
"""

from collections import defaultdict

import numpy as np
from folders import Work, dpo_opt
from win_rates import write_samples

from dpo_opt.feedback.samples import Sample, read_samples
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.scorers import make_engine


def best_of_n(work: Work) -> list[str]:
    """Sample the most that any N needs, and write the folder of each N."""
    most = max(work.size.best_of, default=0)
    if not most:
        return []
    everything = work.samples(f"reference-{most}-each")
    dpo_opt(
        "sample", "--model", work.model, "--prompts", work.prompts, "--output", everything,
        "--num-samples", most, "--max-new-tokens", work.size.max_new_tokens, "--backend", work.size.backend,
    )  # fmt: skip
    samples = list(read_samples(everything))
    rewards = implicit_rewards(work, samples)
    names = []
    for n in work.size.best_of:
        best: dict[str, list[tuple[float, Sample]]] = defaultdict(list)
        for sample, reward in zip(samples, rewards, strict=True):
            if sample.sample < n:
                best[sample.prompt_id].append((reward, sample))
        names.append(f"best-of-{n}")
        write_samples(work, names[-1], [max(own, key=lambda pair: pair[0])[1] for own in best.values()])
    return names


def implicit_rewards(work: Work, samples: list[Sample]) -> list[float]:
    """Log-prob of each completion under the policy less that under the reference, in nats."""
    sequences = [
        TokenSequence(np.array(s.prompt_ids, np.int32), np.array(s.completion_ids, np.int32)) for s in samples
    ]
    longest = max(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
    sums = []
    for folder in (work.policy, find_model(work.model)):
        engine = make_engine(folder, backend="hf", dtype="float32", max_length=longest)
        sums.append([float(logps.sum()) for logps in engine.token_logps(sequences)])
    return [policy - reference for policy, reference in zip(*sums, strict=True)]
