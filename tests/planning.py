"""Runs up to their plan, also in processes of their own."""

from pathlib import Path
from typing import Any, NamedTuple

from fakes import NUMERICS

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.reference import Reference, make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.errors import FingerprintError


class Run(NamedTuple):
    """A run up to its plan; what takes long is done before."""

    config: PrecomputeConfig
    reference: Reference
    tokenizer: PairTokenizer

    def settle(self, shards: Path) -> bool:
        """Whether the folder is this run's now."""
        config = self.config.model_copy(update={"shards": shards})
        try:
            settle_plan(config, reference=self.reference, tokenizer=self.tokenizer, numerics=NUMERICS)
        except FingerprintError:
            return False
        return True


def run_of(config: PrecomputeConfig) -> Run:
    reference = resolve_reference(config)
    return Run(config, reference, make_tokenizer(config, reference))


def race_in_folders(config: PrecomputeConfig, folders: list[Path], barrier: Any, outcomes: Any) -> None:
    """Settle in each folder at the time that another process does; what comes of it goes to ``outcomes``."""
    run = run_of(config)
    run.settle(config.shards)
    for folder in folders:
        barrier.wait(60)
        outcomes.put((config.shards.name, folder.name, run.settle(folder)))
