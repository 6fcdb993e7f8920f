"""Writes a run's policy and optimizer to disk, for checkpoints and the final model; loads the optimizer."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpo_opt.optimize.adapters.lora import save_adapter, trainable_names
from dpo_opt.optimize.checkpoint.export import write_model
from dpo_opt.optimize.checkpoint.model_card import model_card
from dpo_opt.optimize.checkpoint.state_files import StateFile, load_state, own_files, save_state
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.processes.distributed import World, wait_for_all
from dpo_opt.optimize.processes.fsdp import (
    ShardedPolicy,
    assembled,
    gather_policy,
    gather_tensors,
    named_weights,
    shell_of,
)
from dpo_opt.optimize.update.optimizer_state import optimizer_tensors
from dpo_opt.schemas.models import checkpoint_dtype
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import publish_folder
from dpo_opt.schemas.tokenizer_files import CONFIG, copy_tokenizer

_OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this process writes of a checkpoint; a step changes it, unless it is copied before."""

    weights: dict[str, Tensor]
    """All that is saved of the policy; empty on all processes but the first."""
    gathered: bool
    """Whether the weights are already a copy."""
    optimizer: list[StateFile]

    def copied(self) -> "Snapshot":
        """A copy in main memory, which further steps do not change."""
        files = [file._replace(tensors=_copied(file.tensors)) for file in self.optimizer]
        return Snapshot(self.weights if self.gathered else _copied(self.weights), True, files)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _final_folder(path: Path) -> Iterator[Path]:
    # A finished run that was resumed with more steps already has a final model.
    shutil.rmtree(path, ignore_errors=True)
    with publish_folder(path) as private:
        yield private


class Saver:
    """Writes one run's policy and optimizer. Every process of the run must call the same methods.

    Args:
        policy: The policy that is trained.
        optimizer: Its optimizer.
        config: The run's configuration.
        folder: The shards.
        model_folder: The model that the run started from.
        world: The run's processes.
        patient: The same, from ``patient_world``.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: Optimizer,
        config: TrainConfig,
        *,
        folder: ShardFolder,
        model_folder: Path,
        world: World,
        patient: World,
    ) -> None:
        self._policy, self._optimizer, self._config = policy, optimizer, config
        self._folder, self._model_folder = folder, model_folder
        self._world, self._patient = world, patient
        self._names: Mapping[Tensor, str] = {p: name for name, p in policy.model.named_parameters()}
        # With an adapter, the frozen parameters are the base's and are not saved.
        self._wanted = trainable_names(policy.model) if config.use_peft else None
        self._shell = None
        if not config.use_peft:
            self._shell = policy.shell if isinstance(policy, ShardedPolicy) else shell_of(policy.model)

    def snapshot(self) -> Snapshot:
        """What a checkpoint would hold now. Gathers a sharded policy; nothing else is copied yet."""
        weights = named_weights(self._policy, self._wanted)
        sharded = isinstance(self._policy, ShardedPolicy)
        if sharded:
            weights = gather_tensors(weights, self._world)
        state = optimizer_tensors(self._optimizer, self._names)
        return Snapshot(weights, sharded, own_files(state, self._world))

    def write_checkpoint(
        self, private: Path, snapshot: Snapshot, *, steps: int, parity: Parity | None
    ) -> dict[str, str]:
        """Write a snapshot into an existing folder, in its own dtypes. May run in any thread.

        Returns:
            Hex SHA-256 of the large files of all processes, by name within the folder.
        """

        def write_policy() -> dict[str, str]:
            if not self._patient.first:
                return {}
            card = self._card(steps, parity)
            if self._shell is None:
                return self._write_adapter(snapshot.weights, private, card=card)
            whole = assembled(self._policy, self._shell, snapshot.weights)
            return self._write_model(whole, private, card=card)

        return save_state(private / _OPTIMIZER, snapshot.optimizer, self._patient, beside=write_policy)

    def load_optimizer(self, checkpoint: Path) -> None:
        """Load the optimizer state that ``write_checkpoint`` wrote.

        Raises:
            DataError: The state belongs to another optimizer or model, or cannot be read.
        """
        load_state(checkpoint / _OPTIMIZER, optimizer_tensors(self._optimizer, self._names), self._world)

    def write_final(self, path: Path, *, steps: int, parity: Parity | None) -> None:
        """Write the trained model or its adapter to ``path``. The policy must not be trained after this."""
        card = self._card(steps, parity)
        if self._config.use_peft:
            weights = gather_tensors(named_weights(self._policy, self._wanted), self._world)
            if self._world.first:
                with _final_folder(path) as private:
                    self._write_adapter(weights, private, card=card)
        else:
            dtype = self._final_dtype
            whole = gather_policy(self._policy, self._world, dtype=dtype)
            if whole is not None:
                torch.nn.Module.to(whole.model, dtype=dtype)
                with _final_folder(path) as private:
                    self._write_model(whole, private, card=card)
        wait_for_all(self._patient)

    def _write_adapter(self, weights: Mapping[str, Tensor], folder: Path, *, card: str) -> dict[str, str]:
        save_adapter(
            self._policy.model, folder, base=self._config.model, base_weights=self._base, weights=weights
        )
        with self._folder.tokenizer() as tokenizer_dir:
            # With the config.json that a tokenizer may need, the folder would be taken for a model's. The
            # base has the same tokenizer.
            if not (tokenizer_dir / CONFIG).exists():
                copy_tokenizer(tokenizer_dir, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return {}

    def _write_model(self, whole: Policy, folder: Path, *, card: str) -> dict[str, str]:
        with self._folder.tokenizer() as tokenizer_dir:
            return write_model(
                whole,
                folder,
                source=self._model_folder,
                tokenizer_dir=tokenizer_dir,
                card=card,
            )

    @property
    def _final_dtype(self) -> torch.dtype:
        """Dtype of the final model's weights. An adapter stays in fp32."""
        name = self._config.save_dtype
        dtype: torch.dtype = getattr(torch, checkpoint_dtype(self._model_folder) if name == "auto" else name)
        return dtype

    @property
    def _base(self) -> str | None:
        """Digest of the base's weights; None if it would have to be computed again."""
        known = not self._config.reference_differs and self._config.adapter is None
        return self._folder.manifest.fingerprint.weights if known else None

    def _card(self, steps: int, parity: Parity | None) -> str:
        model = self._policy.model.config
        text_alone = model.get_text_config() is not model
        return model_card(self._config, self._folder.manifest, parity, steps=steps, text_alone=text_alone)
