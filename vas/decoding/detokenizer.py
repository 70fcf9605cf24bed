"""Token ids to text, a token at a time, with stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a request is checked without what decodes it
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one response as it grows.

    Text is released once no later token can change it: not while it ends inside a UTF-8
    character, nor while its end may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._decoded_from = 0  # tokens before this one are in `_done` for good
        self._done = ""
        self._released = 0
        self.stopped = False

    def push(self, token: int | None) -> str:
        """Take the next token; return the text that became final. None ends the response and releases all."""
        if token is not None:
            self._tokens.append(token)
        tail = self._tail()  # may settle tokens, so before `_done` is read
        text = self._done + tail
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            text = text[: min(found)]
        final = len(text) if token is None or self.stopped else len(text) - self._held(text)
        fresh = text[self._released : final]
        self._released = max(self._released, final)
        return fresh

    def _tail(self) -> str:
        """Text of the tokens not yet settled; settles them at a word's beginning."""
        tail = self._decode(self._decoded_from)
        # Decoding depends on the neighbours (a leading space, a split character), so the last
        # settled token is decoded along with the new ones and its own text cut off.
        if len(self._tokens) - self._decoded_from > 16 and not tail.endswith(_UNFINISHED):
            keep = len(self._tokens) - 4
            settled = self._tokenizer.decode(self._tokens[self._decoded_from : keep], skip_special_tokens=True)
            rest = self._decode(keep)
            if settled + rest == tail:
                self._done += settled
                self._decoded_from = keep
                return rest
        return tail

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._tokens[start:], skip_special_tokens=True)

    def _held(self, text: str) -> int:
        """How many characters at the end must wait."""
        whole = text.rstrip(_UNFINISHED)
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(whole)), held, -1):
                if whole.endswith(stop[:size]):
                    held = size
                    break
        return held + len(text) - len(whole)
