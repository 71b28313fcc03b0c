"""Ablation and addition through hook points: nothing left along the direction, nothing else touched."""

import pytest
import torch

from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add, all_hooks
from refusal_mi.model.points import resid_hook, write_hooks
from refusal_mi.model.running import all_logits
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import direction_of, random_direction
from tests.helpers.models import D_MODEL, N_LAYERS
from tests.helpers.naive import ASKS

FAMILIES = ["llama", "gemma2", "gpt2", "mixtral"]
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
WRITES = ("hook_attn_out", "hook_mlp_out")


def run(model, interventions=(), names=None):
    """Logits, and what every hook point of the stream carries after the interventions."""
    seen = {}
    points = names or [
        f"blocks.{block}.{part}"
        for block in range(N_LAYERS)
        for part in STREAM + WRITES
        if f"blocks.{block}.{part}" in model.hook_dict
    ]
    hooks = [*all_hooks(model, interventions), *((name, _keep(seen, name)) for name in points)]
    batch = ChatFormat(model.tokenizer).batch(ASKS[:3])
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = all_logits(model, batch)
    real = batch.mask.bool()
    return logits[real], {name: value[real] for name, value in seen.items()}


def _keep(seen, name):
    def keep(activation, hook):
        seen[name] = activation.detach().clone()
        return activation

    return keep


def share(x, unit):
    """|x·r| / ||x||, the largest over positions."""
    return ((x.double() @ unit).abs() / x.double().norm(dim=-1)).max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_leaves_nothing_along_the_direction_at_any_hook_point(family, tiny_model):
    model, direction = tiny_model(family), random_direction(0)
    _, plain = run(model)
    _, ablated = run(model, [Ablate(direction)])
    assert len(plain) == N_LAYERS * 5
    assert min(share(x, direction.unit) for x in plain.values()) > 0.05
    assert max(share(x, direction.unit) for x in ablated.values()) <= 1e-5


def test_parallel_blocks_have_no_middle_and_are_clean_too(tiny_model):
    model, direction = tiny_model("gpt_neox"), random_direction(0)
    _, ablated = run(model, [Ablate(direction)])
    assert len(ablated) == N_LAYERS * 4
    assert max(share(x, direction.unit) for x in ablated.values()) <= 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0, -1.0])
def test_one_write_loses_its_component_times_the_strength_and_nothing_else(strength):
    direction, x = random_direction(0), torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    kept = x.clone()
    changed = hook_function(Ablate(direction, strength=strength))(x, None)
    along = (x @ direction.unit)[..., None] * direction.unit
    assert torch.allclose(changed @ direction.unit, (1 - strength) * (x @ direction.unit), atol=1e-12)
    rest = changed - (changed @ direction.unit)[..., None] * direction.unit
    assert (rest - (x - along)).abs().max() < 1e-12
    assert torch.equal(x, kept)


class _Config:
    n_layers, d_model = N_LAYERS, D_MODEL


class _Model:
    """As much of a model as hooks are made from."""

    cfg = _Config()
    tokenizer = None

    def hooks(self, fwd_hooks):
        raise NotImplementedError

    run_with_cache = generate = __call__ = hooks


def hook_function(intervention, prompt_width=None):
    return intervention.hooks(_Model(), prompt_width)[0][1]


def test_each_write_of_a_model_keeps_its_orthogonal_complement(tiny_model):
    """Only one write is ablated, so everything before it is the plain model's."""
    model, direction = tiny_model("gpt2", "float64"), random_direction(1)
    for component, name in (("attn", "hook_attn_out"), ("mlp", "hook_mlp_out")):
        point = f"blocks.3.{name}"
        plain, found = (
            run(model, chosen, [point])[1][point]
            for chosen in ([], [Ablate(direction, layers=[3], components=[component])])
        )
        difference = found - plain
        along = (difference @ direction.unit)[:, None] * direction.unit
        assert along.abs().max() > 0.01
        assert (difference - along).abs().max() < 1e-12


def test_half_strength_halves_every_write(tiny_model):
    model, direction = tiny_model("gpt2", "float64"), random_direction(0)
    name = "blocks.0.hook_resid_pre"
    plain, half = (run(model, chosen, [name])[1][name] for chosen in ([], [Ablate(direction, strength=0.5)]))
    assert torch.allclose(half @ direction.unit, 0.5 * (plain @ direction.unit), atol=1e-12)


