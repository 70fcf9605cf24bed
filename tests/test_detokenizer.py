"""Token ids to text: pieces, split characters and stop strings."""

import dataclasses
import itertools
import random

import pytest
from naive import BOTH, guided_setup, mixed_requests, prompts, request, rows_in_use
from tiny import tiny_tokenizer

from vas.decoding.detokenizer import Detokenizer


def test_a_stop_string_ends_a_response_and_is_cut():
    base, _, engine = guided_setup("llama", ending=())
    ended = 0
    for seed, prompt in enumerate(prompts(*range(2, 12))):
        asked = request("r", prompt, BOTH, seed=seed, max_tokens=40)
        (whole,) = engine.generate([asked])
        texts = [base.tokenizer.decode(whole.token_ids[:n], skip_special_tokens=True) for n in range(40)]
        for start in (0, 3, 20):  # strings of two to four characters, so most span tokens
            stop = whole.text[start : start + 2 + seed % 3]
            if not stop or "\N{REPLACEMENT CHARACTER}" in stop:
                continue
            sampling = dataclasses.replace(asked.sampling, stop=("never said", stop))
            tokens = list(engine.stream(dataclasses.replace(asked, sampling=sampling)))
            steps = next(n for n, text in enumerate([*texts, whole.text]) if stop in text)
            assert [token.token_id for token in tokens] == whole.token_ids[:steps]
            assert "".join(token.text for token in tokens) == whole.text[: whole.text.index(stop)]
            assert tokens[-1].finish_reason == "stop"
            ended += 1
    assert ended > 8
    assert rows_in_use(engine) == [0, 0, 0]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_streamed_pieces_make_the_text(arch):
    base, _, engine = guided_setup(arch)
    for asked in mixed_requests():
        (whole,) = engine.generate([asked])
        tokens = list(engine.stream(asked))
        assert [token.token_id for token in tokens] == whole.token_ids
        assert "".join(token.text for token in tokens) == whole.text
        assert whole.text == base.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + [whole.finish_reason]


def detokenize(text: str, stop: tuple[str, ...]) -> tuple[list[str], int]:
    """The pieces that a text's tokens release, and how many tokens were taken."""
    tokenizer = tiny_tokenizer()
    detokenizer, pieces = Detokenizer(tokenizer, stop), []
    tokens = tokenizer(text).input_ids
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    taken = len(pieces)
    pieces.append(detokenizer.push(None))
    return pieces, taken


def test_characters_split_over_tokens_are_released_whole():
    text = "the 🙂 says 日本語, naïvely, to the ñandú " * 3
    pieces, _ = detokenize(text, ())
    assert "".join(pieces) == text
    assert "🙂" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_string_that_begins_before_a_split_character_is_held_back():
    pieces, _ = detokenize("the n🙂 and on", ("n🙂",))
    assert "".join(pieces) == "the "


def test_the_earliest_of_several_stop_strings_cuts():
    for stop in itertools.permutations(["x", "ox", "fox"]):  # one token may complete them all
        pieces, _ = detokenize("the quick brown fox jumps over", stop)
        assert "".join(pieces) == "the quick brown "


def test_any_text_with_any_stop_strings():
    """Against decoding everything after every token."""
    rng, tokenizer = random.Random(0), tiny_tokenizer()
    alphabet = ["the", "fox", " ", "\n", "a", "ab", "ba", "b", "🙂", "é", "日", ".", " a", "<", "1"]
    stopped = 0
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 60)))
        stop = []
        for _ in range(rng.randint(0, 3)):
            start = rng.randrange(len(text))
            piece = text[start : start + rng.randint(1, 6)]
            stop.append(piece if rng.random() < 0.5 else piece + rng.choice("ab🙂"))
        tokens = tokenizer(text).input_ids
        expected, steps = text, len(tokens)
        for n in range(1, len(tokens) + 1):
            so_far = tokenizer.decode(tokens[:n])
            if found := [so_far.find(each) for each in stop if each in so_far]:
                expected, steps = so_far[: min(found)], n
                stopped += 1
                break
        pieces, taken = detokenize(text, tuple(stop))
        assert ("".join(pieces), taken) == (expected, steps), (text, stop)
    assert 50 < stopped < 250
