"""Lens, projections, token map and PCA against what they are computed from."""

import pytest
import torch
from sklearn.metrics import silhouette_score

from refusal_mi.analysis.lens import refusal_lens
from refusal_mi.analysis.pca import residual_pca
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.token_map import map_tokens
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate
from refusal_mi.measures import next_token_logits, refusal_score
from refusal_mi.reading import template_residuals
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, HARMFUL, HARMLESS, TOKENS, grid_of

GROUPS = {"harmful": HARMFUL, "harmless": HARMLESS}


@pytest.fixture
def llama(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    return model, chat, grid_of(model, chat).direction(-1, 3)


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite", "olmo2"])
def test_the_lens_at_the_last_layer_is_the_models_own_score(tiny_model, family):
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    result = refusal_lens(model, chat, HARMFUL, HARMLESS, TOKENS, n_controls=1)
    own = refusal_score(next_token_logits(model, chat, [*HARMFUL, *HARMLESS]), TOKENS)
    torch.testing.assert_close(result.scores[:, -1], own, rtol=1e-5, atol=1e-6)
    assert (result.scores[:, 3] - own).abs().max() > 0.01


def test_the_lens_in_the_middle_is_norm_then_unembedding(llama):
    model, chat, _ = llama
    result = refusal_lens(model, chat, HARMFUL, HARMLESS, TOKENS, n_controls=1)
    x = template_residuals(model, chat, HARMFUL, layers=[2], n_last=1)[:, 0, 0].double()
    hf = model.original_model
    gain, unembedding = (dict(hf.named_parameters())[name].double() for name in _final_names(hf))
    logits = (x / (x.square().mean(-1, keepdim=True) + hf.config.rms_norm_eps).sqrt() * gain) @ unembedding.T
    torch.testing.assert_close(result.of("harmful")[:, 2], refusal_score(logits.detach(), TOKENS), rtol=1e-5, atol=1e-5)


def _final_names(hf):
    names = [name for name, _ in hf.named_parameters()]
    find = lambda start: next(name for name in names if name.startswith(start) and name.endswith("weight"))  # noqa: E731
    return find("model.norm"), find("lm_head")


def test_before_any_block_the_template_says_nothing(llama):
    model, chat, direction = llama
    lens = refusal_lens(model, chat, HARMFUL, HARMLESS, TOKENS, n_controls=4)
    assert lens.gap[0] == 0 and bool((lens.control_gaps[:, 0] == 0).all())
    assert lens.gap[3].abs() > 1e-4
    pca = residual_pca(model, chat, direction, GROUPS, layers=(0, 3))
    assert not bool(pca.coordinates[0].any()) and bool(pca.coordinates[1].any())
    assert bool(pca.separation[0].isnan()) and not bool(pca.separation[1].isnan())


def test_random_token_sets_leave_the_refusal_tokens_out(llama):
    model, chat, _ = llama
    everything = range(model.cfg.d_vocab)
    others = [token for token in everything if token not in TOKENS]
    result = refusal_lens(model, chat, HARMFUL, HARMLESS, others, n_controls=2)
    only = refusal_lens(model, chat, HARMFUL, HARMLESS, TOKENS, n_controls=1)
    torch.testing.assert_close(result.control_gaps[0], only.gap, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_those_of_hf_hidden_states(tiny_model, family):
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    direction = grid_of(model, chat).direction(-1, 3)
    result = project_residuals(model, chat, direction, GROUPS)
    row, slot, layer = 4, 2, 3
    with torch.no_grad():
        ids = torch.tensor([chat.encode(HARMFUL[row])])
        hidden = model.original_model(ids, output_hidden_states=True).hidden_states[layer][0].double()
    x = hidden[result.positions[slot]]
    torch.testing.assert_close(result.projections[row, slot, layer], x @ direction.unit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.cosines[row, slot, layer], x @ direction.unit / x.norm(), rtol=1e-4, atol=1e-5)


def test_ablation_removes_the_projection_and_not_the_control(llama):
    model, chat, direction = llama
    plain = project_residuals(model, chat, direction, GROUPS)
    ablated = project_residuals(model, chat, direction, GROUPS, interventions=[Ablate(direction)])
    scale = plain.projections.abs().max()
    assert scale > 0.1
    assert ablated.projections.abs().max() < 1e-5 * scale
    assert ablated.control_projections.abs().max() > 0.1 * plain.control_projections.abs().max()


def test_the_difference_of_means_projects_onto_its_own_norm(llama):
    model, chat, direction = llama
    result = project_residuals(model, chat, direction, GROUPS)
    slot = result.positions.index(-1)
    means = [result.projections[result.rows(group), slot, 3].mean() for group in GROUPS]
    assert (means[0] - means[1]).item() == pytest.approx(direction.norm, rel=1e-5)


def test_the_token_map_agrees_with_the_projections(llama):
    model, chat, direction = llama
    result = map_tokens(model, chat, direction, HARMFUL[1])
    other = project_residuals(model, chat, direction, {"one": [HARMFUL[1]]})
    n = len(other.positions)
    torch.testing.assert_close(result.projections[-n:], other.projections[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.control_cosines[-n:], other.control_cosines[0], rtol=1e-5, atol=1e-6)
    assert len(result.tokens) == len(chat.encode(HARMFUL[1])) and result.n_template == len(chat.positions)


def test_all_components_keep_every_distance(llama):
    model, chat, direction = llama
    n = len(HARMFUL) + len(HARMLESS)
    result = residual_pca(model, chat, direction, GROUPS, layers=(3,), n_components=n - 1)
    x = template_residuals(model, chat, [*HARMFUL, *HARMLESS], layers=[3], n_last=1)[:, 0, 0].double()
    torch.testing.assert_close(torch.cdist(result.coordinates[0], result.coordinates[0]), torch.cdist(x, x))
    assert result.explained[0].sum().item() == pytest.approx(1)
    variances = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)[: n - 1]
    torch.testing.assert_close(result.explained[0], variances / variances.sum())
    assert bool((result.direction_cosines >= 0).all())


def test_silhouette_is_scikit_learns(llama):
    model, chat, direction = llama
    groups = {"harmful": HARMFUL, "harmless": HARMLESS[:4], "others": ("12", "345 6", "7")}
    result = residual_pca(model, chat, direction, groups, layers=(3, 5))
    for points, ours in zip(result.coordinates, result.separation, strict=True):
        assert ours.item() == pytest.approx(silhouette_score(points.numpy(), list(result.groups)), rel=1e-6)
    assert result.separation.abs().min() > 0.01


def test_what_cannot_be_asked(llama):
    model, chat, direction = llama
    with pytest.raises(UserError, match="no position 3"):
        refusal_lens(model, chat, HARMFUL, HARMLESS, TOKENS, position=3)
    with pytest.raises(UserError, match="at least one prompt"):
        project_residuals(model, chat, direction, {"empty": []})
    with pytest.raises(UserError, match="outcomes"):
        residual_pca(model, chat, direction, GROUPS, outcomes={"harmful": ["refused"]})
