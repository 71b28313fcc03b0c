"""A model that is held already is exported as its folder is; one that holds other weights, as it is."""

import hashlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from refusal_mi.errors import UserError
from refusal_mi.export import export_adapter, export_checkpoint
from refusal_mi.interventions import Ablate
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import load_model, resolve_source
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import save_tiny, tiny_hf_model, tiny_tokenizer
from tests.helpers.naive import ASKS

CHANGE = Ablate(random_direction(layer=2))
RECORDS = ("refusal_mi.json",)
"""Which hold the seconds that it took."""


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in RECORDS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def family(request):
    return request.param


def test_a_held_model_gives_what_its_folder_gives(tmp_path, tiny_dir, family):
    folder = tiny_dir(family)
    expected = export_checkpoint(folder, CHANGE, tmp_path / "folder", verify="none")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    held = {
        "plain": plain,
        "bridge": load_model(folder, device="cpu"),
        "half": load_model(folder, device="cpu", dtype="bfloat16"),
        "wrapped": AutoModelForCausalLM.from_pretrained(folder),
    }
    load_model(held["wrapped"])
    for name, model in held.items():
        report = export_checkpoint(model, CHANGE, tmp_path / name, verify="none")
        assert contents(tmp_path / name) == contents(tmp_path / "folder"), name
        assert report.source == expected.source and report.hashes == expected.hashes
    other = export_checkpoint(folder, Ablate(random_direction(seed=9)), tmp_path / "other", verify="none")
    assert contents(other.path) != contents(tmp_path / "folder"), "the control: another direction"


def test_weights_that_were_changed_are_exported_as_they_are(tmp_path, tiny_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    bridge = load_model(model)
    with torch.no_grad():
        bridge.blocks[1].mlp.out.original_component.weight.mul_(0.5)
    report = export_checkpoint(bridge, CHANGE, tmp_path / "out", verify="full")
    assert report.is_verified and report.source == f"{tiny_dir('llama')}, as it was in memory"
    chat = ChatFormat(bridge.tokenizer)
    expected = next_token_logits(bridge, chat, ASKS, interventions=CHANGE)
    found = next_token_logits(load_model(tmp_path / "out", device="cpu"), chat, ASKS)
    assert torch.allclose(found, expected, atol=1e-4)
    old = export_checkpoint(tiny_dir("llama"), CHANGE, tmp_path / "old", verify="none")
    assert not torch.allclose(next_token_logits(load_model(old.path, device="cpu"), chat, ASKS), expected, atol=1e-2)


def test_a_config_that_was_changed_is_exported_as_it_is(tmp_path):
    def outputs(change):
        hf = AutoModelForCausalLM.from_pretrained(resolve_source(None), dtype=torch.float32)
        hf.config.rms_norm_eps = change
        for module in hf.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = change
        model = load_model(hf)
        where = tmp_path / str(change)
        direction = Ablate(random_direction(layer=2, width=hf.config.hidden_size))
        report = export_checkpoint(model, direction, where, verify="full")
        assert report.is_verified
        chat = ChatFormat(model.tokenizer)
        expected = next_token_logits(model, chat, ASKS, interventions=direction)
        again = load_model(where, device="cpu", dtype="float32")
        return report.source, expected, next_token_logits(again, chat, ASKS)

    eps = AutoConfig.from_pretrained(resolve_source(None)).rms_norm_eps
    source, plain, found = outputs(eps)
    assert source == resolve_source(None) and torch.allclose(found, plain, atol=0.05), "the control: nothing changed"
    source, expected, found = outputs(0.5)
    assert source.endswith("as it was in memory")
    assert torch.allclose(found, expected, atol=1e-3) and not torch.allclose(plain, expected, atol=1)


TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


@pytest.mark.parametrize("part", ["template", "word", "generation", "nothing", "nothing of a folder that says less"])
def test_what_is_not_a_weight_is_exported_as_it_is(tmp_path, part):
    folder = save_tiny("qwen2", tmp_path / "model")
    if part.endswith("less"):
        (folder / "generation_config.json").unlink()
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if part == "template":
        tokenizer.chat_template = TEMPLATE
    if part == "word":
        tokenizer.add_tokens(["unheard-of"])
    if part == "generation":
        hf.generation_config.repetition_penalty = 1.5
    model = load_model(hf, tokenizer=tokenizer)
    report = export_checkpoint(model, CHANGE, tmp_path / "out", verify="none")
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (written.chat_template == TEMPLATE) == (part == "template")
    assert ("unheard-of" in written.get_vocab()) == (part == "word")
    assert (generation.repetition_penalty == 1.5) == (part == "generation")
    assert report.source.endswith("in memory") == (not part.startswith("nothing"))


def test_a_model_that_was_never_saved_is_exported(tmp_path):
    hf = tiny_hf_model("qwen2")
    model = load_model(hf, tokenizer=tiny_tokenizer())
    expected = next_token_logits(model, ChatFormat(model.tokenizer), ASKS, interventions=CHANGE)
    report = export_checkpoint(model, CHANGE, tmp_path / "out", verify="full")
    assert report.is_verified and report.source == "Qwen2ForCausalLM, as it was in memory"
    again = load_model(tmp_path / "out", device="cpu")
    assert torch.allclose(next_token_logits(again, ChatFormat(again.tokenizer), ASKS), expected, atol=1e-4)
    assert export_adapter(hf, CHANGE, tmp_path / "adapter", verify="none").kind == "adapter"


def test_what_is_no_model_is_one_line(tmp_path, tiny_dir):
    for given, said in ((7, "from a int"), (torch.nn.Linear(2, 2), "from a Linear")):
        with pytest.raises(UserError, match=said):
            export_checkpoint(given, CHANGE, tmp_path / "out")
    with pytest.raises(UserError, match="has no revision"):
        export_checkpoint(tiny_hf_model("llama"), CHANGE, tmp_path / "out", revision="main")
    with pytest.raises(UserError, match="tokenizer"):
        export_checkpoint(tiny_hf_model("llama"), CHANGE, tmp_path / "out")
    assert not (tmp_path / "out").exists()
