"""Reading prompts: in chunks between steps, and once where they begin alike."""

import pytest
import torch
from naive import ALL, BOTH, ONE, drain, guided_setup, mixed_requests, prompts, request, rows_in_use, scorers_of
from tiny import tiny_base, tiny_value

from vas.decoding.engine import Engine

FIRST, SECOND = "positive+concise", "formal"  # the value models of `guided_setup`, by name


def decode_alone(arch: str, requests: list) -> dict[str, list[int]]:
    """Tokens of each request in an engine of its own."""
    base, models, _ = guided_setup(arch)
    return {asked.request_id: Engine(base, scorers_of(models)).generate([asked])[0].token_ids for asked in requests}


def prefixed(length: int, *rests: int) -> list[tuple[int, ...]]:
    """Prompts that share their first tokens, and differ in the one after them."""
    (begin,) = prompts(length, seed=7)
    return [(*begin, 10 + i, *rest) for i, rest in enumerate(prompts(*rests, seed=8))]


# --- shared prefixes ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("objectives", [{}, ONE, BOTH], ids=["plain", "one", "both"])
def test_later_prompts_copy_a_shared_prefix_and_run_only_the_rest(arch, objectives):
    _, _, engine = guided_setup(arch)
    requests = [
        request(f"r{i}", prompt, objectives, seed=i, candidates=3, schedule="entropy:99")
        for i, prompt in enumerate(prefixed(20, 5, 3, 8))
    ]
    alone = decode_alone(arch, requests)
    completions = engine.generate(requests)
    assert {done.request_id: done.token_ids for done in completions} == alone
    rests = [len(asked.prompt_token_ids) - 1 - 20 for asked in requests]
    names = [FIRST, SECOND] if objectives == BOTH else [FIRST] if objectives else []
    for done, unread in zip(completions, [20 + rests[0], *rests[1:]], strict=True):
        assert done.base_positions == unread + len(done.token_ids)
        # no step is guided, so a value model has read the prompt and nothing else; and a rest of one that the base
        # model read in passing would wait for a step that is
        passing = arch == "llama" and done is not completions[0]
        assert done.value_positions == ({} if passing else dict.fromkeys(names, unread))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_guided_requests_that_share_a_prefix_get_the_tokens_they_have_alone(arch):
    _, _, engine = guided_setup(arch)
    p = prefixed(30, 5, 1, 8, 3)
    objectives = [ALL, BOTH, ONE, {}]
    requests = [request(str(i), p[i], objectives[i], seed=i) for i in range(4)]
    requests += [request(f"again {i}", p[i], objectives[i], seed=9 + i, schedule="block:4") for i in range(4)]
    assert {done.request_id: done.token_ids for done in engine.generate(requests)} == decode_alone(arch, requests)
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_prompt_that_begins_another_is_shared_but_for_its_last_token():
    _, _, engine = guided_setup("llama")
    (long,) = prompts(25)
    requests = [request("long", long, ONE), request("short", long[:12], ONE), request("longer", (*long, 9, 8), ONE)]
    alone = decode_alone("llama", requests)
    completions = engine.generate(requests)
    assert {done.request_id: done.token_ids for done in completions} == alone
    assert [done.base_positions - len(done.token_ids) for done in completions] == [24, 0, 2]


def test_a_prefix_is_copied_from_a_request_of_an_earlier_step():
    _, _, engine = guided_setup("llama", ending=())
    first, second = (request(str(i), p, BOTH, seed=i, max_tokens=20) for i, p in enumerate(prefixed(20, 5, 3)))
    engine.add(first)
    for _ in range(6):
        engine.step()
    engine.add(second)
    done = drain(engine)
    assert done["1"].base_positions == 3 + len(done["1"].token_ids)
    base, models, _ = guided_setup("llama", ending=())
    for asked in (first, second):
        (expected,) = Engine(base, scorers_of(models)).generate([asked])
        assert done[asked.request_id].token_ids == expected.token_ids


