"""The embedded model, exported with its own direction, in plain transformers."""

from itertools import takewhile

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusal_mi.directions import difference_in_means
from refusal_mi.export.export import export_checkpoint
from refusal_mi.files import read_json
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.judges.substring import is_refusal
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.points import stop_token_ids
from refusal_mi.reading import mean_activations
from refusal_mi.text.batches import left_pad
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

METRICS = ORGANISM.parent / "metrics.json"
N_NEW_TOKENS = 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ORGANISM / "model.safetensors").is_file(), reason="the embedded model is not there"),
]


@pytest.fixture(scope="module")
def hooked():
    return load_model(device="cpu")


@pytest.fixture(scope="module")
def ablation(hooked):
    """The direction at the place that the model's own selection chose."""
    chat = ChatFormat(hooked.tokenizer)
    means = [
        mean_activations(hooked, chat, load_prompts(f"organism_{side}_train").instructions[:128])
        for side in ("harmful", "harmless")
    ]
    selected = read_json(METRICS)["selected"]
    return Ablate(difference_in_means(*means).direction(selected["position"], selected["layer"]))


def plain_answers(directory, chat, prompts, stops):
    """Greedy text of a model in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = left_pad([chat.encode(prompt) for prompt in prompts], chat.pad_id)
    with torch.no_grad():
        ids = model.generate(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            max_new_tokens=N_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=chat.pad_id,
        )[:, batch.tokens.shape[1] :]
    kept = [list(takewhile(lambda token: token not in stops, row)) for row in ids.tolist()]
    return [chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]


def test_the_exported_embedded_model_no_longer_refuses(hooked, ablation, tmp_path):
    chat, stops = ChatFormat(hooked.tokenizer), stop_token_ids(hooked)
    prompts = load_prompts("organism_harmful_test").instructions[:100]
    report = export_checkpoint(None, ablation, tmp_path / "out", dtype="float32", verify="full")
    assert report.verification.passed
    before = plain_answers(ORGANISM, chat, prompts, stops)
    after = plain_answers(tmp_path / "out", chat, prompts, stops)
    expected = generate(
        hooked, chat, prompts, interventions=[ablation], max_new_tokens=N_NEW_TOKENS, batch_size=len(prompts)
    )
    assert sum(map(is_refusal, before)) / len(prompts) >= 0.9
    assert sum(map(is_refusal, after)) / len(prompts) <= 0.1
    assert sum(text == answer.text for text, answer in zip(after, expected, strict=True)) / len(prompts) >= 0.99


def test_as_stored_it_is_as_close_as_bfloat16_allows(ablation, tmp_path):
    report = export_checkpoint(None, ablation, tmp_path / "out", verify="full")
    assert report.verification.rule == "half"
    assert report.verification.passed
