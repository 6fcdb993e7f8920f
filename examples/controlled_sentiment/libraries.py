"""What the experiment needs beside dpo-opt, asked for before anything is trained; how TRL trains here."""

from importlib.util import find_spec
from pathlib import Path

from settings import ONLINE, Experiment

from dpo_opt.schemas.errors import ConfigError, quoted

_HERE = Path(__file__).parent
FLOAT32_RUN = {
    "gradient_checkpointing": False,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Of TRL's configurations: plain training in float32, of which only the model is kept."""


def require_libraries(experiment: Experiment, ppo_library: Path | None) -> None:
    """Refuse an experiment of which a part has nothing to run with.

    Raises:
        ConfigError: TRL is not installed, or the folder with its PPO is not given.
    """
    if (experiment.needs_reward_model or experiment.reviews is not None) and find_spec("trl") is None:
        raise ConfigError(
            "TRL is not installed",
            why="it trains the reward model, and fine-tunes on reviews",
            fix=f"pip install -r {quoted(_HERE / 'requirements.txt')}",
        )
    if any(method in experiment.methods for method in ONLINE):
        require_ppo(ppo_library)


def require_ppo(library: Path | None) -> Path:
    """The folder with TRL's PPO.

    Raises:
        ConfigError: It is not given, or has none.
    """
    if library is None or not (library / "trl").is_dir():
        folder = "FOLDER" if library is None else quoted(library)
        raise ConfigError(
            "PPO needs a release of TRL that has it",
            where=None if library is None else str(library),
            why="later ones have none, so it lies in a folder of its own",
            fix=f"pip install --target {folder} --no-deps -r {quoted(_HERE / 'ppo-requirements.txt')}, "
            f"then pass --ppo-library {folder}",
        )
    return library
