"""What the tests of sampling engines share: configs, requests, and a server's answers."""

from naive import prompts, request
from tiny import tiny_tokenizer

from vas.config import RunConfig, parse_config
from vas.decoding.sequence import Request

EOS = tiny_tokenizer().eos_token_id


def config(model: str, **sections: dict) -> RunConfig:
    """A config with a base model and sections of its own."""
    content = {"name": "test", "prompts": {"source": "bundled:demo"}, "rewards": {"brief": {"use": "length"}}}
    sections["base"] = {"model": model} | sections.get("base", {})
    return parse_config(content | sections, "test")


def many(count: int) -> list[Request]:
    """Requests with prompts of some lengths."""
    return [request(str(i), prompt, seed=i) for i, prompt in enumerate(prompts(*[5 + i % 3 for i in range(count)]))]


def ids(text: str) -> list[int]:
    """Tokens of a text."""
    return tiny_tokenizer()(text).input_ids


def content(tokens: list[int]) -> dict:
    """The log-probs of a chat's answer, as OpenAI tells them."""
    tokenizer = tiny_tokenizer()
    return {
        "content": [
            {"id": t, "token": "" if t == EOS else tokenizer.decode([t]), "logprob": -0.5 - i}
            for i, t in enumerate(tokens)
        ]
    }


FOX = ids("the fox")
