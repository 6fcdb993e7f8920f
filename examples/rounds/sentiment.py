"""The reward: how positive a completion sounds (pip install vaderSentiment)."""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_ANALYSER = SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound score of each completion, -1 to 1; the prompt does not count."""
    return [_ANALYSER.polarity_scores(text)["compound"] for text in completions]