def test_a_prefix_is_copied_as_soon_as_its_source_has_read_it():
    base, models, _ = guided_setup("llama")
    requests = [request(str(i), p, BOTH, seed=i, max_tokens=9) for i, p in enumerate(prefixed(20, 30, 3))]
    engine = Engine(base, scorers_of(models), prefill_tokens=6)
    for asked in requests:
        engine.add(asked)
    for _ in range(3):  # 18 tokens of the first prompt are read, 2 of the prefix are not
        assert engine.step() == []
    assert engine._runner.cache.lengths[requests[1].request_id, 0] == 0
    done = drain(engine)
    assert done["0"].base_positions == 50 + len(done["0"].token_ids)
    assert done["1"].base_positions == 3 + len(done["1"].token_ids)
    assert {name: each.token_ids for name, each in done.items()} == decode_alone("llama", requests)


def test_a_source_that_leaves_before_its_prefix_was_copied_is_not_missed():
    base, models, _ = guided_setup("llama")
    requests = [request(str(i), p, BOTH, seed=i, max_tokens=9) for i, p in enumerate(prefixed(20, 30, 3, 4))]
    alone = decode_alone("llama", requests)
    engine = Engine(base, scorers_of(models), prefill_tokens=6)
    for asked in requests:
        engine.add(asked)
    engine.step()
    engine.abort("0")
    done = drain(engine)
    assert done["1"].base_positions == 23 + len(done["1"].token_ids), "it reads all of its prompt itself"
    assert {name: each.token_ids for name, each in done.items()} == {name: alone[name] for name in ("1", "2")}
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_source_whose_value_models_have_not_read_the_prefix_is_no_source():
    _, _, engine = guided_setup("llama")
    p = prefixed(20, 5, 3, 2)
    requests = [request("plain", p[0], {}), request("one", p[1], ONE), request("both", p[2], BOTH)]
    completions = engine.generate(requests)
    assert [done.base_positions - len(done.token_ids) for done in completions] == [25, 23, 22]
    assert {done.request_id: done.token_ids for done in completions} == decode_alone("llama", requests)
    completions = engine.generate(requests[::-1])  # the one with most objectives first
    assert [done.base_positions - len(done.token_ids) for done in completions] == [22, 3, 5]
    assert {done.request_id: done.token_ids for done in completions} == decode_alone("llama", requests)


# --- chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "gemma3"])
def test_prompts_read_in_chunks_give_the_same_tokens(arch):
    base, models, whole = guided_setup(arch)
    requests = mixed_requests()
    requests += [request(f"long {i}", p, BOTH, seed=i) for i, p in enumerate(prompts(47, 80, 33, seed=6))]
    expected = whole.generate(requests)
    for size in (1, 5, 16) if arch == "llama" else (5,):
        engine = Engine(base, scorers_of(models), prefill_tokens=size)
        for done, reference in zip(engine.generate(requests), expected, strict=True):
            assert (done.token_ids, done.text) == (reference.token_ids, reference.text)
            assert done.logprobs == pytest.approx(reference.logprobs, abs=1e-5)
            assert done.guided_logprobs == pytest.approx(reference.guided_logprobs, abs=1e-5)


def test_others_get_a_token_at_every_step_while_a_long_prompt_is_read():
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models), prefill_tokens=5)
    others = [request(str(i), p, BOTH, seed=i, max_tokens=40) for i, p in enumerate(prompts(3, 2))]
    (prompt,) = prompts(61, seed=3)
    late = request("late", prompt, ONE, max_tokens=4)
    for asked in others:
        engine.add(asked)
    while len(engine.step()) < 2:
        pass
    engine.add(late)
    for _ in range(11):  # 60 tokens to read, 5 at a time
        assert [token.request_id for token in engine.step()] == ["0", "1"]
    assert [token.request_id for token in engine.step()] == ["late", "0", "1"]
    done = drain(engine)
    for asked in (*others, late):
        (alone,) = Engine(base, scorers_of(models)).generate([asked])
        assert done[asked.request_id].token_ids == alone.token_ids


def test_vocab_heads_read_in_chunks_and_share_prefixes():
    base = tiny_base("llama", torch.float64)
    models = [tiny_value("llama", ("positive",), "vocab", torch.float64)]
    requests = [request(str(i), p, ONE, seed=i) for i, p in enumerate(prefixed(20, 30, 3, 4))]
    expected = [Engine(base, scorers_of(models)).generate([asked])[0].token_ids for asked in requests]
    for size in (5, 2048):
        completions = Engine(base, scorers_of(models), prefill_tokens=size).generate(requests)
        assert [done.token_ids for done in completions] == expected
        assert [done.base_positions - len(done.token_ids) for done in completions] == [50, 3, 4]
