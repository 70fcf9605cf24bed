"""A value model whose tokenizer is not the base model's: it reads the text."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import tiny_base, tiny_tokenizer, tiny_value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vas.decoding.engine import Engine
from vas.decoding.loading import load_scorer
from vas.decoding.scorer import ScoreBatch
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.decoding.text_scorer import TextScorer
from vas.errors import VasError
from vas.models.translation import Translation
from vas.models.value import ValueModel
from vas.schema import rollout_schema
from vas.training.packing import pack


def foreign_tokenizer() -> PreTrainedTokenizerFast:
    """Longer tokens than the tiny base model's, over other texts, with other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["thinking of other foxes that jumped over them, the brown dogs thought"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BASE, OWN = tiny_tokenizer(), foreign_tokenizer()
EOS = BASE.eos_token_id


@pytest.fixture
def translation() -> Translation:
    return Translation(BASE, (EOS,), OWN)


def value() -> ValueModel:
    return deepcopy(tiny_value(objectives=("positive", "concise"), vocab=len(OWN)))


def ids(text: str) -> list[int]:
    return BASE(text, add_special_tokens=False).input_ids


# --- translation ------------------------------------------------------------------------------------------------


def test_tokens_are_translated_by_their_text(translation):
    prompt, response = ids("<|user|>the fox<|assistant|>"), ids("thinks of dogs")
    found = translation(prompt, [*response, EOS])
    assert OWN.decode(found) == "<|user|>the fox<|assistant|>thinks of dogs</s>"
    assert translation(prompt, response) == found[:-1]
    assert translation.prompt(prompt) == tuple(found[: len(translation.prompt(prompt))])


def test_a_character_that_has_only_begun_is_left_out(translation):
    whole = ids("naïve 🙂")
    texts = [OWN.decode(translation.response(whole[:n])) for n in range(len(whole) + 1)]
    assert texts[-1] == "naïve 🙂"
    assert texts[-2] == "naïve "
    assert all("\N{REPLACEMENT CHARACTER}" not in text for text in texts)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(VasError, match="no EOS"):
        Translation(BASE, (EOS,), PreTrainedTokenizerFast(tokenizer_object=OWN.backend_tokenizer))


# --- scoring ----------------------------------------------------------------------------------------------------


def test_candidates_have_the_values_of_their_texts(translation):
    """Against the value model run on each whole text anew, over steps in which earlier tokens are spelled anew too."""
    model = value()
    scorer = TextScorer("value", model, translation)
    generator = np.random.default_rng(3)
    texts = {"a": (ids("the fox"), ids(" thinking of jumping")), "b": (ids("dogs"), ids(" thought. naïve 🙂"))}
    done: dict[str, list[int]] = {name: [] for name in texts}
    for name, (prompt, _) in texts.items():
        scorer.open(name, len(prompt))
        if prompt[:-1]:
            scorer.extend([name], [tuple(prompt[:-1])])
    taken = {name: (prompt[-1],) for name, (prompt, _) in texts.items()}
    for step in range(min(len(response) for _, response in texts.values())):
        ahead = {name: response[step] for name, (_, response) in texts.items()}
        candidates = torch.tensor([[ahead[name], EOS, *generator.integers(4, 290, 3)] for name in texts])
        valid = torch.ones_like(candidates, dtype=torch.bool)
        valid[1, 3] = False
        batch = ScoreBatch(
            list(texts), [taken[n] for n in texts], [0, 1], candidates, valid, torch.ones(2, 2), torch.zeros(2) > 0
        )
        found, run = scorer.score(batch)()
        for b, (name, (prompt, _)) in enumerate(texts.items()):
            for k, token in enumerate(candidates[b].tolist()):
                if not valid[b, k]:
                    continue
                whole = translation(prompt, [*done[name], token])
                expected = model(torch.tensor([whole]))[0, -1]
                assert found[b, k].numpy() == pytest.approx(expected.numpy(), abs=1e-4), (step, name, token)
            assert run[b] < 5 * 4, "only the ends are run"
            done[name].append(ahead[name])
            taken[name] = (ahead[name],)
    for name in texts:
        scorer.close(name)
    assert scorer.fits(0, 0)


def test_a_prefix_is_shared(translation):
    model = value()
    scorer = TextScorer("value", model, translation)
    prompt, response = ids("the fox"), ids(" thinking of")
    scorer.open("one", len(prompt))
    scorer.extend(["one"], [(*prompt, *response)])
    scorer.open("two", len(prompt))
    scorer.share("one", "two", len(prompt) + 2)
    candidates = torch.tensor([[5, 6]])
    always = torch.ones(1, 2, dtype=torch.bool)
    batch = ScoreBatch(["two"], [(response[2],)], [0], candidates, always, torch.ones(1, 2), torch.zeros(1) > 0)
    found, _ = scorer.score(batch)()
    for k, token in enumerate((5, 6)):
        whole = translation(prompt, [*response[:3], token])
        assert found[0, k].numpy() == pytest.approx(model(torch.tensor([whole]))[0, -1].numpy(), abs=1e-4)


@pytest.mark.parametrize("schedule", ["token", "block:3"])
def test_a_stored_model_that_reads_text_guides(tmp_path, schedule):
    model = value()
    model.config.reads = "text"
    model.save_pretrained(tmp_path)
    OWN.save_pretrained(tmp_path)
    base = tiny_base()
    scorer = load_scorer("value", str(tmp_path), base, "exact")
    assert isinstance(scorer, TextScorer)
    engine = Engine(base, [scorer], max_sequences=3)

    def requests(beta: float) -> list[Request]:
        how = GuidanceParams({"positive": beta}, 4, schedule=schedule)
        return [Request(str(i), tuple(ids("the fox")), SamplingParams(max_tokens=12, seed=i), how) for i in range(5)]

    means = [np.mean([each.mean_values.get("positive", 0) for each in engine.generate(requests(b))]) for b in (-6, 6)]
    if schedule == "token":
        assert means[1] > means[0] + 0.3
    crowd = [each.token_ids for each in engine.generate(requests(6))]
    assert crowd == [engine.generate([each])[0].token_ids for each in requests(6)]
    with pytest.raises(VasError, match="tokens of its own"):
        scorer.values(ids("the fox"))


def test_a_model_that_reads_ids_needs_those_of_the_base(tmp_path):
    value().save_pretrained(tmp_path)
    base = replace(tiny_base(), tokenizer_digest="another")
    with pytest.raises(VasError, match="different tokenizers"):
        load_scorer("value", str(tmp_path), base, "exact")


# --- training rows ----------------------------------------------------------------------------------------------


def test_rollouts_are_packed_in_the_value_models_tokens(translation):
    prompt, response = ids("the fox"), ids(" thinking of dogs")
    row = {
        "rollout_id": "r",
        "prompt_id": "p",
        "prompt_token_ids": prompt,
        "response_token_ids": [*response, EOS],
        "finish_reason": "stop",
        "held_out": False,
        "roll_in_length": 2,
        "rewards": {"positive": 1.0},
    }
    table = pa.Table.from_pylist([row], schema=rollout_schema(["positive"], guided=False))
    [packed] = pack(table, ["positive"], translation).to_pylist()
    assert packed["prompt"] == list(translation.prompt(prompt))
    [tokens] = packed["responses"]
    assert OWN.decode(tokens) == " thinking of dogs</s>"
    assert packed["first"] == [len(translation.response(response[:2]))]
    assert packed["ended"] == [True]
