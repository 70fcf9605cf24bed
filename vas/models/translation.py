"""From a base model's tokens to those of a value model that has another tokenizer: by the text they spell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from vas.errors import VasError
from vas.models.answers import TORN


class Translation:
    """What a value model with a tokenizer of its own reads of a prompt and a response.

    Prompt and response are encoded apart, so that a prompt has the same tokens whatever is answered. The end of a
    response becomes the value model's own EOS; a character that has only begun is left out.
    Raises VasError for a value model's tokenizer without EOS.
    """

    def __init__(
        self, base: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], value: PreTrainedTokenizerBase
    ) -> None:
        self._base, self._eos, self._value = base, frozenset(eos_token_ids), value
        if value.eos_token_id is None:
            raise VasError("the value model's tokenizer has no EOS", value.name_or_path, "take another backbone")
        self._prompt = lru_cache(maxsize=256)(self._encode)

    def __call__(self, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
        """The value model's tokens."""
        return [*self.prompt(prompt), *self.response(response)]

    def prompt(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Those of a prompt, the chat template's text included; there is one at least."""
        return self._prompt(tuple(tokens)) or (self._value.eos_token_id,)

    def response(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Those of a response, which may have ended."""
        if tokens and tokens[-1] in self._eos:
            return (*self._encode(tuple(tokens[:-1])), self._value.eos_token_id)
        return self._encode(tuple(tokens))

    def _encode(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        text = self._base.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return tuple(self._value(text.rstrip(TORN), add_special_tokens=False).input_ids)
