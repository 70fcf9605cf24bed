"""`vas value push`: a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError

from vas import storage
from vas.cli.checkpoint import Checkpoint
from vas.errors import VasError


def push(checkpoint: Checkpoint, repo: str, private: bool) -> str:
    """Upload the folder to the repository, which is made if need be; returns its address.

    Raises VasError without a token, or if the hub cannot be reached or refuses.
    """
    if get_token() is None:
        raise VasError("there is no Hugging Face token", repo, "log in with `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        with storage.local_copy(checkpoint.location) as folder:
            made = hub.create_repo(repo, private=private or None, exist_ok=True)
            hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Value model")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        mend = "check the repository's name, the token's rights and the network (HF_ENDPOINT, HF_HUB_OFFLINE)"
        raise VasError(f"cannot push to {hub.endpoint}: {reason}", repo, mend) from None
    return str(made)
