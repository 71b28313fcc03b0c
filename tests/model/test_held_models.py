"""Every way to name a model gives the same model: folder, GGUF file, HF model, bridge, split over devices."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from refusal_mi import Ablate
from refusal_mi.cli import exit_status
from refusal_mi.cli.options import parse_device_map, parse_memory
from refusal_mi.errors import UserError
from refusal_mi.hub import replaced
from refusal_mi.interventions import all_hooks
from refusal_mi.model.loading import load_model, model_alias, resolve_source
from refusal_mi.model.points import model_source
from refusal_mi.model.provenance import check_origin, describe_model, fingerprint
from refusal_mi.model.readers import ModelWeights
from refusal_mi.model.running import all_logits, running
from refusal_mi.run.options import RunOptions, command_line
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.batches import left_pad
from tests.helpers.directions import random_direction
from tests.helpers.gguf import write_gguf_model
from tests.helpers.models import save_tiny, tiny_hf_model, tiny_tokenizer

ROWS = [[40, 50, 60, 70], [41, 51]]


def logits(model, *, is_ablated: bool) -> torch.Tensor:
    """Of two prompts, without or under an ablation."""
    batch = left_pad(ROWS, 0)
    what = [Ablate(random_direction(1))] if is_ablated else []
    with torch.no_grad(), running(model, all_hooks(model, what, batch.tokens.shape[1])):
        return all_logits(model, batch).cpu()


def hf(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def same(model, other) -> None:
    for is_ablated in (False, True):
        torch.testing.assert_close(logits(model, is_ablated=is_ablated), logits(other, is_ablated=is_ablated))
    assert not torch.allclose(logits(model, is_ablated=True), logits(other, is_ablated=False), atol=1e-3), "the control"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_an_hf_model_gives_the_folders_numbers(family, tiny_dir, tiny_model):
    held = hf(tiny_dir(family))
    model = load_model(held)
    same(model, tiny_model(family))
    assert model_source(model) == str(tiny_dir(family)) and model.tokenizer.chat_template
    assert next(model.parameters()).data_ptr() == next(held.parameters()).data_ptr()


def test_a_tokenizer_of_ones_own_is_used_as_it_is_and_no_hub_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("refusal_mi.hub.answers", lambda url: pytest.fail("asked"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}own {{ m['content'] }}{% endfor %}"
    model = load_model(tiny_hf_model("llama"), tokenizer=tokenizer)
    assert model.tokenizer.chat_template == tokenizer.chat_template
    assert model.tokenizer("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert "add_bos_token" not in tokenizer.init_kwargs


def test_an_edited_model_is_studied_as_it_is(tiny_dir, tiny_model):
    held = hf(tiny_dir("llama"))
    with torch.no_grad():
        held.model.layers[1].mlp.down_proj.weight.mul_(3)
    assert not torch.allclose(logits(load_model(held), is_ablated=False), logits(tiny_model("llama"), is_ablated=False))


def test_an_hf_model_has_one_bridge(tiny_dir, tiny_model):
    held = hf(tiny_dir("llama"))
    model = load_model(held)
    assert load_model(held) is model and load_model(model.original_model) is model
    same(model, tiny_model("llama"))
    with pytest.raises(UserError, match="give load_model the bridge"):
        load_model(load_model(tiny_dir("llama"), device="cpu").original_model)


def test_what_a_model_holds_is_recorded(tiny_dir):
    folder = str(tiny_dir("llama"))
    plain, again, edited = (load_model(hf(folder)) for _ in range(3))
    with torch.no_grad():
        edited.original_model.lm_head.weight[3, 3] += 1e-3
    one, same_one, other = (describe_model(each, folder).fingerprint for each in (plain, again, edited))
    assert one == same_one != other and one.startswith("held:")
    assert command_line(describe_model(edited, folder), RunOptions()).startswith("# the model was held in memory")
    loaded = load_model(folder, device="cpu")
    assert describe_model(loaded, folder).fingerprint == fingerprint(tiny_dir("llama"))
    assert command_line(describe_model(loaded, folder), RunOptions()).startswith("refusal-mi run")
    assert describe_model(load_model(loaded), folder).fingerprint.startswith("held:")
    made = [{"model": {"source": folder, "fingerprint": other, "revision": None}}]
    with pytest.warns(UserWarning, match="in memory"):
        check_origin(made, folder)


def test_a_model_that_names_no_place_is_not_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = load_model(tiny_hf_model("llama"), tokenizer=tiny_tokenizer())
    before = describe_model(model, model_source(model))
    (tmp_path / "new").write_text("a")
    assert describe_model(model, model_source(model)) == before and before.source == "LlamaForCausalLM"


def test_the_hub_is_not_asked_for_a_tokenizer(monkeypatch, tiny_dir, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("refusal_mi.hub.answers", lambda url: pytest.fail("asked"))
    for name in ("someone/none", str(tmp_path / "gone")):
        held = hf(tiny_dir("llama"))
        held.config._name_or_path = name
        with pytest.raises(UserError, match="tokenizer="):
            load_model(held)


def test_two_threads_that_replace_leave_things_as_they_were():
    holder, is_in, other_is_in = SimpleNamespace(value=0), Event(), Event()

    def first():
        with replaced(holder, "value", 1):
            is_in.set()
            other_is_in.wait(0.3)  # in vain: without the lock the other one keeps 1 for what was there

    def second():
        is_in.wait()
        with replaced(holder, "value", 2):
            other_is_in.set()
            time.sleep(0.1)
            assert holder.value == 2

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(first), pool.submit(second)]:
            each.result()
    assert holder.value == 0


def test_loading_leaves_other_libraries_as_they_were(tiny_dir, monkeypatch):
    from transformer_lens.model_bridge.sources.transformers import helpers
    from transformers import dynamic_module_utils

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def seen() -> tuple[bool, int, int]:
        processors = vars(helpers)["_MODALITY_PROCESSOR_LOADERS"]
        return constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE, len(processors)

    before = seen()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda family: load_model(tiny_dir(family), device="cpu"), ["llama", "gpt2", "gemma2"] * 2))
    assert seen() == before


def test_stages_of_an_edited_model_are_computed_again(tiny_dir, tmp_path):
    held, computed = load_model(hf(tiny_dir("llama"))), []

    def stage() -> None:
        def compute() -> None:
            computed.append(1)
            (tmp_path / "run" / "out.txt").write_text("x")

        inputs = {"model": describe_model(held, model_source(held))}
        RunFolder(tmp_path / "run").stage("s", inputs, ["out.txt"], compute)

    (tmp_path / "run").mkdir()
    stage()
    stage()
    assert len(computed) == 1
    with torch.no_grad():
        held.original_model.lm_head.weight[0, 0] += 1
    stage()
    assert len(computed) == 2


def test_models_that_cannot_be_hooked_say_what_to_do(tiny_dir):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = tiny_dir("llama")
    with pytest.raises(UserError, match="predicts no tokens"):
        load_model(AutoModelForSequenceClassification.from_pretrained(folder))
    with pytest.raises(UserError, match="compiled model"):
        load_model(torch.compile(hf(folder)))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(UserError, match="no weights"):
        load_model(empty, tokenizer=tiny_tokenizer())
    with pytest.raises(UserError, match="takes an HF tokenizer"):
        load_model(hf(folder), tokenizer=len)
    small = tiny_hf_model("llama", vocab_size=100, eos_token_id=0)
    with pytest.raises(UserError, match="another model's"):
        load_model(small, tokenizer=tiny_tokenizer())
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert len(padded) > padded.vocab_size
    assert load_model(hf(folder), tokenizer=padded).tokenizer.pad_token == "[PAD]"


def test_a_bridge_is_taken_as_it_is(own_model, tiny_model):
    assert load_model(own_model) is own_model
    same(own_model, tiny_model("llama"))


def test_a_bridge_with_centred_weights_is_refused(tiny_dir):
    model = load_model(tiny_dir("gpt2"), device="cpu")
    model.process_weights()
    with pytest.raises(UserError, match="centred"):
        load_model(model)


@pytest.mark.parametrize("how", [{"device": "cpu"}, {"dtype": "bfloat16"}, {"revision": "v1"}, {"device_map": "auto"}])
def test_a_held_model_stays_where_it_is(how, own_model):
    with pytest.raises(UserError, match="loaded already"):
        load_model(own_model, **how)


def test_what_is_no_model_is_refused():
    with pytest.raises(UserError, match="from a Linear"):
        load_model(nn.Linear(2, 2))
    with pytest.raises(UserError, match="tokenizer"):
        load_model(tiny_hf_model("llama"))
    with pytest.raises(UserError, match="brings its own"):
        load_model(tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny qwen2 as a GGUF file, and as a folder."""
    root = tmp_path_factory.mktemp("gguf")
    folder = save_tiny("qwen2", root / "folder")
    return write_gguf_model(folder, root / "tiny-qwen2.gguf"), folder


