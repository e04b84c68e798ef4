"""Settings of the tests of patterns."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def tiny_tensors(one_thread: None) -> None:
    """Nothing here is large."""
