"""Settings of the whole test suite."""

import os

import pytest

# Before anything imports huggingface_hub: tests never wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Its assertions then say what they found, as those of the tests do.
pytest.register_assert_rewrite("naive")
