"""The table of on-policy samples: completions the policy wrote, scored under both models.

KL(policy || reference) is an expectation over the policy's own samples. Log-ratios on dataset
completions are not it, and may even have the wrong sign, so they live in another table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.pairs import IdArray, LogpArray
from dpo_opt.schemas.storage import publish

KL_SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("policy_token_logps", pa.list_(pa.float32()), nullable=False),
        pa.field("ref_token_logps", pa.list_(pa.float32()), nullable=False),
    ],
    metadata={"dpo_opt.schema_version": "1"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLSample:
    """One completion sampled from the policy at temperature 1, with both models' log-probs in nats."""

    prompt_id: str
    sample: int
    """Number of the sample among those of its prompt."""
    finished: bool
    """False where the token limit cut it off: its KL is that of the part that was sampled."""
    prompt_ids: IdArray
    completion_ids: IdArray
    policy_token_logps: LogpArray
    ref_token_logps: LogpArray


def write_kl_samples(path: Path, samples: Sequence[KLSample]) -> None:
    """Publish the table."""
    columns = {name: [getattr(s, name) for s in samples] for name in KL_SAMPLES_SCHEMA.names}
    with publish(path) as private, arrow_file(private, "wb") as sink:
        pq.write_table(pa.Table.from_pydict(columns, schema=KL_SAMPLES_SCHEMA), sink, compression="zstd")
