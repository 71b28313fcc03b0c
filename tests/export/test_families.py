"""Exported weights do what the hooks did, family by family, reloaded from disk."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusal_mi.export import plan
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.export.export import export_checkpoint
from refusal_mi.export.plan import plan_export
from refusal_mi.export.rewrite import rewrite
from refusal_mi.interventions import Ablate
from refusal_mi.model import families
from refusal_mi.model.loading import load_model
from refusal_mi.weights import Projection
from tests.helpers.directions import random_direction
from tests.helpers.exports import (
    EXACT,
    FUSED_EXPERTS,
    INSIDE_TOWERS,
    OTHER_POST_NORM,
    OTHERS,
    POST_NORM,
    SWITCHED_OFF,
    hooked_logits,
    largest_component,
    plain_logits,
    save_model,
    some_tokens,
)
from tests.helpers.tiers import first_is_fast


def test_every_family_that_is_known_is_tried_here():
    assert set(families.FAMILIES) == {*EXACT, *POST_NORM, *OTHERS, *INSIDE_TOWERS}
    page = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    assert [name for name in OTHERS if not re.search(rf"\b{name}\b", page)] == []


def by_rounding(source, copy):
    """How far plain float32 logits move where every weight is another float32 number within half a unit of its last
    digit: families of fused experts have no float64 to be compared in, and some amplify this (recurrent mixers: 6e-5,
    llama: 3e-6)."""
    shutil.copytree(source, copy)
    generator = torch.Generator().manual_seed(0)
    for file in copy.glob("*.safetensors"):
        held = load_file(file)
        noise = {name: 1 + 1.2e-7 * (torch.rand(each.shape, generator=generator) - 0.5) for name, each in held.items()}
        save_file({name: (each * noise[name]).to(each.dtype) for name, each in held.items()}, file, {"format": "pt"})
    return (plain_logits(copy) - plain_logits(source)).abs().max()


@pytest.mark.parametrize("family", first_is_fast((*EXACT, *(each for each in OTHERS if each not in OTHER_POST_NORM))))
def test_the_exported_weights_give_the_hooked_logits(family, tmp_path):
    ablation = Ablate(random_direction(1, scale=1.0))
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-6)):  # norms and softmax compute in float32 even in float64
        if dtype == "float64" and family in FUSED_EXPERTS:
            continue
        source = save_model(family, tmp_path / dtype, getattr(torch, dtype))
        export_checkpoint(source, ablation, tmp_path / f"{dtype}-out", verify="none")
        hooked = hooked_logits(source, [ablation], dtype)
        effect = (plain_logits(source, dtype) - hooked).abs().max()
        difference = (plain_logits(tmp_path / f"{dtype}-out", dtype) - hooked).abs().max()
        assert effect > 0.05
        rounding = by_rounding(source, tmp_path / "rounded") if family in FUSED_EXPERTS else 0
        assert difference <= max(limit * max(1, effect), 5 * rounding)


@pytest.mark.parametrize("family", first_is_fast(("llama", "gpt2", "gpt_oss")))
def test_an_edit_that_skips_one_writer_is_seen(family, tmp_path):
    source, ablation = save_model(family, tmp_path / "source"), Ablate(random_direction(1))
    planned = plan_export(source, ablation)
    hooked = hooked_logits(source, [ablation])
    skipped = [writer.name for writer in planned.layout.writers if writer.component == "mlp" and writer.layer == 1]
    edits = {name: edit for name, edit in planned.edits.items() if name not in skipped}
    assert len(edits) < len(planned.edits)
    export_checkpoint(source, ablation, tmp_path / "out", verify="none")
    exact = (plain_logits(tmp_path / "out") - hooked).abs().max()
    rewrite(planned.checkpoint, tmp_path / "out", edits, head=planned.untied_head)
    assert (plain_logits(tmp_path / "out") - hooked).abs().max() > 1e3 * exact


@pytest.mark.parametrize("family", first_is_fast((*POST_NORM, *OTHER_POST_NORM)))
def test_behind_a_post_norm_nothing_is_written_along_the_direction(family, tmp_path, monkeypatch):
    direction = random_direction(1)
    ablation = Ablate(direction)
    source = save_model(family, tmp_path / "source", torch.float64)
    export_checkpoint(source, ablation, tmp_path / "out", verify="none")
    assert largest_component(source, direction) > 0.1
    left = largest_component(tmp_path / "out", direction)
    # The coordinate that the norm switches off cannot be corrected by its own row.
    assert direction.unit[SWITCHED_OFF].abs() > 0.01
    assert left <= 1e-6

    monkeypatch.setattr(plan, "writer_projection", lambda basis, strength, gain: Projection(basis.T, basis, strength))
    export_checkpoint(source, ablation, tmp_path / "naive", verify="none")
    assert largest_component(tmp_path / "naive", direction) > 1e4 * max(left, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", POST_NORM)
def test_the_published_dual_edit_is_further_from_the_hooks(family, tmp_path, tiny_dir, monkeypatch):
    ablation, source = Ablate(random_direction(1)), tiny_dir(family)
    hooked = hooked_logits(source, [ablation])
    export_checkpoint(source, ablation, tmp_path / "ours", verify="none")
    ours = (plain_logits(tmp_path / "ours") - hooked).abs().mean()

    def dual(basis, strength=1.0, gain=None):
        rows = basis if gain is None else torch.linalg.qr((basis * gain).T).Q.T
        return Projection(rows.T, rows, strength)

    monkeypatch.setattr(plan, "writer_projection", dual)
    export_checkpoint(source, ablation, tmp_path / "dual", verify="none")
    assert (plain_logits(tmp_path / "dual") - hooked).abs().mean() > 2 * ours
    assert ours < 0.15 * (plain_logits(source) - hooked).abs().mean()


@pytest.mark.parametrize(
    "family", first_is_fast(("llama", "gpt2", "falcon", "gpt_oss", "mixtral", "qwen3_moe", "qwen2_moe"))
)
def test_without_the_writers_nothing_is_in_the_stream(family, tmp_path):
    """The tensors classified as writers are all of them: with them set to zero, the stream is zero everywhere."""
    source = save_model(family, tmp_path / "source")
    names = {writer.name for writer in plan_export(source, []).layout.writers}
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: torch.zeros_like(value) if name in names else value for name, value in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    model = load_model(source, device="cpu")
    _, cache = model.run_with_cache(some_tokens().tokens, names_filter=lambda name: name.endswith("hook_resid_post"))
    assert len(cache) >= 5
    assert all(stream.abs().max() == 0 for stream in cache.values())


@pytest.mark.parametrize("family", ("gpt_oss", "qwen3_moe"))
def test_square_expert_matrices_are_edited_along_the_right_axis(family, tmp_path):
    changes = {"intermediate_size": 32} if family == "gpt_oss" else {"moe_intermediate_size": 32}
    source, ablation = save_model(family, tmp_path / "source", **changes), Ablate(random_direction(1))
    experts = [t for n, t in open_checkpoint(source).tensors.items() if "down_proj" in n and not n.endswith("bias")]
    assert all(tensor.shape[-1] == tensor.shape[-2] == 32 for tensor in experts)
    export_checkpoint(source, ablation, tmp_path / "out", verify="none")
    assert (plain_logits(tmp_path / "out") - hooked_logits(source, [ablation])).abs().max() <= 1e-5
