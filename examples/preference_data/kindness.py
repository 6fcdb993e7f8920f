"""A judge that any machine can run: how kind a completion sounds (pip install vaderSentiment).

It reads no prompt and knows nothing of harm or truth. A judge of real completions is a strong model.
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_ANALYSER = SentimentIntensityAnalyzer()


def kindness(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound score of each completion, -1 to 1."""
    return [_ANALYSER.polarity_scores(text)["compound"] for text in completions]
