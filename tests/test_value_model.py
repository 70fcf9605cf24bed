"""Base models and value models: loading, building, saving, and what goes wrong."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_base, tiny_base, tiny_objective, tiny_tokenizer, tiny_value

from vas import config, schema
from vas.errors import VasError
from vas.models.base import encode_prompt, load_base, load_tokenizer, tokenizer_digest
from vas.models.value import ValueModel, check_tokenizers

CHAT = schema.Prompt("p", ({"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox?"}))
IDS = torch.tensor([[5, 90, 41, 200, 33, 7, 150, 64], [12, 81, 9, 260, 101, 77, 6, 280]])


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def base_folder(request, tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "llama", "llama")


def build(folder: str, layers: int | None = None, head: str = "categorical", **about) -> ValueModel:
    spec = config.Value(layers=layers, head=head, bins=11)
    objectives = [tiny_objective("positive"), tiny_objective("concise") | {"low": -1.0, "high": 4.0}]
    return ValueModel.build(spec, config.Base(model=folder), tiny_tokenizer(), objectives, **about)


def sorted_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- base models -------------------------------------------------------------------------------


def test_a_base_model_loads_from_a_folder(base_folder):
    base = load_base(config.Base(model=base_folder), device="cpu")
    original = tiny_base(Path(base_folder).name)
    assert torch.allclose(base.model(IDS).logits, original.model(IDS).logits)
    assert base.eos_token_ids == original.eos_token_ids
    assert base.tokenizer_digest == original.tokenizer_digest
    assert base.context_length == 1024
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.dtype == torch.float32


def test_a_base_model_loads_in_the_precision_asked_for(llama_folder):
    base = load_base(config.Base(model=llama_folder, dtype="bfloat16"), device="cpu")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/folder", "the folder does not exist"),
        ("./runs/nothing/here", "the folder does not exist"),
        ("nobody/no-such-model", "check the id"),
        ("no-such-model", "check the id"),
        ("not a name!", "check the id"),
    ],
)
@pytest.mark.parametrize("load", [lambda name: load_base(config.Base(model=name)), load_tokenizer])
def test_a_base_model_that_is_not_there_is_one_clear_line(name, says, load):
    with pytest.raises(VasError, match="cannot load the model: ") as caught:
        load(name)
    assert "\n" not in caught.value.what
    assert caught.value.where == name
    assert says in caught.value.mend


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(VasError, match="cannot load the model: ") as caught:
        load_base(config.Base(model=str(tmp_path)))
    assert "\n" not in caught.value.what


def test_damaged_base_weights_are_one_clear_line(tmp_path):
    folder = save_tiny_base(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(VasError, match="cannot load the model: ") as caught:
        load_base(config.Base(model=folder))
    assert "\n" not in caught.value.what


def test_an_unknown_bundled_name_suggests_the_nearest():
    with pytest.raises(VasError, match="did you mean 'smollm2-135m-instruct'"):
        load_base(config.Base(model="bundled:smollm2-instruct"))


def test_a_chat_goes_through_the_chat_template():
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, CHAT)
    assert tokenizer.decode(ids) == "<|system|>be brief<|end|><|user|>the fox?<|end|><|assistant|>"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|system|>")


def test_a_chat_without_a_template_is_joined_by_blank_lines(llama_folder):
    tokenizer = load_tokenizer(llama_folder)
    assert encode_prompt(tokenizer, CHAT) == encode_prompt(tiny_tokenizer(), CHAT)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT)) == "be brief\n\nthe fox?\n\n"


def test_a_plain_string_is_continued_as_it_is():
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, schema.Prompt("p", text="the quick 🙂"))
    assert tokenizer.decode(ids) == "the quick 🙂"
    assert isinstance(ids, list)


# --- building ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_first_layers_of_the_base_are_the_backbone(base_folder, layers):
    model, base = build(base_folder, layers).eval(), tiny_base(Path(base_folder).name)
    theirs = base.model.base_model.state_dict()
    ours = model.backbone.state_dict()
    assert ours
    assert len(ours) < len(theirs) or layers == 3
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    with torch.no_grad():
        hidden = base.model(IDS, output_hidden_states=True).hidden_states[layers]
        if layers < 3:  # Hugging Face puts the final norm into the last state alone
            norm = getattr(base.model.base_model, "norm", None) or base.model.base_model.ln_f
            hidden = norm(hidden)
        assert torch.allclose(model.hidden(IDS), hidden, atol=1e-5)


def test_the_backbone_is_the_whole_base_unless_told(llama_folder):
    model = build(llama_folder)
    assert model.config.backbone_config.num_hidden_layers == 3
    assert model.config.base_model == llama_folder
    assert model.config.tokenizer_digest == tokenizer_digest(tiny_tokenizer())


def test_more_layers_than_there_are_is_an_error(base_folder):
    with pytest.raises(VasError, match=r"has 3 layers, fewer than 4\n  where: value.layers: 4"):
        build(base_folder, layers=4)


@pytest.mark.parametrize("head", ["categorical", "scalar"])
def test_a_fresh_value_is_the_same_everywhere(llama_folder, head):
    values = build(llama_folder, 2, head).eval()(IDS)
    assert values.shape == (2, 8, 2)
    middle = torch.tensor([0.0, 1.5]) if head == "categorical" else torch.zeros(2)  # of [low, high]
    assert torch.allclose(values, middle.expand_as(values), atol=1e-6)


@pytest.mark.parametrize("head", ["categorical", "scalar"])
def test_a_value_model_learns(llama_folder, head):
    torch.manual_seed(0)
    model = build(llama_folder, 1, head).train()
    target = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 2)
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        outputs = model.outputs(model.hidden(IDS))
        loss = sum(h.loss(o, target).mean() for h, o in zip(model.heads, outputs, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(later < earlier for earlier, later in zip(losses[::10], losses[10::10], strict=False))
    error = (model(IDS)[..., 0] - target).square().mean()
    assert error < 0.5 * target.var()


def test_gradients_reach_the_backbone(llama_folder):
    model = build(llama_folder, 2, "scalar").train()
    torch.nn.init.normal_(model.heads[0].linear.weight)
    model.heads[0].loss(model.outputs(model.hidden(IDS))[0], torch.ones(2, 8)).sum().backward()
    missing = [name for name, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_soft_values_tend_to_the_expected_and_the_extreme(llama_folder):
    model = tiny_value("llama", ("positive", "concise"))
    outputs = model.outputs(model.hidden(IDS))
    expected = model.values(outputs)
    soft = {b: model.values(outputs, torch.full_like(expected, b)) for b in (-400.0, -1.0, 0.0, 1.0, 400.0)}
    assert torch.equal(soft[0.0], expected)
    assert (soft[-1.0] < expected).all()
    assert (expected < soft[1.0]).all()
    assert torch.allclose(soft[400.0], torch.full_like(expected, 3.0), atol=0.1)
    assert torch.allclose(soft[-400.0], torch.full_like(expected, -3.0), atol=0.1)


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["categorical", "scalar"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mistral"])
def test_a_checkpoint_gives_the_same_values_back(tmp_path, arch, head):
    model = tiny_value(arch, ("positive", "concise"), head)
    location = tmp_path / "value" / "default"
    model.save(str(location), tiny_tokenizer(), "# Value model\n")
    again = ValueModel.load(str(location))
    assert torch.equal(again(IDS), model(IDS))
    assert again.objectives == ("positive", "concise")
    assert again.config.to_dict()["objectives"] == model.config.to_dict()["objectives"]
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    if head == "categorical":
        for ours, theirs in zip(again.heads, model.heads, strict=True):
            assert torch.equal(ours.centers, theirs.centers)
    # a second time, from what was loaded
    again.save(str(tmp_path / "again"), tiny_tokenizer(), "# Value model\n")
    assert torch.equal(ValueModel.load(str(tmp_path / "again"))(IDS), model(IDS))


def test_a_checkpoint_is_a_hugging_face_folder_without_pickle(tmp_path, llama_folder):
    model = build(llama_folder, 2, td_lambda=0.95, run_digest="abc")
    model.save(str(tmp_path), tiny_tokenizer(), "# A card\n")
    files = sorted_files(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert (tmp_path / "README.md").read_text() == "# A card\n"
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle"))]
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "vas_value"
    assert content["td_lambda"] == 0.95
    assert content["run_digest"] == "abc"
    assert content["backbone"]["num_hidden_layers"] == 2
    assert [objective["name"] for objective in content["objectives"]] == ["positive", "concise"]
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == content["tokenizer_digest"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_checkpoint_loads_in_the_precision_asked_for(tmp_path, dtype):
    model = tiny_value("llama", ("positive",))
    model.save(str(tmp_path), tiny_tokenizer(), "")
    again = ValueModel.load(str(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    tolerance = 1e-4 if dtype == torch.float64 else 0.5
    assert torch.allclose(again(IDS), model(IDS), atol=tolerance)


def test_a_scalar_and_a_built_model_round_trip(tmp_path, base_folder):
    model = build(base_folder, 2, "scalar").eval()
    for head in model.heads:
        torch.nn.init.normal_(head.linear.weight)
    model.save(str(tmp_path), tiny_tokenizer(), "")
    assert torch.equal(ValueModel.load(str(tmp_path))(IDS), model(IDS))


@pytest.mark.parametrize("where", ["nothing/here/at/all", "nobody/no-such-value-model", "/no/such/folder"])
def test_a_missing_checkpoint_is_one_clear_line(where):
    with pytest.raises(VasError, match="cannot load a value model: ") as caught:
        ValueModel.load(where)
    assert "\n" not in caught.value.what
    assert caught.value.where == where
    assert "config.json" in caught.value.mend


def test_a_base_model_is_no_value_model(llama_folder):
    with pytest.raises(VasError, match="cannot load a value model") as caught:
        ValueModel.load(llama_folder)
    assert caught.value.where == llama_folder


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_damaged_weights_are_one_clear_line(tmp_path, damage):
    tiny_value("llama", ("positive",)).save(str(tmp_path), tiny_tokenizer(), "")
    weights = tmp_path / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(VasError, match="cannot load a value model") as caught:
        ValueModel.load(str(tmp_path))
    assert "\n" not in caught.value.what


def test_different_tokenizers_are_an_error_that_names_both():
    model = tiny_value("llama", ("positive",))
    ours, other = tokenizer_digest(tiny_tokenizer()), tokenizer_digest(tiny_tokenizer("<|stop|>"))
    assert ours != other
    check_tokenizers(model.config, "tiny-llama", ours)
    with pytest.raises(VasError, match="different tokenizers") as caught:
        check_tokenizers(model.config, "another-model", other)
    for part in ("tiny-llama", ours, "another-model", other):
        assert part in str(caught.value)
