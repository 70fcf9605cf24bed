"""Hugging Face sequence classifiers as rewards: what they read, and what a wrong one is told."""

import json
import os
import subprocess
import sys

import pytest
import torch
from rewarded import ASK, load, scores
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from vas.errors import VasError
from vas.rewards import score
from vas.schema import Prompt

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "<eos>",
    "tell",
    "me",
    "good",
    "bad",
    "user",
    "assistant",
    ":",
]
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos>{% endfor %}"


def tokenizer(**special):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def settings(**more):
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 32}
    return {**sizes, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24, **more}


def randomised(model):
    """Weights large enough for texts to get clearly different scores."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A one-logit reward model with a chat template and no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    words = tokenizer(eos_token="<eos>")
    words.chat_template = CHAT
    words.save_pretrained(folder)
    model = LlamaForSequenceClassification(LlamaConfig(**settings(num_labels=1, pad_token_id=None)))
    randomised(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A two-label classifier that reads text pairs."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(folder)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    randomised(BertForSequenceClassification(BertConfig(**settings(id2label=labels)))).save_pretrained(folder)
    return folder


RESPONSES = ["good", "bad bad bad", "me good bad tell me", "", "tell"]


def test_hf_chat_model_equals_the_model_called_by_hand(llama):
    model = LlamaForSequenceClassification.from_pretrained(llama)
    words = PreTrainedTokenizerFast.from_pretrained(llama)
    by_hand = []
    for response in RESPONSES:  # alone, so that no padding is involved; the last token is EOS
        ids = words(f"user : tell me <eos>assistant : {response} <eos>", add_special_tokens=False)["input_ids"]
        assert ids[-1] == words.eos_token_id
        by_hand.append(model(torch.tensor([ids])).logits.item())
    assert len({round(value, 3) for value in by_hand}) == len(RESPONSES)
    for batch_size in (1, 2, 16):
        values = scores(f"hf:{llama}", *RESPONSES, batch_size=batch_size, device="cpu")
        assert values == pytest.approx(by_hand, abs=1e-4)


def test_hf_pair_model_equals_the_model_called_by_hand(bert):
    model = BertForSequenceClassification.from_pretrained(bert)
    words = PreTrainedTokenizerFast.from_pretrained(bert)
    logits = torch.stack([model(**words("tell me", r, return_tensors="pt")).logits[0] for r in RESPONSES[:3]])
    responses, cpu = RESPONSES[:3], {"device": "cpu"}
    assert scores(f"hf:{bert}", *responses, **cpu) == pytest.approx(logits[:, 1].tolist(), abs=1e-4)
    assert scores(f"hf:{bert}", *responses, label=0, **cpu) == pytest.approx(logits[:, 0].tolist(), abs=1e-4)
    shares = logits.softmax(-1)[:, 0].tolist()
    assert scores(f"hf:{bert}", *responses, label="NEGATIVE", transform="probability", **cpu) == pytest.approx(
        shares, abs=1e-4
    )


def test_hf_probability_of_a_single_logit_is_its_sigmoid(llama):
    (logit,) = scores(f"hf:{llama}", "good", device="cpu")
    (probability,) = scores(f"hf:{llama}", "good", device="cpu", transform="probability")
    assert probability == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=1e-5)


def test_hf_reads_the_prompt_unless_told_not_to(bert):
    other = Prompt("q", text="bad bad bad")
    both = load(f"hf:{bert}", device="cpu")([ASK, other], ["good", "good"])
    alone = load(f"hf:{bert}", device="cpu", reads="response")([ASK, other], ["good", "good"])
    assert abs(both[0] - both[1]) > 1e-3
    assert alone[0] == pytest.approx(alone[1])


def test_hf_long_texts_keep_their_end(llama):
    long = "tell " * 60
    good, bad = scores(f"hf:{llama}", long + "good", long + "bad", device="cpu")
    assert abs(good - bad) > 1e-3
    assert len(scores(f"hf:{llama}", long, device="cpu", max_length=4)) == 1


def test_hf_row_without_a_token_is_marked_alone(tmp_path):
    words = tokenizer(eos_token="<eos>")
    words.save_pretrained(tmp_path)
    model = LlamaForSequenceClassification(LlamaConfig(**settings(num_labels=1, pad_token_id=None)))
    randomised(model).save_pretrained(tmp_path)
    reward = load(f"hf:{tmp_path}", device="cpu")
    rows = score({"it": reward}, [Prompt("e"), Prompt("f", text="tell")], ["", " me"])
    assert rows[0].error
    assert "nothing to score" in rows[0].error
    assert rows[1].error is None


def test_hf_labels_and_params_are_checked(bert):
    with pytest.raises(VasError, match=r"no label 'POSITVE'(.|\n)*'POSITIVE'"):
        load(f"hf:{bert}", label="POSITVE")
    with pytest.raises(VasError, match=r"no label 2(.|\n)*0 to 1"):
        load(f"hf:{bert}", label=2)
    with pytest.raises(VasError, match=r"'batchsize' is no param(.|\n)*'batch_size'"):
        load(f"hf:{bert}", batchsize=2)


def test_hf_version_follows_weights_and_params(bert, tmp_path):
    first = load(f"hf:{bert}").version
    assert load(f"hf:{bert}", batch_size=3, label="POSITIVE").version == first  # decide nothing
    assert load(f"hf:{bert}", label=0).version != first
    (bert / "README.md").write_text("about")
    assert load(f"hf:{bert}").version == first
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load(f"hf:{bert}").version != first
    (bert / "config.json").write_text(json.dumps(config))


def test_hf_refuses_a_model_without_a_trained_head(tmp_path):
    tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(**settings())).save_pretrained(tmp_path)
    reward = load(f"hf:{tmp_path}", device="cpu")
    with pytest.raises(VasError, match=r"lacks weights of a sequence classifier: score\.weight"):
        score({"it": reward}, [ASK], ["good"])


def test_hf_missing_model_is_one_clear_error(tmp_path):
    code = (
        "import sys\nfrom vas.config import Reward\nfrom vas.errors import VasError\n"
        "from vas.rewards import load_rewards\n"
        "try: load_rewards({'it': Reward(use='hf:' + sys.argv[1])})\n"
        "except VasError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    for model in ("nobody/nothing", str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", code, model], env=environment, capture_output=True, text=True, check=True
        )
        lines = done.stdout.strip().splitlines()
        assert lines[0].startswith(f"cannot load the reward model '{model}': ")
        assert "rewards.it.use" in lines[1]
        assert len(lines) == 3
