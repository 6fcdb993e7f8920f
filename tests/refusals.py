"""A refusal, caught."""

from collections.abc import Callable

import pytest

from dpo_opt.schemas.errors import ConfigError


def refusal(call: Callable[[], object]) -> ConfigError:
    """The error that a call ends with: of a setting that cannot work."""
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.exit_code == 2
    return caught.value
