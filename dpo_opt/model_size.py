"""How many weights a model has, also where they are not on this machine."""

from pathlib import Path

from dpo_opt.schemas.weights import parameter_count


def count_parameters(folder: Path) -> int:
    """Number of weights in a model's files; where it has none, of the model that its configuration describes.

    Raises:
        ConfigError: A file is damaged, or transformers cannot build the model.
    """
    if any(folder.glob("*.safetensors")):
        return parameter_count(folder)
    from dpo_opt.optimize.forward.architecture import model_without_weights

    return sum(parameter.numel() for parameter in model_without_weights(folder).parameters())
