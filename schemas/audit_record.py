"""What ``dpo-opt check`` found in a dataset: the record that text, JSON and page show.

The stage that reads data makes it, the stage that reads shards adds what the reference says, and the page
is drawn from it; none of them knows the others.
"""

from typing import Literal

from pydantic import BaseModel

Severity = Literal["error", "warning", "note"]
"""error: a later command refuses the data. warning: training on it does harm. note: worth knowing."""


Part = Literal["prompt", "chosen", "rejected", "prompt + longer completion"]


class Example(BaseModel):
    """One place where a problem shows."""

    where: str
    """File and line, or row group and row."""
    detail: str


class Problem(BaseModel):
    """One kind of problem, with how often it was found."""

    kind: str
    count: int
    severity: Severity
    title: str
    why: str
    fix: str
    examples: list[Example]


class DataSource(BaseModel):
    """One ``--data`` argument."""

    name: str
    form: str
    """What its rows were recognised as."""
    files: int
    pairs: int
    bad_rows: int


class Lengths(BaseModel):
    """Percentiles of one part's length, in the audit's unit."""

    part: Part
    mean: float
    p50: int
    p90: int
    p95: int
    p99: int
    longest: int


class LengthBias(BaseModel):
    """How often the longer completion is the chosen one."""

    longer_chosen: float | None
    """Share of the pairs of unequal length; None where there is none."""
    unequal_pairs: int
    equal_pairs: int


class SourceCount(BaseModel):
    """The pairs that one value of ``source`` names."""

    source: str | None
    pairs: int
    prompts: int
    duplicates: int
    contradictory: int
    length_bias: LengthBias
    median_prompt: int
    """In the audit's unit, as are the next two."""
    median_chosen: int
    median_rejected: int


class LabelCounts(BaseModel):
    """Rows of one completion, by label."""

    desirable: int
    undesirable: int


class TruncationForecast(BaseModel):
    """What one ``--max-length`` would do to the pairs, with the truncation that was asked about."""

    max_length: int
    whole: int
    cut: int
    """Kept, but a sequence lost tokens."""
    dropped: dict[str, int]
    """Drop reason to pairs."""


class Estimate(BaseModel):
    """What scoring the pairs would take."""

    sequences: int
    """Distinct prompt + completion sequences: equal ones are scored once."""
    tokens: int
    """Tokens of those sequences, after truncation at ``max_length``."""
    max_length: int
    shards: int
    disk_gb: float
    parameters: int
    gpu_hours: float
    assumption: str
    """What the GPU hours rest on."""


class HardPair(BaseModel):
    """A pair whose rejected completion the reference finds far likelier than the chosen one."""

    row: int
    source: str | None
    ranking_margin: float
    """Reference log-prob of chosen minus rejected, in nats."""
    chosen_length: int
    """In tokens, as is the next."""
    rejected_length: int
    prompt: str
    chosen: str
    rejected: str


class SourceRanking(BaseModel):
    """How the reference ranks the pairs of one source."""

    source: str | None
    pairs: int
    ranking_accuracy: float
    mean_ranking_margin: float


class ReferenceView(BaseModel):
    """What the reference's cached log-probs say before any training."""

    pairs: int
    ranking_accuracy: float
    """Share of pairs whose chosen completion the reference finds likelier."""
    ranking_accuracy_interval: tuple[float, float] | None
    """95%, over prompts; None for a single prompt."""
    normalised_ranking_accuracy: float
    """The same per token: without the advantage of the shorter completion."""
    margin_quantiles: dict[str, float]
    """Of the ranking margin in nats: p5, p25, p50, p75, p95."""
    hardest: list[HardPair]
    text_problem: str | None = None
    """Why token ids stand where the texts of the hardest pairs should."""
    sources: list[SourceRanking]


class Audit(BaseModel):
    """Everything that was found, problems by harm."""

    data: list[DataSource]
    pairs: int
    problems: list[Problem]
    unit: Literal["characters", "tokens"]
    lengths: list[Lengths]
    length_bias: LengthBias
    sources: list[SourceCount]
    labels: LabelCounts | None = None
    """Of rows with one completion; None where all are pairs."""
    template_date: str | None = None
    """Day that the chat template was told; None where it does not ask, or no model was given."""
    template_date_from: str | None = None
    """Who says so: ``--template-date``, a folder of shards, or ``today``."""
    truncation_mode: str | None = None
    """``keep_start``, ``keep_end`` or ``drop``: what the forecasts assume."""
    truncation: list[TruncationForecast] = []
    estimate: Estimate | None = None
    reference: ReferenceView | None = None

    @property
    def noun(self) -> str:
        """What messages call one of ``pairs``: ``row`` where each is one completion and its label."""
        counts = self.labels
        return "row" if counts is not None and counts.desirable + counts.undesirable == self.pairs else "pair"

    @property
    def refused(self) -> bool:
        """A later command would refuse this data."""
        return any(problem.severity == "error" for problem in self.problems)
