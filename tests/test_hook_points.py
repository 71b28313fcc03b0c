"""Any hook point of a block: means, additions and ablations are those of torch hooks on the HF modules."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from refusal_mi.analysis import attribute_direction, project_residuals
from refusal_mi.directions import ActivationMeans, Direction, DirectionGrid, difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.estimators.linear import lda
from refusal_mi.estimators.named import estimator_named
from refusal_mi.estimators.samples import at_one_place
from refusal_mi.export.plan import as_steps
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, AblateInTurn, Add, Affine, Leace
from refusal_mi.measures import next_token_logits
from refusal_mi.reading import mean_activations, sample_activations
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from tests.helpers.models import D_MLP, D_MODEL, N_HEADS
from tests.helpers.naive import ASKS, CHATS, prompt_ids, relative_error

BLOCK, N_KEYS = 3, 2
POINTS: dict[str, tuple[str, bool, int]] = {
    "attn.hook_z": ("self_attn.o_proj", True, D_MODEL),
    "attn.hook_q": ("self_attn.q_proj", False, D_MODEL),
    "attn.hook_k": ("self_attn.k_proj", False, D_MODEL // N_HEADS * N_KEYS),
    "attn.hook_v": ("self_attn.v_proj", False, D_MODEL // N_HEADS * N_KEYS),
    "hook_attn_out": ("self_attn", False, D_MODEL),
    "hook_mlp_out": ("mlp", False, D_MODEL),
    "mlp.hook_post": ("mlp.down_proj", True, D_MLP),
    "ln2.hook_in": ("post_attention_layernorm", True, D_MODEL),
    "hook_resid_mid": ("post_attention_layernorm", True, D_MODEL),
    "hook_resid_pre": ("", True, D_MODEL),
    "hook_resid_post": ("", False, D_MODEL),
}
"""Hook point -> the module of an HF block, whether it is that module's input, and how wide it is."""
CHANGED = [name for name in POINTS if name not in ("hook_resid_mid", "ln2.hook_in")]
"""In HF the stream between attention and MLP is no module's own: a hook could not change it."""


@contextmanager
def on_module(hf: Any, point: str, change: Callable[[torch.Tensor], torch.Tensor]):
    """A torch hook that replaces the input or output of the HF module by `change` of it."""
    name, is_input, _ = POINTS[point]
    block = hf.model.layers[BLOCK]
    module = block.get_submodule(name) if name else block

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(_: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True) if is_input else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def naive_means(hf: Any, tokenizer: Any, point: str, prompts: Any, n: int) -> torch.Tensor:
    """[pos, width]: one prompt at a time."""
    seen: list[torch.Tensor] = []

    def read(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[0, -n:].double())
        return x

    with on_module(hf, point, read):
        for prompt in prompts:
            hf(torch.tensor([prompt_ids(tokenizer, prompt)]))
    return torch.stack(seen).mean(0)


@torch.no_grad()
def naive_logits(hf: Any, tokenizer: Any, point: str, change: Any, prompts: Any) -> torch.Tensor:
    with on_module(hf, point, change):
        return torch.stack([hf(torch.tensor([prompt_ids(tokenizer, each)])).logits[0, -1] for each in prompts])


