"""What OpenAI-compatible servers answer, read as completions."""

import math

import pytest
from engines import EOS, FOX, content, ids
from tiny import tiny_tokenizer

from vas.errors import VasError
from vas.models.answers import Answer, ForeignTokens, Reader


def read(choice: dict, stops: bool = False) -> Answer:
    return Reader(tiny_tokenizer(), (EOS,))({"text": "the fox", "finish_reason": "stop"} | choice, "r", stops)


def classic(pieces: list[str]) -> dict:
    return {"tokens": pieces, "token_logprobs": [-0.5 - i for i in range(len(pieces))]}


def pieces(text: str) -> list[str]:
    return [tiny_tokenizer().decode([token]) for token in ids(text)]


@pytest.mark.parametrize(
    ("choice", "eos_told"),
    [
        ({"logprobs": content([*FOX, EOS])}, True),
        ({"logprobs": content(FOX)}, False),
        ({"logprobs": classic([*pieces("the fox"), "<|end|>"])}, True),
        ({"logprobs": classic([*pieces("the fox"), ""])}, True),
        ({"logprobs": classic(pieces("the fox"))}, False),
        ({"logprobs": classic([*pieces("the fox"), ""]), "token_ids": [*FOX, EOS], "stop_reason": None}, True),
    ],
    ids=["llama.cpp", "ids without EOS", "OpenAI", "an end without text", "no EOS", "vLLM"],
)
def test_every_shape_of_answer_gives_the_same_tokens(choice, eos_told):
    found = read(choice)
    assert found.tokens == [*FOX, EOS]
    assert found.logprobs[:-1] == [-0.5 - i for i in range(len(FOX))]
    assert found.logprobs[-1] == -0.5 - len(FOX) if eos_told else math.isnan(found.logprobs[-1])
    assert found.text == "the fox"


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": classic(["the f", "ox"])}])
def test_without_tokens_the_text_is_encoded(choice):
    found = read(choice | {"finish_reason": "length"})
    assert found.tokens == FOX
    assert all(map(math.isnan, found.logprobs))
    assert found.reason == "length"


def test_a_response_that_a_stop_string_ended_has_no_eos():
    longer = classic(pieces("the fox and"))
    assert read({"logprobs": longer, "stop_reason": " and"}, stops=True).tokens == ids("the fox and")
    assert read({"logprobs": classic(pieces("the fox"))}, stops=True).tokens == FOX
    assert read({"logprobs": classic(pieces("the fox")), "stop_reason": None}, stops=True).tokens == [*FOX, EOS]


def test_ids_of_another_vocabulary_are_noticed():
    text = "the other dog jumps"
    told = content(ids(text))
    for each in told["content"]:
        each["id"] = (each["id"] + 100) % 290
    with pytest.raises(ForeignTokens):
        read({"logprobs": told, "text": text})


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"error": "x"}, "not a completion"),
        ("text", "not a completion"),
        ({"text": "a", "finish_reason": "content_filter"}, "another reason: content_filter"),
        ({"text": "", "finish_reason": "length"}, "empty"),
    ],
    ids=str,
)
def test_an_answer_that_is_none_is_an_error(answer, problem):
    with pytest.raises(VasError, match=problem):
        Reader(tiny_tokenizer(), (EOS,))(answer, "r")
