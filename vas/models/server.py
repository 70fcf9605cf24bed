"""A language model at an OpenAI-compatible server, whatever form it wants prompts in. Only its tokenizer is here."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from vas.errors import Rejected, VasError
from vas.models import bundled
from vas.models.answers import TORN, no_completion
from vas.models.base import load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from vas.config import Base
    from vas.http import Meter

logger = logging.getLogger(__name__)

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a response goes on from."""

    prompt: Sequence[int]
    """Token ids, with the chat template's."""
    response: Sequence[int] = ()
    """Token ids of the response so far."""
    messages: tuple[Message, ...] = ()
    """The chat that the prompt is of, for servers that take nothing else; may end with the response's beginning."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted of a prefix; the names are OpenAI's."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int = 1
    n: int = 1
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] | None = None


# How a chat's last message is gone on with, by who wants it said how: vLLM, then DeepSeek and Mistral; llama.cpp just
# does it. Each is the body's keys, and the message's.
Continuation = tuple[dict[str, Any], dict[str, Any]]
CONTINUATIONS: tuple[Continuation, ...] = (
    ({"continue_final_message": True, "add_generation_prompt": False}, {}),
    ({}, {"prefix": True}),
    ({}, {}),
)
# Whether it does shows where a word is cut: a new response would begin with other words.
CUT = "Which number is 12345678901234567890?", "It is 1234567890123456", "78"


class Server:
    """Asks the model for choices, in the first form that the server takes:

    1. `ids`: `/v1/completions`, prompts as token ids, with the parameters that vLLM and llama.cpp have beyond OpenAI's.
       All are sent, for either has defaults of its own that would sample from another distribution (top_k 40, say).
    2. `text`: the same in plain OpenAI form, prompts as text. A BOS token that the tokenizer puts before every text is
       left out of it: the server's will do so again.
    3. `chat`: `/v1/chat/completions`, for servers that have nothing else. A response that has begun is the last
       message, where the server goes on with it; `continues` says whether it does.

    Raises VasError for a tokenizer that cannot be had, a key that is not set and an address that is none.
    meter: is asked before each call, and told what it has cost.
    """

    def __init__(self, spec: Base, meter: Meter | None = None) -> None:
        from vas.http import Client  # needs httpx2, which the engine does without

        source = spec.tokenizer_id
        self.name = spec.model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source, spec.revision)
        self.tokenizer_digest = tokenizer_digest(self.tokenizer)
        self.eos_token_ids = eos_token_ids(source, spec.revision, self.tokenizer)
        self.concurrency = spec.concurrency
        assert spec.openai is not None, "the caller checks it"
        key = _key(spec.api_key_env)
        self.client = Client(spec.openai, key, spec.timeout, spec.attempts, spec.concurrency, meter)
        self.form: str | None = None
        """How it is asked; None until the first answer."""
        self.tells: bool | None = None
        """Whether it takes requests for log-probs; None until it is known."""
        self._served = spec.served_name or spec.model
        self._continuations: list[Continuation] | None = None
        """The way that works, if any does; None until it is known."""
        self._repeats = False
        """Whether it then repeats what it was given of the response."""
        self._usage: Counter[str] = Counter()
        self._lock, self._finding = threading.Lock(), threading.Lock()

    @property
    def cost(self) -> Mapping[str, int]:
        """Tokens as the server counts them, calls and retries so far."""
        counted = Counter(self._usage) + self.client.counts
        return {name: counted[name] for name in ("prompt_tokens", "completion_tokens", "calls", "retries")}

    def ask(self, prefix: Prefix, ask: Ask) -> list[Any]:
        """The choices, as `/v1/completions` has them; `text` is what comes after the prefix.

        Raises Rejected for what no retry mends, and VasError after the last attempt, or for an answer without choices.
        """
        try:
            choices = self.insist(prefix, ask)
        except Rejected as rejected:
            if rejected.whole or not ask.logprobs or self.tells is not None:
                raise
            choices = self.insist(prefix, replace(ask, logprobs=0))
            self.tells = False
            return choices
        if ask.logprobs and self.tells is None:
            self.tells = True
        return choices

    def insist(self, prefix: Prefix, ask: Ask) -> list[Any]:
        """The same, without a second attempt that leaves out log-probs."""
        if self.form is not None:
            return self._post(prefix, ask, self.form)
        try:
            return self._try(prefix, ask, "ids")
        except Rejected as rejected:
            nowhere = rejected.status == 404  # for want of the model, or of completions
            if rejected.whole and not (nowhere and prefix.messages):
                raise
            if self.form == "ids":  # another thread has found that it takes them
                raise
            if self.form is not None:
                return self._post(prefix, ask, self.form)
            try:
                return self._try(prefix, ask, "chat" if nowhere else "text")
            except Rejected as again:
                raise rejected if nowhere and again.status == 404 else again from None

    def _try(self, prefix: Prefix, ask: Ask, form: str) -> list[Any]:
        """Ask in a form, and keep to it if that goes well."""
        answer = self._post(prefix, ask, form)
        self.form = form
        return answer

    @property
    def continues(self) -> bool:
        """Whether a response that has begun can be gone on with; only some servers with chats alone can't."""
        return self.form != "chat" or self._continuation() is not None

    def _continuation(self) -> Continuation | None:
        """How a chat's last message is gone on with, if it is."""
        with self._finding:
            if self._continuations is None:
                self._continuations = list(islice(filter(self._goes_on, CONTINUATIONS), 1))
            return self._continuations[0] if self._continuations else None

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def body(self, prefix: Prefix, ask: Ask, form: str) -> dict[str, Any]:
        """What is sent; in the forms text and chat with nothing in it that OpenAI's own servers refuse, if possible."""
        body: dict[str, Any] = {
            "model": self._served,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "n": ask.n,
        }
        told = ask.logprobs if self.tells is not False else 0
        if told:
            body |= {"logprobs": True, "top_logprobs": told} if form == "chat" else {"logprobs": told}
        if ask.seed is not None:
            body["seed"] = ask.seed & 0x7FFFFFFF  # some keep no more of it than this
        if ask.stop:
            body["stop"] = list(ask.stop)
        if ask.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in ask.logit_bias.items()}
        extras = {"top_k": ask.top_k, "min_p": ask.min_p}
        if form == "ids":
            extras |= {"repetition_penalty": 1.0, "return_token_ids": True, "return_tokens_as_token_ids": True}
            return body | extras | {"prompt": [*prefix.prompt, *prefix.response]}
        body |= {name: value for name, value in extras.items() if value}
        if form == "text":
            return body | {"prompt": self._plain([*prefix.prompt, *prefix.response])}
        return body | self._chat(prefix)

    def _chat(self, prefix: Prefix) -> dict[str, Any]:
        messages = [dict(message) for message in prefix.messages]
        if not messages:
            raise VasError(
                "the server takes chats only, and this prompt is none",
                self.client.url,
                "give prompts with `messages`, or call a server that has /v1/completions",
            )
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        begun += self.text(prefix.response).rstrip(TORN)
        if not begun:
            return {"messages": messages}
        way = self._continuation()
        if way is None:
            raise VasError(
                "the server begins every response anew", self.client.url, "guide whole responses: schedule block"
            )
        keys, mark = way
        return keys | {"messages": [*messages, {"role": "assistant", "content": begun} | mark]}

    def _post(self, prefix: Prefix, ask: Ask, form: str) -> list[Any]:
        body = self.body(prefix, ask, form)
        answer = self.client.post("chat/completions" if form == "chat" else "completions", body)
        self._add_usage(answer)
        try:
            choices = answer["choices"]
            if form == "chat":
                last = body["messages"][-1]
                begun = last["content"] if self._repeats and last["role"] == "assistant" else ""
                choices = [_as_completion(choice, begun) for choice in choices]
            if not choices:
                raise IndexError("no choices")
            return list(choices)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise no_completion(error, answer, self.client.url) from None

    def _goes_on(self, continuation: Continuation) -> bool:
        """Whether the server goes on with a last message of this form."""
        keys, mark = continuation
        question, begun, rest = CUT
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": begun} | mark]
        body = keys | {"model": self._served, "messages": messages, "max_tokens": 4, "temperature": 0}
        try:
            answer = self.client.post("chat/completions", body)
            self._add_usage(answer)
            said = answer["choices"][0]["message"]["content"]
            self._repeats = said.startswith(begun)
            return bool(said.removeprefix(begun).startswith(rest))
        except (Rejected, KeyError, IndexError, TypeError, AttributeError):
            return False

    def _plain(self, tokens: Sequence[int]) -> str:
        bos = self.tokenizer.bos_token_id
        if tokens[0] == bos and self.tokenizer("a").input_ids[0] == bos:
            tokens = tokens[1:]
        return self.text(tokens)

    def _add_usage(self, answer: Any) -> None:
        usage = (answer.get("usage") if isinstance(answer, dict) else None) or {}
        counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        with self._lock:
            self._usage.update(counts)
        self.client.meter.charge(**counts)


def _as_completion(choice: dict[str, Any], begun: str) -> dict[str, Any]:
    """A chat's choice as one of completions, without the beginning that it repeats."""
    return choice | {"text": (choice["message"]["content"] or "").removeprefix(begun)}


def eos_token_ids(model: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response, the tokenizer's own first, without the model's weights."""
    try:
        found = GenerationConfig.from_pretrained(bundled.resolve(model), revision=revision or "main").eos_token_id
    except (OSError, ValueError):  # a model without such a file
        found = None
    configured = found if isinstance(found, list) else [found]
    ids = tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))
    if not ids:
        raise VasError("the model has no token that ends a response", model, "give its tokenizer an eos_token")
    return ids


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise VasError(
            "the server's key is not set", f"base.api_key_env: {variable}", f"export {variable} where the actors run"
        )
    return key
