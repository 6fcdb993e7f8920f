"""A refusal, caught."""

from collections.abc import Callable

import pytest

from dpo_opt.schemas.errors import ConfigError, DataError


def refusal(call: Callable[[], object]) -> ConfigError:
    """The error that a call ends with: of a setting that cannot work."""
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.exit_code == 2
    return caught.value


def bad_data(call: Callable[[], object]) -> DataError:
    """The error that a call ends with: of data that is damaged or missing."""
    with pytest.raises(DataError) as caught:
        call()
    assert caught.value.exit_code == 3
    return caught.value
