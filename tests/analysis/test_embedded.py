"""On the embedded model every analysis shows its effect, and its control does not."""

import pytest
import torch

from refusal_mi.analysis.attention import attend_by_region
from refusal_mi.analysis.attribution import attribute_direction
from refusal_mi.analysis.comparison import compare_directions
from refusal_mi.analysis.dose import dose_response
from refusal_mi.analysis.geometry import direction_geometry
from refusal_mi.analysis.harm import separate_harm
from refusal_mi.analysis.lens import refusal_lens
from refusal_mi.analysis.logits import direction_logits
from refusal_mi.analysis.patching import patch_activations
from refusal_mi.analysis.pca import residual_pca
from refusal_mi.analysis.probes import area_under_curve, linear_probes
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.token_map import map_tokens
from refusal_mi.analysis.trace import trace_generation
from refusal_mi.analysis.weights import weight_alignment
from refusal_mi.interventions import Ablate
from refusal_mi.model.loading import ORGANISM
from refusal_mi.notebook import searched
from refusal_mi.run.folder import RunInputs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")]
N = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunInputs:
    """The direction as `refusal-mi run` finds it, and held-out prompts."""
    return searched(folder=tmp_path_factory.mktemp("runs"), n_prompts=32)


@pytest.fixture(scope="module")
def groups(run) -> dict[str, list[str]]:
    return {side: run.prompts(side)[:N] for side in ("harmful", "harmless")}


def test_probes_are_at_chance_where_all_prompts_are_the_same_and_certain_later(run, groups):
    found = linear_probes(
        run.model, run.chat, *groups.values(), run.direction, positions=(-2, -1), n_folds=3, n_shuffles=1
    )
    assert (found.auc[:, :, 0] == 0.5).all() and not found.auc.isnan().any()
    best = found.auc[:, -1].amax(-1)
    assert (best >= 0.95).all() and (found.null_high[:, -1].amax(-1) < best).all()


def test_components_sum_to_the_projection_and_write_the_difference(run, groups):
    real, random = (
        attribute_direction(run.model, run.chat, direction, groups)
        for direction in (run.direction, run.direction.random_like(0))
    )
    for found in (real, random):
        for side in groups:
            sums, projections = found.sums(side), found.projections[side]
            assert ((sums - projections).abs() <= 1e-4 * projections.abs().mean()).all()
    heads = real.heads["harmful"]
    assert (real.sums("harmful") - heads[:, -1].sum(-1) - real.projections["harmful"]).abs().max() > 1e-3
    gaps = [found.projections["harmful"].mean() - found.projections["harmless"].mean() for found in (real, random)]
    assert gaps[0] > 4 * abs(gaps[1])


def test_one_patched_cell_carries_the_refusal_over_and_harmless_ones_do_not(run, groups):
    tokens, r = run.refusal_tokens, run.direction
    found = patch_activations(run.model, run.chat, *groups.values(), tokens, sites=["resid"], batch_size=N)
    effects, early = found.effects("resid"), int(0.8 * run.model.cfg.n_layers) + 1
    assert effects[:early].max() >= 0.8
    assert (found.patched["resid"][0, :, 0] == found.harmless_scores[:, None]).all()  # the template's own tokens
    assert found.control_effects("resid").abs().max() <= 0.2
    layer, cell = divmod(int(effects[:early].argmax()), effects.shape[1])
    sides = [side[:12] for side in groups.values()]
    along, random = (
        patch_activations(run.model, run.chat, *sides, tokens, sites=["resid"], layers=[layer], direction=direction)
        for direction in (r, r.random_like(0))
    )
    assert along.shares("resid")[0, cell] >= 0.4 and random.shares("resid")[0, cell].abs() <= 0.1
    same = [groups["harmless"][0]] * 2
    same = patch_activations(run.model, run.chat, groups["harmful"][:2], same, tokens, sites=["resid"])
    assert (same.controls["resid"] == same.harmless_scores[:, None, None]).all()


def test_the_direction_steers_and_random_ones_of_its_length_only_disturb(run, groups):
    sides = [side[:16] for side in groups.values()]
    found = dose_response(
        run.model,
        run.chat,
        run.direction,
        *sides,
        run.refusal_tokens,
        coefficients=(-1.0, 0.0, 1.0),
        strengths=(0.0, 1.0),
        n_random=6,
        n_random_answered=1,
        max_new_tokens=12,
    )
    for side in ("harmful", "harmless"):
        random = torch.tensor([found.steering(side, index) for index in range(1, 7)])
        assert found.steering(side) > max(
            2, 4 * random.square().mean().sqrt()
        ) and random.abs().max() < 0.5 * found.steering(side)
        assert abs(random.mean()) < 0.15 * found.steering(side)
        for curve in (f"add/{side}", f"ablate/{side}"):
            rates = found.refused[curve].mean(-1)
            assert (rates[1] - rates[1, 0]).abs().max() <= 0.2
    assert found.z("add/harmless")[-1] > 4 and found.z("add/harmful")[0] < -4 and found.z("ablate/harmful")[-1] < -4
    means = found.scores["ablate/harmful"][:7].mean(-1)
    swings = (means.amax(1) - means.amin(1)).tolist()
    assert max(swings[1:]) < 0.15 * swings[0]
    assert found.refused["add/harmless"][0].mean(-1).diff().max() >= 0.8
    assert found.refused["ablate/harmful"][0].mean(-1).diff().min() <= -0.8


