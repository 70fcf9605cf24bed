"""Settings of the whole test suite."""

import os

# Before anything imports huggingface_hub: tests never wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
