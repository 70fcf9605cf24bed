"""What kind of failure an exception is: memory that ran out, a device that is lost, or anything else."""

from __future__ import annotations

import torch

from vas.errors import VasError

# RuntimeErrors that are said in words only: torch's allocator on a CPU, CUDA's and cuBLAS's outside of torch's own
_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED")


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY)


def is_fatal(error: BaseException) -> bool:
    """Whether no further call can succeed in this process: a CUDA context is lost, or vLLM's worker ended."""
    if is_memory(error):  # also said as a "CUDA error", but the context lives on
        return False
    died = any(each.__name__ == "EngineDeadError" for each in type(error).__mro__)
    return died or isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def alone(error: Exception, request_id: str) -> VasError:
    """What a response failed of that was sampled alone."""
    if isinstance(error, VasError):
        return error
    if is_memory(error):
        return VasError(
            f"memory ran out on this response alone: {describe(error)}",
            request_id,
            "lower rollouts.sampling.max_tokens, leave out the longest prompts, or give the actors more memory",
        )
    return VasError(describe(error), request_id)
