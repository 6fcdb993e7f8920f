"""The reward of `small`: how positive a completion is to a classifier of the user's reviews.

It is logistic regression on the words of those reviews from which no prompt is taken. run.py says in the
environment which file the reviews are in (REVIEWS), and what share of them it is (CLASSIFIER_SHARE). It is
fitted where this file is loaded: equal reviews give equal rewards.
"""

import os
from pathlib import Path

from reviews import read_reviews, shuffled
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

_REVIEWS = shuffled(read_reviews(Path(os.environ["REVIEWS"])), float(os.environ["CLASSIFIER_SHARE"]))[0]
_CLASSIFIER = make_pipeline(
    TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4.0, max_iter=1000)
).fit([review.text for review in _REVIEWS], [review.positive for review in _REVIEWS])


def positive(prompts: list[str], completions: list[str]) -> list[float]:
    """Log-odds that the completion is of a positive review; the prompt does not count."""
    return [float(value) for value in _CLASSIFIER.decision_function(completions)]
