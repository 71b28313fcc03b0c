"""Models that read images too: their language model is exported like any other, and the rest stays as it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from benchmarks.families import make
from refusal_mi.export.adapter import load_adapter
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.export.export import export_adapter, export_checkpoint, orthogonalize_
from refusal_mi.export.plan import plan_export
from refusal_mi.export.rewrite import rewrite
from refusal_mi.interventions import Ablate, Add, all_hooks
from refusal_mi.model.loading import load_model
from refusal_mi.model.readers import ModelWeights
from refusal_mi.model.running import all_logits, running
from refusal_mi.text.batches import left_pad
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast

TOWERS = ("llava", "gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
POST_NORM = {"gemma3"}
BATCH = left_pad([[5, 9, 33, 40, 71, 12], [8, 44, 90]], 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source(type)`: a random checkpoint."""
    made: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = make(model_type, tmp_path_factory.mktemp("tower") / model_type)
        return made[model_type]

    return of


@pytest.fixture(scope="module")
def hooked(source):
    """`hooked(type, steps)`: logits of the text tower under hooks, and of plain transformers."""

    def logits(model_type: str, *steps: Ablate | Add) -> torch.Tensor:
        model = load_model(source(model_type), device="cpu", dtype="float32")
        with torch.no_grad(), running(model, all_hooks(model, steps)):
            return all_logits(model, BATCH)[BATCH.mask.bool()]

    return logits


def plain(model: Path | torch.nn.Module) -> torch.Tensor:
    if isinstance(model, Path):
        model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        given = {"attention_mask": BATCH.mask, "position_ids": BATCH.position_ids}
        return model.eval()(BATCH.tokens, **given).logits[BATCH.mask.bool()]


def ablation() -> Ablate:
    return Ablate(random_direction(1, width=64, scale=1.0))


@pytest.mark.parametrize("model_type", first_is_fast(TOWERS))
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_exported_tower_gives_the_hooked_logits(model_type, is_tied, source, hooked, tmp_path):
    folder = tied(source(model_type), tmp_path / "source") if is_tied else source(model_type)
    model = load_model(folder, device="cpu", dtype="float32")
    with torch.no_grad(), running(model, all_hooks(model, [ablation()])):
        expected = all_logits(model, BATCH)[BATCH.mask.bool()]
    report = export_checkpoint(folder, ablation(), tmp_path / "out", verify="full")
    assert report.verification is not None and report.verification.passed
    effect = (plain(folder) - expected).abs().max()
    difference = (plain(tmp_path / "out") - expected).abs().max()
    assert difference <= (0.1 if model_type in POST_NORM else 1e-5) * effect
    assert any("images" in note for note in report.notes)


def tied(source: Path, folder: Path) -> Path:
    """The same model with the token embedding for its head."""
    model = AutoModelForImageTextToText.from_pretrained(source)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    assert not any(name.endswith("lm_head.weight") for name in open_checkpoint(folder).tensors)
    return folder


@pytest.mark.parametrize("model_type", first_is_fast(TOWERS))
def test_a_writer_that_is_left_out_is_seen_and_what_reads_images_stays(model_type, source, hooked, tmp_path):
    planned = plan_export(source(model_type), ablation())
    expected = hooked(model_type, ablation())
    export_checkpoint(source(model_type), ablation(), tmp_path / "out", verify="none")
    exact = (plain(tmp_path / "out") - expected).abs().mean()
    skipped = [writer.name for writer in planned.layout.writers if writer.component == "mlp" and writer.layer == 1]
    edits = {name: edit for name, edit in planned.edits.items() if name not in skipped}
    assert len(edits) < len(planned.edits)
    before, after = load_file(source(model_type) / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(planned.edits) and not any("vis" in name or "projector" in name for name in changed)
    rewrite(planned.checkpoint, tmp_path / "out", edits, head=planned.untied_head)
    assert (plain(tmp_path / "out") - expected).abs().mean() > (1.2 if model_type in POST_NORM else 1e3) * exact


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TOWERS)
def test_streamed_adapter_in_memory_and_weights_agree(model_type, source, hooked, tmp_path):
    folder, expected = source(model_type), hooked(model_type, ablation())
    limit = (0.1 if model_type in POST_NORM else 1e-5) * (plain(folder) - expected).abs().max()
    streamed = export_checkpoint(folder, ablation(), tmp_path / "streamed", verify="streaming").verification
    assert streamed is not None and streamed.passed and streamed.max_effect > 0.05
    export_adapter(folder, ablation(), tmp_path / "adapter", verify="none")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert (plain(load_adapter(model, tmp_path / "adapter")) - expected).abs().max() <= limit
    edited = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert (plain(edited) - expected).abs().max() > 5 * limit
    orthogonalize_(edited, ablation())
    assert (plain(edited) - expected).abs().max() <= limit
    weights = ModelWeights(load_model(folder, device="cpu", dtype="float32"))  # block 1 has heads in all of them
    assert weights.head_rows(1).shape == (4, 16, 64) and weights.unembedding.shape[1] == 64


def test_a_held_tower_is_exported_as_its_folder_until_its_config_changes(source, tmp_path):
    model = load_model(source("qwen3_vl"), device="cpu")
    report = export_checkpoint(model, ablation(), tmp_path / "same", verify="none")
    assert report.source == str(source("qwen3_vl"))
    model.original_model.config.text_config.rms_norm_eps = 0.5
    report = export_checkpoint(model, ablation(), tmp_path / "changed", verify="none")
    assert report.source.endswith("as it was in memory")


def test_names_of_before_are_read_and_written_as_they_are(source, hooked, tmp_path):
    """Published folders have `language_model.model.*`, and a tied head that is saved gets a name of that kind."""
    folder = tied(source("gemma3"), tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    old = {re_old(name): value for name, value in weights.items()}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    report = export_checkpoint(folder, ablation(), tmp_path / "out", verify="full")
    assert report.verification is not None and report.verification.passed and report.is_untied
    names = set(open_checkpoint(tmp_path / "out").tensors)
    assert names == {*old, "language_model.lm_head.weight"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not config["tie_word_embeddings"] and not config["text_config"]["tie_word_embeddings"]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert torch.equal(head, old["language_model.model.embed_tokens.weight"]) and not torch.equal(head, embedding)


def re_old(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith("language_model.model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name
