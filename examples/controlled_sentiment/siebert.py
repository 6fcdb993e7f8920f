"""The reward of `paper`: log-odds of siebert's sentiment classifier that prompt and completion are positive.

siebert/sentiment-roberta-large-english (Hartmann et al. 2023) is fetched from the Hub.
"""

import torch
from transformers import pipeline

_CLASSIFIER = pipeline(
    "text-classification",
    model="siebert/sentiment-roberta-large-english",
    device=0 if torch.cuda.is_available() else -1,
)
_BATCH = 64


def positive(prompts: list[str], completions: list[str]) -> list[float]:
    """Logit of POSITIVE less that of NEGATIVE, of the whole text."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    found = []
    for scores in _CLASSIFIER(
        texts, top_k=None, function_to_apply="none", batch_size=_BATCH, truncation=True
    ):
        logits = {score["label"]: score["score"] for score in scores}
        found.append(logits["POSITIVE"] - logits["NEGATIVE"])
    return found
