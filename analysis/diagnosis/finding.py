"""What a diagnosis says: plain data, for the terminal, the report and scripts."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from dpo_opt.analysis.intervals import Interval
from dpo_opt.schemas.counts import counted


class Measure(NamedTuple):
    """One number that speaks for a finding."""

    name: str
    value: Interval
    """With its 95% interval over prompts; the bounds are NaN where the number is counted, not estimated."""
    unit: str = ""
    limit: str = ""
    """What the number is in a run without this cause, in words."""

    @property
    def line(self) -> str:
        """The measure as a line of text."""
        bounds = f" [{self._shown(self.value.low)}, {self._shown(self.value.high)}]"
        known = bounds if math.isfinite(self.value.low) else ""
        limit = f" ({self.limit})" if self.limit else ""
        unit = f" {self.unit}" if self.unit and self.unit != "%" else ""
        return f"{self.name}: {self._shown(self.value.value)}{known}{unit}{limit}"

    def record(self) -> dict[str, object]:
        """The measure as JSON has it."""
        bounds = {k: v if math.isfinite(v) else None for k, v in self.value._asdict().items()}
        return {"name": self.name, **bounds, "unit": self.unit, "limit": self.limit}

    def _shown(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.3g}"


def exact(value: float) -> Interval:
    """A number that is known, and not estimated."""
    return Interval(value, math.nan, math.nan)


class Missing(NamedTuple):
    """Why a cause could not be looked for."""

    reason: str


class PairName(NamedTuple):
    """One of the pairs behind a finding."""

    row: int
    pair_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One cause that was found."""

    cause: str
    """Its name: that of the function which looks for it."""
    title: str
    evidence: tuple[Measure, ...]
    rows: tuple[int, ...] = ()
    """Rows of the pairs behind it, the clearest first."""
    action: str
    """The one thing to do."""
    pairs: tuple[PairName, ...] = ()
    """:attr:`rows` with their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A cause that was looked for."""

    cause: str
    asked: str
    """What was looked for, in words."""
    result: Literal["found", "clear", "unknown"]
    reason: str | None = None
    """Why it is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found of a run, and what was checked."""

    run: str
    findings: tuple[Finding, ...]
    """At most three, the one to mend first at the top."""
    checks: tuple[Check, ...]
    """Every cause that was looked for."""
    pairs: int
    """How many pairs that training had not seen the run was judged by."""
    held_out: int
    """How many of them were held out; the others are of the first epoch, each as it was before its step."""
    doubts: tuple[str, ...]
    """What keeps a run without findings from being called healthy, a sentence each."""
    unfinished: str | None
    """The command that goes on with a run that is not finished; None for a finished one."""

    def record(self) -> dict[str, object]:
        """The diagnosis as JSON has it; a number that is counted and not estimated has null bounds."""
        return {
            "run": self.run,
            "verdict": self.verdict,
            "pairs": self.pairs,
            "held_out": self.held_out,
            "doubts": list(self.doubts),
            "unfinished": self.unfinished,
            "findings": [
                {
                    "cause": finding.cause,
                    "title": finding.title,
                    "evidence": [measure.record() for measure in finding.evidence],
                    "pairs": [pair._asdict() for pair in finding.pairs],
                    "action": finding.action,
                }
                for finding in self.findings
            ],
            "checks": [asdict(check) for check in self.checks],
        }

    @property
    def verdict(self) -> Literal["found", "healthy", "undecided", "unknown"]:
        """``undecided``: nothing was found, nor is it clear that the run learned something.

        ``unknown``: nothing was found, but the pairs that would show it are missing.
        """
        if self.findings:
            return "found"
        if not self.pairs:
            return "unknown"
        return "undecided" if self.doubts else "healthy"

    @property
    def judged_by(self) -> str:
        """The pairs that the run was judged by, in words."""
        before = self.pairs - self.held_out
        groups = [
            f"{self.held_out:,} held out" if self.held_out else "",
            f"{before:,} of the first epoch, before they were trained on" if before else "",
        ]
        named = " and ".join(group for group in groups if group)
        return f"{counted(self.pairs, 'pair')} that training had not seen{named and f': {named}'}"
