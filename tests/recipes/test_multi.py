"""Several directions at once: the span is gone, one after the other leaves some; ranks, errors, warnings."""

import math

import pytest
import torch

from refusal_mi.directions import Direction, DirectionGrid, cosine
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, AblateInTurn, all_hooks
from refusal_mi.measures import next_token_logits
from refusal_mi.recipes.combinations import combine, labelled
from refusal_mi.run.folder import load_ranked, ranked
from refusal_mi.search.grid import ScoreGrid, select
from refusal_mi.search.thresholds import Thresholds
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import direction_of, random_direction
from tests.helpers.naive import ASKS, ablating, dtype_of, logits, prompt_ids, relative_error, tolerance
from tests.helpers.scores import candidate

FAMILIES = ("llama", "gemma2", "gpt_neox")


def correlated(c: float, d: int = 32, k: int = 2) -> list[Direction]:
    """k directions in random orientation, each pair with cosine c."""
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0].T
    shared, own = math.sqrt(c), math.sqrt(1 - c)
    return [direction_of(shared * axes[0] + own * axes[index + 1]) for index in range(k)]


def streams(model, interventions, layout) -> dict[str, torch.Tensor]:
    """Every residual stream, one prompt at a time: what has been written so far."""
    names = [name for name in model.hook_dict if name.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post"))]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with torch.no_grad(), model.hooks(fwd_hooks=all_hooks(model, interventions)):
        for ids in layout:
            _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=names, return_cache_object=False)
            for name in names:
                found[name].append(cache[name][0].double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def share(x: torch.Tensor, basis: torch.Tensor) -> float:
    """‖Qx‖ / ‖x‖, the largest over tokens; Q is orthonormalized here by QR, not by the package's SVD."""
    q = torch.linalg.qr(basis.T)[0]
    return ((x @ q).norm(dim=-1) / x.norm(dim=-1)).max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_span_is_gone_from_every_stream_and_one_after_the_other_is_not(tiny_model, family):
    model = tiny_model(family)
    directions = correlated(0.7, k=3)
    basis = torch.stack([each.unit for each in directions])
    prompts = [model.tokenizer(ask)["input_ids"] for ask in ASKS[:2]]

    def largest(multi: str | None) -> tuple[float, list[str]]:
        interventions = combine((0, 1, 2), directions, multi).interventions if multi else ()
        found = streams(model, interventions, prompts)
        return max(share(x, basis) for x in found.values()), sorted(found)

    plain, names = largest(None)
    assert plain > 0.1  # the effect is there before it is removed
    assert len(names) >= 2 * model.cfg.n_layers
    assert largest("span")[0] <= 1e-5
    assert largest("sequential")[0] > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_one_after_the_other_is_the_published_computation(tiny_model, plain_model, family):
    """Plain HF hooks on every block's input, attention and MLP, those of the second direction after the first's."""
    model, hf = tiny_model(family, dtype_of(family)), plain_model(family, dtype_of(family))
    pair, chat = correlated(0.8), ChatFormat(model.tokenizer)
    with ablating(hf, pair[0].vector), ablating(hf, pair[1].vector):
        expected = torch.stack([logits(hf, prompt_ids(chat.tokenizer, ask))[-1] for ask in ASKS])

    def error(*interventions) -> float:
        return relative_error(next_token_logits(model, chat, ASKS, interventions=interventions), expected)

    assert error(*combine((0, 1), pair, "sequential").interventions) <= tolerance(family)
    writes_alone, other_order, span = [Ablate(each) for each in pair], [AblateInTurn(pair[::-1])], [Ablate(pair)]
    assert min(error(), error(*writes_alone), error(*other_order), error(*span)) > 1e-3


def test_the_first_direction_keeps_less_with_every_block_it_passes(tiny_model):
    """Each block's input is projected again: of what stayed along the first direction, c² stays each time."""
    model, c = tiny_model("gpt2", "float64"), 0.8
    pair = correlated(c)
    prompts = [model.tokenizer(ASKS[0])["input_ids"]]

    def along_first(*interventions) -> torch.Tensor:
        """Root mean square over tokens, of the stream that each block works on."""
        found = streams(model, interventions, prompts)
        entering = [found[f"blocks.{layer}.hook_resid_pre"] for layer in range(model.cfg.n_layers)]
        return torch.stack([(x @ pair[0].unit).square().mean().sqrt() for x in entering])

    plain, span, in_turn = along_first(), along_first(Ablate(pair)), along_first(AblateInTurn(pair))
    assert (span / plain).max() < 1e-12 and (in_turn / plain).min() > 1e-3
    writes_alone = along_first(*map(Ablate, pair))
    assert (in_turn < writes_alone)[1:].all() and (in_turn[-1] / plain[-1]) < 0.15 < 0.3 < (writes_alone / plain).min()

    def projected(x: torch.Tensor) -> torch.Tensor:
        for name, hook in AblateInTurn(pair).hooks(model):
            x = hook(x, None) if name == "blocks.1.hook_resid_pre" else x
        return x

    once = projected(torch.randn(1, 9, 32, dtype=torch.float64))
    assert torch.allclose(projected(once) @ pair[0].unit, c * c * (once @ pair[0].unit), atol=1e-12)
    assert (once @ pair[0].unit).abs().max() > 0.1


def test_one_direction_in_turn_is_its_ablation(tiny_model):
    """The stream's projection changes nothing where all writes are clean; the control has two directions."""
    model, (a, b) = tiny_model("gpt2", "float64"), (random_direction(seed) for seed in (0, 1))
    chat = ChatFormat(model.tokenizer)
    alone, in_turn, both = (
        next_token_logits(model, chat, ASKS[:2], interventions=[each])
        for each in (Ablate(a), AblateInTurn([a]), AblateInTurn([a, b]))
    )
    assert relative_error(in_turn, alone) < 1e-12 < 1e-3 < relative_error(both, alone)


def test_one_after_the_other_leaves_what_the_formula_says():
    """Of isotropic x, d1·x″ = −c (d2·x − c d1·x) has the scale c √(1 − c²): 0.484 at c = 0.79."""
    c = 0.79
    first, second = correlated(c)
    x = torch.randn(200_000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = x - (x @ first.unit)[:, None] * first.unit
    after = after - (after @ second.unit)[:, None] * second.unit
    assert cosine(first, second) == pytest.approx(c)
    assert (x @ first.unit).std().item() == pytest.approx(1.0, abs=0.01)
    assert (after @ first.unit).std().item() == pytest.approx(c * math.sqrt(1 - c * c), abs=0.005)
    assert c * math.sqrt(1 - c * c) == pytest.approx(0.484, abs=0.001)
    assert (after @ second.unit).abs().max().item() < 1e-12


def test_order_matters_only_one_after_the_other(tiny_model):
    model = tiny_model("llama")
    a, b = correlated(0.8)
    prompts = [model.tokenizer(ASKS[0])["input_ids"]]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def gap(multi: str) -> float:
        one, other = (
            streams(model, combine((0, 1), pair, multi).interventions, prompts)[last] for pair in ((a, b), (b, a))
        )
        return ((one - other).norm() / one.norm()).item()

    assert gap("span") < 1e-5
    assert gap("sequential") > 1e-2


def test_a_near_duplicate_is_an_error_that_names_the_ranks():
    a, b, c = correlated(0.2, k=3)
    twin = direction_of(a.unit + 1e-5 * b.unit)
    with pytest.raises(
        UserError, match=r"directions 0 and 2.*direction 0 = rank 1, direction 1 = rank 4, direction 2 = rank 6"
    ):
        combine((1, 4, 6), [a, c, twin])
    assert combine((1, 4), [a, c]).warning is None


def test_nearly_dependent_directions_warn():
    a, b = correlated(0.2)
    close = combine((0, 3), [a, direction_of(a.unit + 0.05 * b.unit)])
    assert close.warning is not None and "direction 1 = rank 3" in close.warning
    assert close.effective_rank == 2


def test_the_random_control_has_the_rank_and_is_another_span():
    found = combine((0, 1, 2), correlated(0.5, k=3))
    first, second = found.random_like(0), found.random_like(1)
    assert first.basis.shape == second.basis.shape == found.span.basis.shape == (3, 32)
    identity = torch.eye(3, dtype=torch.float64)
    for control in (first, second):
        assert torch.allclose(control.basis @ control.basis.T, identity, atol=1e-12)
        assert torch.linalg.svdvals(control.basis @ found.span.basis.T).max().item() < 0.95
    assert torch.linalg.svdvals(first.basis @ second.basis.T).max().item() < 0.95
    assert torch.equal(found.random_like(0).basis, first.basis)


def test_what_is_recorded_beside_the_directions():
    found = combine((0, 2), correlated(0.6)).record()
    assert found.effective_rank == 2 and found.ranks == (0, 2) and found.label == "0-2"
    assert found.cosines[0][1] == pytest.approx(0.6)
    # Two unit vectors with cosine c have singular values √(1 ± c).
    assert list(found.relative_singular_values) == pytest.approx([1.0, math.sqrt(0.4 / 1.6)])
    in_turn = combine((0, 2), correlated(0.6), "sequential")
    assert in_turn.label == "0-2-sequential" and labelled(in_turn).record["sites"] == "block inputs, attention, MLP"
    assert labelled(combine((0, 2), correlated(0.6))).record == {"multi": "span"}


def grid_and_scores() -> tuple[DirectionGrid, ScoreGrid]:
    vectors = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid = DirectionGrid(vectors, (-2, -1), ((False,) * 4,) * 2)
    bypass = [0.0, -3.0, -9.0, -5.0, -1.0, -7.0, -2.0, -8.0]
    kl = [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    rows = [
        candidate(layer, bypass[4 * i + layer], kl=kl[4 * i + layer], position=p)
        for i, p in enumerate((-2, -1))
        for layer in range(4)
    ]
    return grid, ScoreGrid(tuple(rows), 4)


def test_ranks_are_rows_of_the_survivors_best_first():
    grid, scores = grid_and_scores()
    chosen = select(scores, Thresholds())  # layer 3 is pruned, (-2, 2) fails the KL: (-1, 1), (-2, 1), (-1, 2), ...
    found = ranked(grid, chosen, (2, 0))
    assert [(each.position, each.layer) for each in found] == [(-1, 2), (-1, 1)]
    assert torch.equal(found[0].vector, grid.vectors[1, 2].float())
    assert found[0].hook_name == "blocks.2.hook_resid_pre"


def test_a_rank_that_does_not_exist_says_how_many_survive_and_what_binds():
    grid, scores = grid_and_scores()
    message = r"no direction of rank 5: the ranks are 0\.\.4; 5 of 8 candidates survive; 2 .*late a layer.*1 .*KL above"
    with pytest.raises(UserError, match=message):
        ranked(grid, select(scores, Thresholds()), (0, 5))
    with pytest.raises(UserError, match=r"there are none; 0 of 8"):
        ranked(grid, select(scores, Thresholds(induce_min=99.0)), (0,))


def test_a_folder_without_a_selection_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_ranked(tmp_path, (0,))