def vector_for(point: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(POINTS[point][2], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("point", POINTS)
def test_means_are_those_of_the_hf_module(tiny_model, plain_model, point):
    model, hf = tiny_model("llama"), plain_model("llama")
    chat, hook = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.{point}"
    found = mean_activations(model, chat, ASKS, hook=hook, batch_size=2)
    expected = naive_means(hf, model.tokenizer, point, ASKS, len(chat.positions))
    assert found.means.shape == (len(chat.positions), 1, POINTS[point][2]) and found.hook_name == hook
    assert relative_error(found.means[:, 0], expected) < 1e-6
    other = naive_means(hf, model.tokenizer, point, ASKS[:-1], len(chat.positions))
    assert relative_error(found.means[:, 0], other) > 1e-3, "the control: one prompt less shows"
    whole = mean_activations(model, chat, ASKS, hook=hook, batch_size=32)
    assert relative_error(found.means, whole.means) < 1e-6 and found.n_prompts == len(ASKS)


@pytest.mark.parametrize("point", ["attn.hook_z", "attn.hook_k", "mlp.hook_post", "hook_resid_post"])
def test_single_prompts_are_those_of_the_hf_module(tiny_model, plain_model, point):
    model, hf = tiny_model("llama"), plain_model("llama")
    chat, hook = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.{point}"
    found = sample_activations(model, chat, ASKS, hook=hook, batch_size=2)
    n = len(chat.positions)
    expected = torch.stack([naive_means(hf, model.tokenizer, point, [prompt], n) for prompt in ASKS])
    assert found.prompts.shape == (len(ASKS), n, 1, POINTS[point][2]) and found.hook_name == hook
    assert relative_error(found.prompts[:, :, 0], expected) < 2e-6
    assert relative_error(found.prompts[:, :, 0], expected.roll(1, 0)) > 1e-3, "the control: another order shows"
    assert found.means.hook_name == hook
    assert relative_error(found.means.means, mean_activations(model, chat, ASKS, hook=hook).means) < 1e-6
    layer = BLOCK + (point == "hook_resid_post")
    assert torch.equal(found.at(-1), found.at(-1, layer)) and found.layers == (layer,)
    with pytest.raises(UserError, match=f"of {hook} alone"):
        found.at(-1, layer - 1)


def test_an_estimator_of_single_prompts_gives_a_direction_of_the_hook_point(tiny_model):
    model = tiny_model("llama")
    chat, hook = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.attn.hook_v"
    sides = [sample_activations(model, chat, each, hook=hook) for each in (ASKS, CHATS)]
    direction = estimator_named("lda")(*sides).direction(-1)
    assert (direction.hook_name, direction.layer) == (hook, BLOCK) and len(direction.vector) == POINTS["attn.hook_v"][2]
    expected = at_one_place(lda, *(side.at(-1) for side in sides))
    assert relative_error(direction.vector, expected) < 1e-6
    assert direction != estimator_named("median")(*sides).direction(-1), "the control: another estimator"
    other = sample_activations(model, chat, CHATS, hook=f"blocks.{BLOCK}.attn.hook_k")
    with pytest.raises(UserError, match="different positions or layers"):
        estimator_named("lda")(sides[0], other)
    with pytest.raises(UserError, match="Leace acts on the stream"):
        Leace.fit(*sides, BLOCK)
    of_stream = [sample_activations(model, chat, each, hook="blocks.2.hook_resid_post") for each in (ASKS, CHATS)]
    whole = [sample_activations(model, chat, each) for each in (ASKS, CHATS)]
    found, same = (Leace.fit(*each, 3, shrinkage=0.5) for each in (of_stream, whole))
    assert relative_error(found.eraser.write, same.eraser.write) < 1e-4


@pytest.mark.parametrize("point", CHANGED)
def test_additions_and_ablations_are_those_of_the_hf_module(tiny_model, plain_model, point):
    model, hf = tiny_model("llama"), plain_model("llama")
    chat, hook = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.{point}"
    vector = vector_for(point)
    unit = vector / vector.norm()
    changes = {
        Add(Direction.of(vector, hook_name=hook), 1.5, hook=hook): lambda x: x + 1.5 * vector,
        Ablate(Direction.of(vector, hook_name=hook), 0.75, hook=hook): lambda x: (
            x - 0.75 * (x @ unit)[..., None] * unit
        ),
    }
    plain = naive_logits(hf, model.tokenizer, point, lambda x: x, ASKS)
    for intervention, change in changes.items():
        found = next_token_logits(model, chat, ASKS, interventions=intervention)
        expected = naive_logits(hf, model.tokenizer, point, change, ASKS)
        assert relative_error(found, expected) < 2e-6
        if point == "attn.hook_k" and isinstance(intervention, Add):
            continue  # the same key everywhere, before rotation: little is left of it
        assert relative_error(plain, expected) > 1e-4, "the control: the plain model gives other logits"


@pytest.mark.parametrize("point", ["attn.hook_z", "attn.hook_v", "mlp.hook_post"])
def test_a_direction_outside_of_the_stream_acts_where_it_was_read(tiny_model, point):
    model = tiny_model("llama")
    chat, hook = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.{point}"
    means = [mean_activations(model, chat, side, hook=hook) for side in (ASKS, CHATS)]
    grid = difference_in_means(*means)
    direction = grid.direction(-1)
    assert direction == grid.direction(-1, BLOCK) and (direction.layer, direction.hook_name) == (BLOCK, hook)
    assert torch.equal(direction.vector, (means[0].means[-1, 0] - means[1].means[-1, 0]).float())

    def logits(intervention):
        return next_token_logits(model, chat, ASKS, interventions=intervention)

    assert torch.equal(logits(Add(direction)), logits(Add(direction, hook=hook)))
    assert torch.equal(logits(Ablate(direction)), logits(Ablate(direction.vector, hook=hook)))
    assert torch.equal(logits(Add(direction, 0.0)), logits(()))
    answers = generate(model, chat, "Hi", interventions=[Ablate(direction), Add(direction)], max_new_tokens=3)
    assert len(answers) == 1


def test_one_head_changes_that_head_alone(tiny_model, plain_model):
    model, hf = tiny_model("llama"), plain_model("llama")
    chat, hook, head, width = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.attn.hook_z", 2, D_MODEL // N_HEADS
    whole = Direction.of(vector_for("attn.hook_z"), hook_name=hook)
    part = whole.of_head(head, N_HEADS)
    assert part.provenance["head"] == head and part.hook_name == hook
    unit = whole.vector[head * width : (head + 1) * width]
    unit = unit / unit.norm()

    def of_one_head(x):
        heads = x.unflatten(-1, (N_HEADS, width)).clone()
        heads[..., head, :] -= (heads[..., head, :] @ unit)[..., None] * unit
        return heads.flatten(-2)

    expected = naive_logits(hf, model.tokenizer, "attn.hook_z", of_one_head, ASKS)
    found = next_token_logits(model, chat, ASKS, interventions=Ablate(part))
    assert relative_error(found, expected) < 2e-6
    assert relative_error(next_token_logits(model, chat, ASKS, interventions=Ablate(whole)), expected) > 1e-4
    for wrong in ((-1, N_HEADS), (N_HEADS, N_HEADS), (0, 5)):
        with pytest.raises(UserError, match="no head"):
            whole.of_head(*wrong)


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_positions_are_kept_at_hook_points_with_heads(tiny_model, plain_model, positions):
    model, hf = tiny_model("llama"), plain_model("llama")
    chat, hook, vector = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.attn.hook_v", vector_for("attn.hook_v")
    addition = Add(Direction.of(vector, hook_name=hook), positions=positions)
    change = {"prompt": lambda x: x + vector, "response": lambda x: torch.cat([x[:, :-1], x[:, -1:] + vector], 1)}
    expected = naive_logits(hf, model.tokenizer, "attn.hook_v", change[positions], ASKS)
    assert relative_error(next_token_logits(model, chat, ASKS, interventions=addition), expected) < 2e-6


def test_at_a_stream_point_means_are_those_of_the_layer(tiny_model):
    model = tiny_model("gemma2")
    chat = ChatFormat(model.tokenizer)
    every = mean_activations(model, chat, ASKS)
    for layer, hook in ((2, "blocks.2.hook_resid_pre"), (3, "blocks.2.hook_resid_post"), (3, "blocks.2.hook_out")):
        found = mean_activations(model, chat, ASKS, hook=hook)
        assert relative_error(found.means[:, 0], every.means[:, layer]) < 1e-6
        direction = difference_in_means(found, mean_activations(model, chat, CHATS, hook=hook)).direction(-1)
        assert (direction.layer, direction.hook_name) == (layer, hook)
        same = Direction.of(direction.vector, layer)
        for kind in (Add, Ablate):
            one, other = (next_token_logits(model, chat, ASKS, interventions=kind(each)) for each in (direction, same))
            assert torch.equal(one, other)


def test_the_means_of_a_cache_at_a_hook_point(tiny_model):
    model = tiny_model("llama")
    chat, hook = ChatFormat(model.tokenizer), f"blocks.{BLOCK}.attn.hook_z"
    batch = chat.batch(ASKS)
    _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask, names_filter=hook)
    found = ActivationMeans.from_cache(cache, chat.positions, hook=hook)
    expected = mean_activations(model, chat, ASKS, hook=hook)
    assert relative_error(found.means, expected.means) < 1e-5 and found.hook_name == hook
    with pytest.raises(UserError, match=r"the cache has no blocks\.2\.attn\.hook_z"):
        ActivationMeans.from_cache(cache, hook="blocks.2.attn.hook_z")


def test_a_cache_without_its_first_axis_is_one_prompt(tiny_model):
    model = tiny_model("llama")
    batch = ChatFormat(model.tokenizer).batch(ASKS[:1])
    for hook in (f"blocks.{BLOCK}.attn.hook_z", f"blocks.{BLOCK}.hook_mlp_out"):
        one, bare = (
            ActivationMeans.from_cache(
                model.run_with_cache(batch.tokens, names_filter=hook, remove_batch_dim=removed)[1], hook=hook
            )
            for removed in (False, True)
        )
        assert bare.n_prompts == 1 and torch.equal(bare.means, one.means)


def test_the_hook_point_is_kept_in_files(tmp_path):
    direction = Direction.of(vector_for("attn.hook_v"), hook_name=f"blocks.{BLOCK}.attn.hook_v", position=-1)
    direction.save(tmp_path / "mine.safetensors")
    assert Direction.load(tmp_path / "mine.safetensors") == direction
    path = tmp_path / "mine_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer": BLOCK + 1}))
    with pytest.raises(UserError, match="contradicts itself"):
        Direction.load(tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    "layer, hook, said",
    [
        (2, "blocks.3.attn.hook_z", "layer 2 is not"),
        (3, "blocks.3.hook_out", "layer 3 is not"),
        (None, "attn.hook_z", "is no hook point of a block"),
        (None, "hook_embed", "is no hook point of a block"),
    ],
)
def test_a_hook_point_that_contradicts_the_layer_or_is_none_is_one_line(layer, hook, said):
    with pytest.raises(UserError, match=said):
        Direction.of(torch.ones(8), layer, hook_name=hook)
    with pytest.raises(UserError, match=said):
        Add(Direction.of(torch.ones(8), 1), layer=layer, hook=hook)