def test_a_gguf_file_gives_the_folders_numbers(gguf_file):
    file, folder = gguf_file
    model = load_model(file, device="cpu")
    same(model, load_model(folder, device="cpu"))
    chat = [{"role": "user", "content": "Hello there"}]
    expected = tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == expected
    assert model.tokenizer(expected)["input_ids"] == tiny_tokenizer()(expected)["input_ids"]


def test_a_gguf_file_is_known_by_its_contents(gguf_file, tmp_path):
    file, _ = gguf_file
    other = tmp_path / "weights.bin"
    other.write_bytes(file.read_bytes())
    assert resolve_source(other) == str(other) and model_alias(other) == "weights.bin"
    record = describe_model(load_model(other, device="cpu"), str(other))
    assert record.fingerprint == fingerprint(other) and record.quantization is None
    other.write_bytes(file.read_bytes() + b"more")
    assert fingerprint(other) != record.fingerprint
    other.write_bytes(b"none")
    with pytest.raises(UserError, match="no such model"):
        load_model(other)


@pytest.mark.parametrize("keep", [4, 40, 4000])
def test_a_damaged_gguf_file_is_one_line(gguf_file, tmp_path, capsys, keep):
    file, _ = gguf_file
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:keep])
    assert exit_status(["run", str(tmp_path / "half.gguf"), f"--output-dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot load the model in ")
    assert not (tmp_path / "run").exists()


def test_a_gguf_file_beside_an_adapter_asks_no_hub(gguf_file, tmp_path, monkeypatch):
    file, _ = gguf_file
    (tmp_path / "a.gguf").write_bytes(file.read_bytes())
    assert load_model(tmp_path / "a.gguf", device="cpu")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base", "peft_type": "LORA"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *what, **how: asked.append(what))
    with pytest.raises(UserError, match="put the file into another folder"):
        load_model(tmp_path / "a.gguf", device="cpu")
    assert not asked


def test_a_gguf_file_is_not_exported(gguf_file, tmp_path, capsys):
    file, _ = gguf_file
    random_direction(1).save(tmp_path / "direction.pt")
    arguments = [f"--direction={tmp_path / 'direction.pt'}", f"--output-dir={tmp_path / 'new'}"]
    assert exit_status(["export", str(file), *arguments]) == 2
    assert "export the checkpoint that it was made from" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


SPLIT = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.layers.4": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def test_a_model_that_lies_on_cpu_and_disk_gives_the_folders_numbers(tiny_dir, tiny_model, tmp_path):
    model = load_model(tiny_dir("llama"), device_map=SPLIT)
    assert any(parameter.is_meta for parameter in model.original_model.parameters()), "something is on disk"
    same(model, tiny_model("llama"))
    record = describe_model(model, str(tiny_dir("llama")))
    assert record.is_split and not describe_model(tiny_model("llama"), "x").is_split
    assert "--device-map auto" in command_line(record, RunOptions())
    with pytest.raises(UserError, match="offloaded"):
        ModelWeights(model)


def test_options_that_contradict_each_other_are_refused(tiny_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for how, message in (
        ({"device": "cpu", "device_map": "auto"}, "leave --device out"),
        ({"max_memory": {"cpu": "1GB"}}, "say --device-map"),
        ({"quantization": "bnb-4bit"}, "needs a CUDA GPU"),
        ({"device_map": {"": True}}, "a device for every module"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(tiny_dir("llama"), **how)


def test_device_maps_and_sizes_as_they_are_written():
    assert parse_device_map(None) is None and parse_device_map("auto") == "auto"
    assert parse_device_map(json.dumps(SPLIT)) == SPLIT
    assert parse_memory("0=20GiB, cpu=60GiB") == {0: "20GiB", "cpu": "60GiB"} and parse_memory(None) is None
    for wrong in ("{", '{"a": null}', '{"": true}'):
        with pytest.raises(UserError, match="--device-map"):
            parse_device_map(wrong)
    for wrong in ("20GiB", "0=much", "tpu=1GiB", "cpu=1.2.3GB", ""):
        with pytest.raises(UserError, match="--max-memory"):
            parse_memory(wrong)
