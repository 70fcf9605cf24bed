"""Settings of the whole test suite."""

import os

import pytest

# Before anything imports huggingface_hub: tests never wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Its assertions then say what they found, as those of the tests do.
pytest.register_assert_rewrite("naive")


@pytest.fixture(scope="session")
def tokenizer_only(tmp_path_factory) -> str:
    """A model's folder without its weights."""
    from tiny import tiny_tokenizer  # after the offline switch above

    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def s3_store():
    """An S3 server of the module's own."""
    from s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3_store, request, monkeypatch):
    """A fresh prefix on the server, with the environment that leads to it."""
    for name, value in s3_store.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://test/{request.node.name}"