@pytest.mark.parametrize(
    "hook, said",
    [
        ("blocks.3.attn.hook_zz", r"no hook point blocks\.3\.attn\.hook_zz; did you mean 'blocks\.3\.attn\.hook_z'"),
        ("blocks.77.attn.hook_z", r"this model has blocks 0\.\.4"),
        ("blocks.3.attn.hook_pattern", "holds no vector at every position"),
        ("attn.hook_z", "is no hook point of a block"),
    ],
)
def test_a_hook_point_that_cannot_be_read_is_one_line(tiny_model, hook, said):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=said):
        mean_activations(model, ChatFormat(model.tokenizer), ASKS, hook=hook)
    with pytest.raises(UserError, match=said):
        sample_activations(model, ChatFormat(model.tokenizer), ASKS, hook=hook)


def test_the_router_of_experts_is_refused(tiny_model):
    model = tiny_model("mixtral")
    with pytest.raises(UserError, match="holds no vector at every position"):
        mean_activations(model, ChatFormat(model.tokenizer), ASKS, hook="blocks.1.mlp.gate.hook_out")


def test_what_does_not_fit_a_hook_point_is_one_line(tiny_model):
    model = tiny_model("llama")
    chat, hook = ChatFormat(model.tokenizer), "blocks.3.attn.hook_v"
    for intervention in (Ablate(torch.ones(D_MODEL), hook=hook), Add(Direction.of(torch.ones(D_MODEL), 1), hook=hook)):
        with pytest.raises(UserError, match=r"width 32 does not fit blocks\.3\.attn\.hook_v, which holds \[2, 8\]"):
            next_token_logits(model, chat, ASKS, interventions=intervention)
    with pytest.raises(UserError, match="no hook point"):
        Ablate(torch.ones(16), hook="blocks.3.attn.hook_none").hooks(model)
    for options in ({"layers": [1]}, {"components": ("attn",)}, {"constants": [1.0]}):
        with pytest.raises(UserError, match="is one place"):
            Ablate(torch.ones(16), hook=hook, **options)
    a, b = (Direction.of(torch.rand(16), hook_name=f"blocks.{block}.attn.hook_v") for block in (2, 3))
    with pytest.raises(UserError, match="one Ablate for each"):
        Ablate([a, b])
    with pytest.raises(UserError, match="and of the stream"):
        Ablate([a, Direction.of(torch.rand(16), 2)])


