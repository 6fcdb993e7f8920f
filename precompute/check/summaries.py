"""Tables over the pairs of an audit: what was read, their lengths, and what each source of them is like."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo_opt.precompute.check.length_bias import length_bias
from dpo_opt.precompute.check.pair_statistics import Facts
from dpo_opt.precompute.check.repeats import find_repeats
from dpo_opt.precompute.read.sources import Source
from dpo_opt.schemas.audit_record import DataSource, Lengths, Part, SourceCount


def data_sources(facts: Facts, named: Sequence[Source]) -> list[DataSource]:
    """What was read of each --data argument."""
    return [
        DataSource(
            name=source.name,
            form=facts.forms.get(i, "nothing that could be recognised"),
            files=len(source.files),
            pairs=int((facts.source == i).sum()),
            bad_rows=sum(found.rows for (number, _), found in facts.bad_rows.items() if number == i),
        )
        for i, source in enumerate(named)
    ]


def lengths_of(facts: Facts) -> npt.NDArray[np.int32]:
    """(P, 3) in the audit's unit."""
    return facts.tokens[:, :3] if facts.tokens.shape[1] else facts.characters


def percentiles(facts: Facts) -> list[Lengths]:
    """The lengths of each part of the pairs, and of a pair as a whole."""
    lengths = lengths_of(facts)
    if not len(lengths):
        return []
    whole = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    parts: dict[Part, npt.NDArray[np.int32]] = {
        "prompt": lengths[:, 0],
        "chosen": lengths[~facts.undesirable, 1],
        "rejected": lengths[~facts.desirable, 2],
        "prompt + longer completion": whole,
    }
    rows = []
    for name, values in parts.items():
        if not len(values):
            continue
        # The smallest value that this share of the pairs does not exceed: a length that occurs.
        p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99], method="inverted_cdf").tolist()
        longest = int(values.max())
        rows.append(
            Lengths(part=name, mean=float(values.mean()), p50=p50, p90=p90, p95=p95, p99=p99, longest=longest)
        )
    return rows


def source_counts(facts: Facts) -> list[SourceCount]:
    """What is known of the pairs of each ``source``, the largest first."""
    repeats = find_repeats(facts)
    repeated = repeats.earlier < np.arange(len(facts))
    contradicted = repeats.opposite >= 0
    lengths = lengths_of(facts)
    counts = []
    for code, label in enumerate(facts.labels):
        members = facts.label == code
        if not members.any():
            continue
        medians = np.percentile(lengths[members], 50, axis=0, method="inverted_cdf").astype(int).tolist()
        counts.append(
            SourceCount(
                source=label,
                pairs=int(members.sum()),
                prompts=len(np.unique(facts.prompt[members])),
                duplicates=int((members & repeated).sum()),
                contradictory=int((members & contradicted).sum()),
                length_bias=length_bias(lengths[members]),
                median_prompt=medians[0],
                median_chosen=medians[1],
                median_rejected=medians[2],
            )
        )
    return sorted(counts, key=lambda count: (-count.pairs, count.source or ""))
