"""What modules that train with TRL ask for first."""

import os

import pytest


@pytest.fixture(scope="module")
def peers() -> None:
    """TRL and datasets, at a version whose trainer is known."""
    try:
        import datasets
        import trl  # noqa: F401
    except ImportError:
        if os.environ.get("DPO_OPT_REQUIRE_PEERS") == "1":
            pytest.fail("TRL is not installed, and the environment requires it", pytrace=False)
        pytest.skip("TRL is not installed: pip install trl==1.16.0 datasets")
    datasets.disable_progress_bars()