def test_what_is_about_the_stream_refuses_other_directions(tiny_model):
    model = tiny_model("llama")
    chat, hook = ChatFormat(model.tokenizer), "blocks.3.attn.hook_z"
    means = mean_activations(model, chat, ASKS, hook=hook), mean_activations(model, chat, CHATS, hook=hook)
    grid = difference_in_means(*means)
    direction = grid.direction(-1)  # as wide as the stream: without a look at the hook point nothing would be wrong
    assert len(direction.vector) == D_MODEL
    for use in (
        lambda: Affine(direction, 1.0),
        lambda: AblateInTurn([direction]),
        lambda: Add(direction, layer=4),
        lambda: project_residuals(model, chat, direction, {"a": ASKS}),
        lambda: attribute_direction(model, chat, direction, {"a": ASKS}),
    ):
        with pytest.raises(UserError, match="one of the residual stream is wanted"):
            use()
    for use in (lambda: sweep(model, chat, grid, ASKS, CHATS, [1]), lambda: grid.save("nowhere.pt")):
        with pytest.raises(UserError, match=r"of blocks\.3\.attn\.hook_z alone"):
            use()
    for step in (Ablate(direction), Add(direction), Add(direction, hook="blocks.2.hook_attn_out")):
        with pytest.raises(UserError, match="has no weight form"):
            as_steps(step)
    with pytest.raises(UserError, match=r"of blocks\.3\.attn\.hook_z alone"):
        grid.direction(-1, 2)
    with pytest.raises(ValueError, match="different positions or layers"):
        difference_in_means(means[0], mean_activations(model, chat, CHATS, hook="blocks.2.attn.hook_z"))
    whole = DirectionGrid(torch.ones(1, 2, 4).double(), (-1,), ((False, False),))
    with pytest.raises(UserError, match="say at which layer"):
        whole.direction(-1)
