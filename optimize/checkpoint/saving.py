"""Writes a run's policy and optimizer to disk, for checkpoints and the final model; loads the optimizer."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpo_opt.optimize.adapters.lora import save_adapter, trainable_names
from dpo_opt.optimize.checkpoint.export import write_model
from dpo_opt.optimize.checkpoint.model_card import model_card
from dpo_opt.optimize.checkpoint.state_files import load_state, save_state
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.processes.distributed import World, wait_for_all
from dpo_opt.optimize.processes.fsdp import gather_policy
from dpo_opt.optimize.update.optimizer_state import optimizer_tensors
from dpo_opt.schemas.models import checkpoint_dtype
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import publish_folder
from dpo_opt.schemas.tokenizer_files import CONFIG, copy_tokenizer

_OPTIMIZER = "optimizer"


class Saver:
    """Writes one run's policy and optimizer. Every process of the run must call the same methods."""

    def __init__(
        self,
        policy: Policy,
        optimizer: Optimizer,
        config: TrainConfig,
        *,
        folder: ShardFolder,
        model_folder: Path,
        parity: Parity | None,
        world: World,
    ) -> None:
        self._policy, self._optimizer, self._config, self._world = policy, optimizer, config, world
        self._folder, self._model_folder, self._parity = folder, model_folder, parity
        self._names: Mapping[Tensor, str] = {p: name for name, p in policy.model.named_parameters()}
        # With an adapter, the frozen parameters are the base's and are not saved.
        self._wanted = trainable_names(policy.model) if config.use_peft else None

    def write_checkpoint(self, private: Path, *, steps: int) -> None:
        """Write policy and optimizer state into an existing folder, in their own dtypes."""
        whole = gather_policy(self._policy, self._world, names=self._wanted)
        if whole is not None:
            self._write(whole, private, steps=steps)
        save_state(private / _OPTIMIZER, optimizer_tensors(self._optimizer, self._names), self._world)

    def load_optimizer(self, checkpoint: Path) -> None:
        """Load the optimizer state that ``write_checkpoint`` wrote.

        Raises:
            DataError: The state belongs to another optimizer or model, or cannot be read.
        """
        load_state(checkpoint / _OPTIMIZER, optimizer_tensors(self._optimizer, self._names), self._world)

    def write_final(self, path: Path, *, steps: int) -> None:
        """Write the trained model or its adapter to ``path``. The policy must not be trained after this."""
        dtype = self._final_dtype
        whole = gather_policy(self._policy, self._world, names=self._wanted, dtype=dtype)
        if whole is not None:
            # A finished run that was resumed with more steps already has a final model.
            shutil.rmtree(path, ignore_errors=True)
            if dtype is not None:
                torch.nn.Module.to(whole.model, dtype=dtype)
            with publish_folder(path) as private:
                self._write(whole, private, steps=steps)
        wait_for_all(self._world)

    def _write(self, whole: Policy, folder: Path, *, steps: int) -> None:
        with self._folder.tokenizer() as tokenizer_dir:
            if self._config.use_peft:
                save_adapter(whole.model, folder, base=self._config.model, base_weights=self._base)
                # With the config.json that a tokenizer may need, the folder would be taken for a model's. The
                # base has the same tokenizer.
                if not (tokenizer_dir / CONFIG).exists():
                    copy_tokenizer(tokenizer_dir, folder)
                (folder / "README.md").write_text(self._card(steps), encoding="utf-8")
            else:
                write_model(
                    whole,
                    folder,
                    source=self._model_folder,
                    tokenizer_dir=tokenizer_dir,
                    card=self._card(steps),
                )

    @property
    def _final_dtype(self) -> torch.dtype | None:
        """Dtype of the saved weights; None for an adapter, which stays in fp32."""
        if self._config.use_peft:
            return None
        name = self._config.save_dtype
        dtype: torch.dtype = getattr(torch, checkpoint_dtype(self._model_folder) if name == "auto" else name)
        return dtype

    @property
    def _base(self) -> str | None:
        """Digest of the base's weights; None if it would have to be computed again."""
        known = not self._config.reference_differs and self._config.adapter is None
        return self._folder.manifest.fingerprint.weights if known else None

    def _card(self, steps: int) -> str:
        model = self._policy.model.config
        text_alone = model.get_text_config() is not model
        return model_card(
            self._config, self._folder.manifest, self._parity, steps=steps, text_alone=text_alone
        )
