"""The table of on-policy samples: completions the policy wrote, scored under both models.

KL(policy || reference) is an expectation over the policy's own samples. Log-ratios on dataset
completions are not it, and may even have the wrong sign, so they live in another table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, first_line, quoted
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
        pa.field("policy_token_entropies", pa.list_(pa.float32())),
        pa.field("token_kl", pa.list_(pa.float32())),
        pa.field("prompt", pa.string()),
        pa.field("completion", pa.string()),
    ],
    metadata={"dpo_opt.schema_version": "1"},
)
LATER_COLUMNS = tuple(field.name for field in KL_SAMPLES_SCHEMA if field.nullable)
"""Those that tables of earlier versions do not have."""
RECORD_KEY = "dpo_opt.kl"
"""Of a table's metadata: how it was measured."""


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
    """(C,) with the end-of-sequence token where the model ended it."""
    policy_token_logps: LogpArray
    ref_token_logps: LogpArray
    policy_token_entropies: LogpArray | None = None
    """(C,) entropy of the policy's next-token distribution at each token."""
    token_kl: LogpArray | None = None
    """(C,) KL of the two next-token distributions at each token."""
    prompt: str | None = None
    """Text of ``prompt_ids``, special tokens included."""
    completion: str | None = None
    """Text of ``completion_ids`` without special tokens."""


class KLRecord(BaseModel):
    """How a table was measured. Tables with equal records are measurements of the same thing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    """SHA-256 of the weights that sampled."""
    reference: str
    """SHA-256 of the weights of the reference."""
    prompts: str
    """Hash of the prompts' token ids, in order."""
    num_samples: int
    """Per prompt."""
    max_new_tokens: int
    temperature: float = 1.0
    seed: int
    engine: str
    """What sampled: ``vllm`` or ``transformers``."""
    dtype: str
    step: int | None
    """Optimizer updates of the policy; None if it is not a run's."""


def write_kl_samples(path: Path, samples: Sequence[KLSample], *, record: KLRecord | None = None) -> None:
    """Publish the table."""
    metadata = dict(KL_SAMPLES_SCHEMA.metadata)
    if record is not None:
        metadata[RECORD_KEY.encode()] = record.model_dump_json().encode()
    columns = {name: [getattr(s, name) for s in samples] for name in KL_SAMPLES_SCHEMA.names}
    table = pa.Table.from_pydict(columns, schema=KL_SAMPLES_SCHEMA.with_metadata(metadata))
    with publish(path) as private, arrow_file(private, "wb") as sink:
        pq.write_table(table, sink, compression="zstd")


def read_kl_record(path: Path) -> KLRecord | None:
    """How a table was measured; None where it does not say, as those of earlier versions.

    Raises:
        DataError: It is no Parquet file, or its record is damaged.
    """
    try:
        with arrow_file(path) as raw:
            text = (pq.read_schema(raw).metadata or {}).get(RECORD_KEY.encode())
        return None if text is None else KLRecord.model_validate_json(text)
    except (pa.ArrowInvalid, OSError, ValidationError) as error:
        raise DataError(
            f"not readable as a table of on-policy samples ({first_line(error)})",
            where=str(path),
            why="it says which policy wrote the samples, and how",
            fix=f"rm {quoted(path)}, then measure again with `dpo-opt kl`",
        ) from error
