"""What every configuration has in common: fields that explain themselves, finite numbers, no unknown key."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of the configurations: one model is the Python API, the YAML file and the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
