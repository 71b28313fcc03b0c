"""The comparison itself: both ways of running it agree, see a wrong export, and fail before the work is done."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusal_mi.errors import UserError
from refusal_mi.export import export as export_module
from refusal_mi.export import verify as compare
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.export.export import export_adapter, export_checkpoint
from refusal_mi.export.rewrite import rewrite
from refusal_mi.export.streaming import same_tokens, stream_answers
from refusal_mi.interventions import Ablate
from refusal_mi.text.batches import left_pad
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.exports import save_model
from tests.helpers.models import tiny_tokenizer

pytestmark = pytest.mark.slow

R = random_direction(1)
PROMPTS = ["Count slowly and aloud to ten, then back again, past a sliding window", "Why?"]


def _only(n):
    """An export that edits the first writers only."""
    return lambda source, target, edits, **options: rewrite(source, target, dict(list(edits.items())[:n]), **options)


def _both_ways(source, what, folder):
    reports = [
        export_checkpoint(source, what, folder / mode, verify=mode, prompts=PROMPTS) for mode in ("full", "streaming")
    ]
    assert [report.verification.mode for report in reports] == ["full", "streaming"]
    return [report.verification for report in reports]


def _assert_equal(full, streaming):
    assert abs(full.max_logit_difference - streaming.max_logit_difference) <= 1e-5
    assert full.max_effect == pytest.approx(streaming.max_effect, rel=1e-3)
    assert full.mean_kl_nats == pytest.approx(streaming.mean_kl_nats, rel=1e-3, abs=1e-9)
    assert full.same_greedy == streaming.same_greedy
    assert full.n_new_tokens == streaming.n_new_tokens
    assert full.passed == streaming.passed


@pytest.mark.parametrize("family", ("gemma2", "mixtral", "gpt_oss", "falcon"))
def test_streaming_finds_what_the_whole_models_find(family, tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr(compare, "N_NEW", 4)
    full, streaming = _both_ways(tiny_dir(family), Ablate(R, strength=0.7), tmp_path)
    _assert_equal(full, streaming)


def test_both_find_the_same_fault_in_a_wrong_export(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr(export_module, "rewrite", _only(3))
    full, streaming = _both_ways(tiny_dir("qwen2"), Ablate(R), tmp_path)
    _assert_equal(full, streaming)
    assert full.max_logit_difference > 0.05
    assert full.same_greedy < 1
    assert full.n_new_tokens == 32
    assert not full.passed


@pytest.mark.parametrize("family", ("gemma2", "gpt2"))
def test_streamed_greedy_text_is_that_of_generate_whatever_was_guessed(family, tiny_dir):
    batch, n_new = left_pad([[5, 60, 9, 200], [7, 30, 31, 32, 33, 80]], 0), 12
    model = AutoModelForCausalLM.from_pretrained(tiny_dir(family), attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    expected = model.generate(
        input_ids=batch.tokens, attention_mask=batch.mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
    )[:, 6:]
    noise = torch.randint(0, 250, (2, n_new), generator=torch.Generator().manual_seed(0))
    stop = int(expected[0, 5])
    for stops in ((), (stop,)):
        checkpoint = open_checkpoint(tiny_dir(family))
        for guess in (None, noise, expected[:, :3]):
            found = stream_answers(checkpoint, (), batch, "float32", 4, stops, n_new=n_new, guess=guess)
            assert same_tokens(found.new_ids, expected, stops) == 1
            assert same_tokens(found.new_ids, noise, stops) < 0.2
            assert found.logits.shape[0] == 8


def test_equal_tokens_are_counted_up_to_the_stop():
    one, other = torch.tensor([[1, 2, 9, 4], [1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 5], [1, 9, 3, 4]])
    assert same_tokens(one, other, (9,)) == 3 / 6
    assert same_tokens(one, other, ()) == 6 / 8


def test_the_generation_settings_of_a_checkpoint_are_no_part_of_the_comparison(tmp_path):
    """A repetition penalty would act on the export and not on the hooked model."""
    source = save_model("qwen2", tmp_path / "source")
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 5.0}))
    report = export_checkpoint(source, Ablate(R), tmp_path / "out", verify="full", prompts=PROMPTS)
    assert report.verification.same_greedy == 1


def test_an_edit_that_no_norm_follows_is_held_to_the_exact_limit(tmp_path):
    source = save_model("gemma2", tmp_path / "source")
    report = export_checkpoint(
        source, Ablate(R, components=["embed"]), tmp_path / "out", verify="full", prompts=PROMPTS
    )
    assert report.verification.rule == "float32"
    assert report.verification.passed
    assert not any("norm follows" in note for note in report.notes)


def test_behind_a_post_norm_every_position_is_compared(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr(compare, "N_NEW", 1)
    n_tokens = len(ChatFormat(tiny_tokenizer()).encode(PROMPTS[0]))
    assert n_tokens > 2 * compare.N_LAST
    for family, n in (("gemma2", n_tokens), ("qwen2", compare.N_LAST)):
        for mode in ("full", "streaming"):
            out = tmp_path / family / mode
            report = export_checkpoint(tiny_dir(family), Ablate(R), out, verify=mode, prompts=PROMPTS[:1])
            assert report.verification.n_positions == n


def test_auto_streams_what_does_not_fit_in_memory(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr(compare, "N_NEW", 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**16))
    report = export_checkpoint(tiny_dir("qwen2"), Ablate(R), tmp_path / "out", prompts=PROMPTS)
    assert report.verification.mode == "streaming"
    with pytest.raises(UserError, match="--verify full"):
        export_adapter(tiny_dir("qwen2"), Ablate(R), tmp_path / "adapter", prompts=PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_comparison_needs_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    source = save_model("qwen2", tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()

    def never(*arguments, **options):
        raise AssertionError("written before it was known that there is no tokenizer")

    monkeypatch.setattr(export_module, "rewrite", never)
    with pytest.raises(UserError, match="tokenizer"):
        export_checkpoint(source, Ablate(R), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_overflow_is_reported_and_the_report_kept(tmp_path, monkeypatch):
    source = save_model("qwen2", tmp_path / "source")

    def overflowing(source, target, edits, **options):
        done = rewrite(source, target, edits, **options)
        path = target / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4096:] = b"\xff" * 4096
        path.write_bytes(data)
        return done

    monkeypatch.setattr(export_module, "rewrite", overflowing)
    report = export_checkpoint(source, Ablate(R), tmp_path / "out", verify="streaming", prompts=PROMPTS)
    assert report.is_verified is False
    record = json.loads((tmp_path / "out" / "refusal_mi.json").read_text())
    assert record["verification"]["max_logit_difference"] is None
    assert (tmp_path / "out" / "UNVERIFIED").is_file()
    assert record["verification"]["max_effect"] == pytest.approx(report.verification.max_effect)