def test_the_lens_and_the_projections_part_where_the_prompts_do(run, groups):
    # Both words that it was taught to refuse with: single tokens drawn at random are no steady control.
    tokens = [run.chat.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("I", "Sorry")]
    lens = refusal_lens(run.model, run.chat, *groups.values(), tokens)
    assert lens.gap[0] == 0 and lens.gap[-1] > 4
    assert lens.gap[-1] > 2 * lens.control_gaps[:, -1].abs().max()
    found = project_residuals(run.model, run.chat, run.direction, groups)
    layer, position = run.direction.layer, found.positions.index(run.direction.position)
    rows = found.rows("harmful"), found.rows("harmless")
    real, random = (
        area_under_curve(*(values[side, position, layer] for side in rows))
        for values in (found.projections, found.control_projections)
    )
    assert real >= 0.95 and real > max(random, 1 - random)
    assert (found.projections[:, 1:, 0].std(0) == 0).all()
    single = map_tokens(run.model, run.chat, run.direction, groups["harmful"][0])
    assert single.cosines[-1, layer] > 2 * single.control_cosines[-1, layer].abs()


def test_candidates_are_stable_and_shuffled_labels_are_not(run, groups):
    found = direction_geometry(run.model, run.chat, *groups.values(), n_resamples=20)
    place = found.positions.index(run.direction.position), run.direction.layer
    assert found.stability[place] > 0.8 > found.shuffled_p95[place]
    assert found.norms[place] > 1.5 * found.norms_null_p95[place]
    assert (found.norms[:, 0] == 0).all() and found.stability[:, 0].isnan().all()
    for measure in ("held-out accuracy", "silhouette", "signal to noise"):
        assert found.measure(measure)[place] > found.table_null_high[found.measures.index(measure)][place] + 0.2
    assert found.measure("held-out accuracy")[place] >= 0.95
    assert (found.measure("held-out accuracy")[:, 0] == 0.5).all(), "the template's own tokens tell nothing"
    chosen, grid = run.direction, run.grid
    named = {"chosen": chosen, "layer before": grid.direction(chosen.position, chosen.layer - 1)}
    compared = compare_directions(named | {"random": chosen.random_like(0)})
    assert compared.cosines[0, 1] > 2 * compared.null_p95 and compared.cosines[0, 2].abs() < 2 * compared.null_p95


def test_components_of_variance_group_by_harm_and_shuffled_groups_do_not(run, groups):
    layers = (0, run.direction.layer)
    found = residual_pca(run.model, run.chat, run.direction, groups, layers=layers, n_shuffles=40)
    assert found.separation[0].isnan() and (found.coordinates[0] == 0).all()
    assert found.separation[1] > found.separation_null_p95[1] and found.direction_cosines[1].max() > 0.5


def test_the_direction_says_the_refusal_tokens_and_is_written_by_more_than_chance(run):
    found = direction_logits(run.model, run.direction, run.refusal_tokens)
    assert found.refusal_z.mean() > found.control_z.quantile(0.975)
    assert found.refusal_ranks.max() <= 0.05 * found.d_vocab
    real, random = (
        weight_alignment(run.model, direction, n_random=50)
        for direction in (run.direction, run.direction.random_like(99))
    )
    assert real.ratio("writes").max() > 1.5 > random.ratio("writes").max()


def test_heads_read_the_direction_from_harmful_instructions(run, groups):
    found = {
        side: attend_by_region(run.model, run.chat, run.direction, prompts[:12], heads=top_heads(run, groups))
        for side, prompts in groups.items()
    }
    torch.testing.assert_close(
        found["harmful"].mass.sum(-1), torch.ones_like(found["harmful"].mass[..., 0]), atol=1e-5, rtol=0
    )
    plain = {side: result.contributions[0].sum((1, 2)) for side, result in found.items()}
    assert area_under_curve(plain["harmful"], plain["harmless"]) > 0.9


def top_heads(run, groups):
    return attribute_direction(run.model, run.chat, run.direction, groups).top_heads(6, "harmful", "harmless")


def test_an_answer_carries_the_direction_until_it_is_ablated(run, groups):
    few = {side: prompts[:6] for side, prompts in groups.items()}
    found = trace_generation(run.model, run.chat, run.direction, few, max_new_tokens=8)
    last = found.n_template - 1
    plain, ablated, added = (found.values[index] for index in range(3))
    assert area_under_curve(plain[:6, last], plain[6:, last]) >= 0.9
    assert ablated[~ablated.isnan()].abs().max() < 1e-4 * run.direction.norm
    assert (added[:, last] - plain[:, last]).mean() == pytest.approx(run.direction.norm, rel=0.2)


def test_ablation_takes_the_refusal_and_leaves_the_harm(run, groups):
    training = [run.prompts(side, "train") for side in ("harmful", "harmless")]
    found = separate_harm(
        run.model,
        run.chat,
        *training,
        {**groups, "ablated": groups["harmful"]},
        run.refusal_tokens,
        interventions={"ablated": [Ablate(run.direction)]},
    )
    refuse = {name: deltas[:, 1] for name, deltas in found.deltas.items()}
    assert area_under_curve(refuse["harmful"], refuse["harmless"]) > 0.9
    moved = (found.deltas["ablated"] - found.deltas["harmful"]).abs().mean(0)
    assert (refuse["ablated"] < 0).double().mean() > 0.9 and moved[1] > 5 * moved[0]