@pytest.mark.parametrize(
    ("layers", "components"),
    [([1, 3], ("embed", "attn", "mlp")), (None, ("mlp",)), ([0], ("embed",)), ([2], ("attn",))],
)
def test_subsets_of_layers_and_components_act_only_there(layers, components, tiny_model):
    model, direction = tiny_model("llama"), random_direction(0)
    ablate = Ablate(direction, layers=layers, components=components)
    chosen = write_hooks(N_LAYERS, layers=layers, components=components)
    assert [name for name, _ in ablate.hooks(model)] == chosen
    names = write_hooks(N_LAYERS)
    _, found = run(model, [ablate], names)
    clean = {name for name, x in found.items() if share(x, direction.unit) <= 1e-5}
    assert clean == set(chosen)


def correlated(cosine: float) -> list[Direction]:
    a, b = torch.zeros(D_MODEL), torch.zeros(D_MODEL)
    a[0], b[0], b[1] = 2.0, cosine, (1 - cosine**2) ** 0.5
    return [direction_of(a), direction_of(b)]


def test_a_span_is_removed_whole_and_a_sequence_is_not(tiny_model):
    model, pair = tiny_model("llama"), correlated(0.8)
    _, span = run(model, [Ablate(pair)])
    _, sequence = run(model, [Ablate(direction) for direction in pair])
    for direction in pair:
        assert max(share(x, direction.unit) for x in span.values()) <= 1e-5
    assert max(share(x, pair[1].unit) for x in sequence.values()) <= 1e-5
    assert min(share(x, pair[0].unit) for x in sequence.values()) > 0.01


def test_three_directions_and_their_span_are_the_same_ablation(tiny_model):
    """Any other basis of the span gives the same logits."""
    model = tiny_model("gpt2", "float64")
    a, b, c = (random_direction(seed) for seed in range(3))
    mixed = [direction_of(x.vector + 0.5 * y.vector) for x, y in ((a, b), (b, c), (c, a))]
    assert torch.allclose(run(model, [Ablate([a, b, c])])[0], run(model, [Ablate(mixed)])[0], atol=1e-6)
    assert not torch.allclose(run(model, [Ablate([a, b, c])])[0], run(model, [Ablate([a, b])])[0], atol=1e-3)


def test_near_duplicates_are_refused_by_name_and_warned_about_before_that():
    a, b, c = random_direction(0), random_direction(1), random_direction(0, scale=5.0)
    with pytest.raises(UserError, match="directions 0 and 2 are all but the same"):
        _ = Ablate([a, b, c]).basis
    with pytest.warns(UserWarning, match="directions 0 and 1 are all but the same"):
        _ = Ablate(correlated(0.995)).basis
    assert Ablate([a, b]).basis.shape == (2, D_MODEL)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_affine_constants_are_the_component_everywhere_in_the_stream(family, tiny_model):
    model, pair, constants = tiny_model(family), correlated(0.6), (1.5, -0.7)
    _, found = run(model, [Ablate(pair, constants=constants)])
    for direction, constant in zip(pair, constants, strict=True):
        for name, x in found.items():
            expected = constant if name.rpartition(".")[2] in STREAM else 0.0
            error = (x.double() @ direction.unit - expected).abs() / x.double().norm(dim=-1)
            assert error.max() <= 1e-5, name


@pytest.mark.parametrize(
    "options",
    [
        {"strength": 0.5},
        {"layers": [1]},
        {"components": ("mlp",)},
        {"positions": "response"},
        {"constants": [1.0, 2.0]},
    ],
)
def test_constants_need_a_whole_ablation_and_one_number_per_direction(options):
    with pytest.raises(UserError, match="constants"):
        Ablate(random_direction(0), **{"constants": [1.0], **options})


def test_no_directions_a_wrong_width_and_a_bad_layer_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="at least one direction"):
        _ = Ablate([]).basis
    wide = direction_of(torch.ones(D_MODEL + 1))
    for intervention in (Ablate(wide), Add(wide)):
        with pytest.raises(UserError, match=f"width {D_MODEL + 1} does not fit a model of width {D_MODEL}"):
            intervention.hooks(model)
    with pytest.raises(UserError, match=r"layer 9 does not exist"):
        Add(random_direction(0), layer=9).hooks(model)
    with pytest.raises(UserError, match="no block 9"):
        Ablate(random_direction(0), layers=[9]).hooks(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_times_a_direction_is_the_plain_model_bit_for_bit(family, tiny_model):
    model, direction = tiny_model(family), random_direction(0)
    plain, _ = run(model)
    for nothing in ([Add(direction, 0.0)], [Ablate(direction, strength=0.0)]):
        assert torch.equal(run(model, nothing)[0], plain)
    for something in ([Add(direction, 1.0)], [Ablate(direction)]):
        assert not torch.allclose(run(model, something)[0], plain, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 3, N_LAYERS])
def test_addition_adds_the_raw_vector_at_its_layer(layer, tiny_model):
    model, direction = tiny_model("gpt2", "float64"), random_direction(0, layer)
    name = resid_hook(layer, N_LAYERS)
    plain, added = (run(model, chosen, [name])[1][name] for chosen in ([], [Add(direction, -2.0)]))
    assert torch.allclose(added - plain, -2.0 * direction.vector.double().expand_as(plain), atol=1e-12)
    other = resid_hook(1, N_LAYERS)
    moved = run(model, [Add(direction, -2.0, layer=1)], [other])[1][other]
    assert torch.allclose(moved - run(model, (), [other])[1][other], -2.0 * direction.vector.double(), atol=1e-12)


def test_bfloat16_activations_are_projected_in_float32():
    """The exact projection rounded once; in bfloat16 alone a hundred times as much of the direction stays."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(D_MODEL, generator=generator)
    direction = direction_of(vector, 0)
    unit = direction.unit
    x = (torch.randn(1, 64, D_MODEL, generator=generator) + 500 * unit.float()).bfloat16()
    found = hook_function(Ablate(direction))(x, None)
    exact = x.double() - (x.double() @ unit)[..., None] * unit
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max() + 1e-3
    half = unit.bfloat16()
    careless = x - (x @ half)[..., None] * half
    assert (careless.double() - exact).abs().max() > 50 * (found.double() - exact).abs().max()


COLUMNS = {
    # scope, prompt width, columns of the call -> columns that change
    ("all", 4, 6): [range(6), range(6)],
    ("prompt", 4, 6): [range(4), range(4)],
    ("response", 4, 6): [range(3, 6), range(3, 6)],
    ("prompt", None, 5): [range(5), range(5)],
    ("response", None, 5): [[4], [4]],
    ("prompt", 4, 4): [range(4), range(4)],
    ("response", 4, 4): [[3], [3]],
    ("all", 4, 1): [[0], [0]],
    ("prompt", 4, 1): [[], []],
    ("response", 4, 1): [[0], [0]],
    ("prompt", (2, 5), 6): [range(2), range(5)],
    ("response", (2, 5), 6): [range(1, 6), range(4, 6)],
}


@pytest.mark.parametrize("case", COLUMNS, ids=str)
@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_position_scopes_act_exactly_on_their_columns(case, kind):
    scope, width, n_columns = case
    direction = random_direction(0)
    intervention = Add(direction, positions=scope) if kind == "add" else Ablate(direction, positions=scope)
    prompt_width = torch.tensor(width) if isinstance(width, tuple) else width
    x = torch.randn(2, n_columns, D_MODEL)
    changed = hook_function(intervention, prompt_width)(x, None)
    for row, expected in enumerate(COLUMNS[case]):
        differs = (changed[row] != x[row]).any(-1)
        assert differs.nonzero().flatten().tolist() == list(expected)


def test_hooks_are_gone_after_use_and_after_an_exception(tiny_model):
    model, direction = tiny_model("llama"), random_direction(0)
    plain, _ = run(model)
    run(model, [Ablate(direction), Add(direction)])
    assert torch.equal(run(model)[0], plain)
    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=all_hooks(model, [Ablate(direction)])):
        raise ZeroDivisionError
    assert torch.equal(run(model)[0], plain)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
