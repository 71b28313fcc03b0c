"""A `HookedTransformer` of TransformerLens 3.9 gives what the bridge of the same weights gives."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refusal_mi.analysis import KINDS
from refusal_mi.analysis.dose import DoseResult, dose_response
from refusal_mi.analysis.result import analysis_module
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.files import read_json
from refusal_mi.generation import Sampling, generate, stream
from refusal_mi.interventions import Ablate, Add, all_hooks
from refusal_mi.measures import ce_loss, texts_to_score
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.points import write_hooks
from refusal_mi.model.running import last_logits, running
from refusal_mi.recipes.arditi import run
from refusal_mi.recipes.effects import BASELINE, interventions_on
from refusal_mi.run.answers import Side
from refusal_mi.run.folder import RunInputs, load_grid, load_scores
from refusal_mi.run.options import RunOptions
from refusal_mi.run.stages import RunFolder
from refusal_mi.search.thresholds import NO_THRESHOLDS
from refusal_mi.text.batches import left_pad
from refusal_mi.text.chat import ChatFormat
from tests.helpers.hooked import hf_model_of, hooked_transformer
from tests.helpers.models import D_MODEL, save_tiny, tiny_hf_model

pytestmark = pytest.mark.hooked
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("embedded", "gpt2", "llama")]
WHERE_4_ONLY = {"llama": {"attention_bias": False, "mlp_bias": False}, "gpt2": {"n_inner": 4 * D_MODEL}}
"""What 3.9 cannot read of the tiny models: biases of llama, other widths of gpt2's MLP."""
ASKED = {
    "embedded": RunOptions(n_train=24, n_val=8, n_test=6, n_ce=6, max_new_tokens=24, response_prefix="", n_random=1),
    "tiny": RunOptions(
        n_train=8,
        n_val=4,
        n_test=6,
        n_ce=4,
        n_random=1,
        max_new_tokens=4,
        filter_prompts=False,
        refusal_tokens=(5, 40),
        response_prefix="",
        thresholds=NO_THRESHOLDS,
    ),
}
PROMPTS = ["Name a color", "Write a short poem about rain", "Hi", "What is the capital of France, and why is it so?"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made: dict[str, Path] = {"embedded": ORGANISM}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("tiny") / family
            made[family] = save_tiny(family, folder, **WHERE_4_ONLY.get(family, {}))
        return made[family]

    return of


@pytest.fixture(scope="module")
def pair(directory):
    """`pair(family)`: the bridge and the HookedTransformer of the same weights."""
    made: dict[str, tuple[Any, Any]] = {}

    def of(family: str) -> tuple[Any, Any]:
        if family not in made:
            hf_model = hf_model_of(directory(family))
            hooked = load_model(hooked_transformer(directory(family), hf_model), hf_model=hf_model)
            made[family] = load_model(directory(family), device="cpu", dtype="float32"), hooked
        return made[family]

    return of


@pytest.fixture(scope="module")
def runs(pair, directory, tmp_path_factory):
    """`runs(family)`: finished runs of the two."""
    made: dict[str, list[RunInputs]] = {}

    def of(family: str) -> list[RunInputs]:
        if family not in made:
            options = ASKED.get(family, ASKED["tiny"])
            made[family] = []
            for model in pair(family):
                folder = tmp_path_factory.mktemp("runs") / "out"
                assert run(model, str(directory(family)), options, RunFolder(folder)).status == "done"
                made[family].append(RunInputs(model, folder, max_prompts=4, batch_size=8))
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_scores_and_choice_are_the_same(runs, family):
    ours, theirs = runs(family)
    grids = [load_grid(each.path) for each in (ours, theirs)]
    a, b = (grid.vectors.double() for grid in grids)
    assert (a - b).norm(dim=-1).max() <= 1e-5 * a.norm(dim=-1).max()
    scores = [load_scores(each.path) for each in (ours, theirs)]
    values = [torch.tensor([astuple_or_nan(row) for row in grid.rows], dtype=torch.float64) for grid in scores]
    scale = values[0].nan_to_num().abs().amax(0).clamp(min=1)
    assert torch.equal(values[0].isnan(), values[1].isnan())
    off = ((values[0] - values[1]).nan_to_num().abs() / scale).amax(0)
    # The KL, quadratic in what an ablation changes, doubles the float32 rounding of directions and logits; on some
    # processors 1.06e-6 of it was measured.
    assert (off <= torch.tensor([1e-6, 1e-6, 3e-6])).all(), off
    assert (ours.direction.layer, ours.direction.position) == (theirs.direction.layer, theirs.direction.position)
    assert len({tuple(row) for row in values[0].nan_to_num().tolist()}) > 5


def astuple_or_nan(row: Any) -> list[float]:
    return [math.nan if value is None else value for value in (row.bypass, row.induce, row.kl_nats)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_loss_of_a_run_is_the_same(runs, family):
    by_bridge, by_hooked = runs(family)
    ours, theirs = by_bridge.path, by_hooked.path
    answers = sorted(path.relative_to(ours) for path in (ours / "completions").glob("*_completions.json"))
    assert len(answers) >= 6
    n_answers = n_tied = 0
    for name in answers:
        side, label = name.name.removesuffix("_completions.json").split("_", 1)
        for row, other in zip(read_json(ours / name), read_json(theirs / name), strict=True):
            n_answers += 1
            if row != other:
                n_tied += 1
                assert smallest_gap(by_bridge, side, label, row["prompt"]) <= 1e-5, (name, row["prompt"])
    assert n_tied <= 0.05 * n_answers
    losses = sorted(path.relative_to(ours) for path in (ours / "loss_evals").glob("*.json"))
    assert losses
    for name in losses:
        a, b = (numbers(read_json(each / name)) for each in (ours, theirs))
        assert len(a) and torch.allclose(a, b, rtol=1e-5, atol=0), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_analysis_is_the_same(runs, family, kind, monkeypatch):
    for name, smaller in (("RUN_TOKENS", 6), ("MAX_PAIRS", 2)):
        if hasattr(analysis_module(kind), name):
            monkeypatch.setattr(analysis_module(kind), name, smaller)
    found = []
    for each in runs(family):
        try:
            found.append(small_dose(each) if kind == "dose" else analysis_module(kind).from_run(each))
        except UserError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[0] == found[1]
        return
    for field in fields(found[0]):
        if field.name == "provenance":
            continue
        a, b = (numbers(getattr(each, field.name)) for each in found)
        assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan()), field.name
        off = (a - b).nan_to_num().abs()
        scale = max(a.nan_to_num().abs().max().item(), 1e-6) if len(a) else 0.0
        assert (off <= 2e-4 * a.nan_to_num().abs() + 2e-5 * scale).all(), (field.name, off.max())


def small_dose(run: RunInputs) -> DoseResult:
    groups = [run.prompts(side)[:3] for side in ("harmful", "harmless")]
    return dose_response(
        run.model,
        run.chat,
        run.direction,
        *groups,
        run.refusal_prefixes,
        coefficients=(-1.0, 0.5, 1.0),
        strengths=(0.5, 1.0),
        texts=texts_to_score(run.chat, ["The sky is blue, and the sea as well."]),
        n_random=1,
        n_random_answered=1,
        max_new_tokens=6,
    )


def smallest_gap(run: RunInputs, side: Side, label: str, prompt: str) -> float:
    """Least difference of the two largest logits in an answer: below rounding, which of two tokens comes is chance."""
    model, chat = run.model, run.chat
    labelled = [BASELINE, *interventions_on(side, run.direction, 1)]
    given = next(each.interventions for each in labelled if each.label == label)
    answer = generate(model, chat, [prompt], interventions=given, max_new_tokens=run.options.max_new_tokens)[0]
    ids, gaps = chat.encode(prompt), []
    with torch.no_grad(), running(model, all_hooks(model, given, len(ids))):
        for n in range(len(answer.token_ids)):
            best = last_logits(model, left_pad([[*ids, *answer.token_ids[:n]]], chat.pad_id)).topk(2).values[0]
            gaps.append((best[0] - best[1]).item())
    return min(gaps)


def numbers(value: Any) -> torch.Tensor:
    """All numbers in tensors and JSON values, in order."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        return torch.cat([torch.zeros(0, dtype=torch.float64), *map(numbers, value)])
    if isinstance(value, torch.Tensor | int | float):
        return torch.as_tensor(value, dtype=torch.float64).flatten()
    return torch.zeros(0, dtype=torch.float64)


def interventions(model: Any) -> Iterator[list[Any]]:
    vector = 20 * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(7))
    layer = model.cfg.n_layers // 2
    direction = Direction(vector, layer, f"blocks.{layer}.hook_resid_pre")
    yield from ([], [Ablate(direction)], [Add(direction)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_kv_cache", [True, False])
@pytest.mark.parametrize("sampling", [None, Sampling(3, 1.5, top_p=0.9), Sampling(4, 0.8, top_k=20)])
def test_greedy_and_sampled_answers_are_the_same(pair, family, sampling, use_kv_cache):
    written = []
    for model in pair(family):
        chat = ChatFormat(model.tokenizer)
        options = {"max_new_tokens": 9, "batch_size": 3, "sampling": sampling, "use_kv_cache": use_kv_cache}
        written.append([generate(model, chat, PROMPTS, interventions=each, **options) for each in interventions(model)])
    assert written[0] == written[1]
    assert len({tuple(answer.token_ids for answer in answers) for answers in written[0]}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_answer_is_the_same(pair, family):
    ours, theirs = (
        [*stream(model, ChatFormat(model.tokenizer), PROMPTS[1], max_new_tokens=8)] for model in pair(family)
    )
    assert ours == theirs


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "mixtral", "gpt_oss"])
def test_other_families_read_and_lose_the_same(pair, family):
    texts = ["The sky is blue, and the sea as well.", "One, two, three."]
    ours, theirs = pair(family)
    for a, b in zip(interventions(ours), interventions(theirs), strict=True):
        losses = []
        for model, each in ((ours, a), (theirs, b)):
            chat = ChatFormat(model.tokenizer)
            losses.append(ce_loss(model, chat, texts_to_score(chat, texts), interventions=each))
        assert losses[0].ce_loss == pytest.approx(losses[1].ce_loss, rel=1e-5)


def test_its_own_tools_take_the_hooks(pair):
    """`run_with_hooks` of TransformerLens with an `Ablate` leaves nothing along the direction in the stream."""
    _, hooked = pair("embedded")
    (_, ablation, _) = interventions(hooked)
    tokens = hooked.tokenizer("Name a color", return_tensors="pt").input_ids
    seen = {}

    def keep(stream: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = stream @ ablation[0].directions.unit.float()

    last = f"blocks.{hooked.cfg.n_layers - 1}.hook_resid_post"
    hooked.run_with_hooks(tokens, fwd_hooks=[(last, keep)])
    before = seen[last].abs().max()
    hooked.run_with_hooks(tokens, fwd_hooks=[*all_hooks(hooked, ablation), (last, keep)])
    assert seen[last].abs().max() <= 1e-5 * before
    assert not any(
        point.fwd_hooks for name, point in hooked.hook_dict.items() if name in write_hooks(hooked.cfg.n_layers)
    )


@pytest.mark.parametrize(
    ("processing", "said"),
    [
        ({"fold_ln": True}, "norms are folded"),
        ({"center_writing_weights": True}, "writing weights are centred"),
        ({"center_unembed": True}, "unembedding is centred"),
    ],
)
def test_a_processed_one_is_refused(directory, processing, said):
    hooked = hooked_transformer(directory("gpt2"), **processing)
    with pytest.raises(UserError, match=said):
        load_model(hooked, hf_model=str(directory("gpt2")))


def test_what_it_was_made_of_is_checked(directory, pair):
    hooked = hooked_transformer(directory("gpt2"))
    with pytest.raises(UserError, match="gives other logits"):
        load_model(hooked, hf_model=tiny_hf_model("gpt2", seed=5, **WHERE_4_ONLY["gpt2"]))
    with pytest.raises(UserError, match=r"has 5 layers of width 32, this HookedTransformer \d+ of"):
        load_model(hooked_transformer(ORGANISM), hf_model=str(directory("gpt2")))
    with pytest.raises(UserError, match="takes an HF model, a directory or a hub id, not a TransformerBridge"):
        load_model(hooked, hf_model=pair("gpt2")[0])
    hooked.tokenizer.name_or_path = ""
    with pytest.raises(UserError, match="nothing says which model this is: pass the HF model"):
        load_model(hooked)
    with pytest.raises(UserError, match="use what load_model"):
        generate(hooked, ChatFormat(hooked.tokenizer), PROMPTS)
    with pytest.raises(UserError, match="hf_model="):
        load_model(pair("gpt2")[0], hf_model=str(directory("gpt2")))


def test_without_the_hf_model_all_works_but_what_reads_its_weights(directory, runs):
    hooked = hooked_transformer(directory("gpt2"))
    hooked.tokenizer.name_or_path = str(directory("gpt2"))
    inputs = replace(runs("gpt2")[1], model=load_model(hooked))
    analysis_module("projections").from_run(inputs)
    with pytest.raises(UserError, match=r"pass the HF model .* hf_model="):
        analysis_module("weights").from_run(inputs)


def test_weights_edited_since_are_not_read_from_the_hf_model(directory, runs):
    hf_model = hf_model_of(directory("gpt2"))
    hooked = load_model(hooked_transformer(directory("gpt2"), hf_model), hf_model=hf_model)
    inputs = replace(runs("gpt2")[1], model=hooked)
    analysis_module("weights").from_run(inputs)
    with torch.no_grad():
        hooked.blocks[2].mlp.W_out *= 1.5
    with pytest.raises(UserError, match="edited since"):
        analysis_module("weights").from_run(inputs)


def test_two_of_the_same_class_differ_by_what_they_hold(directory):
    from refusal_mi.model.provenance import describe_model

    prints = []
    for factor in (1.0, 1.5):
        hooked = hooked_transformer(directory("gpt2"))
        with torch.no_grad():
            hooked.blocks[0].mlp.W_out *= factor
        model = load_model(hooked, hf_model=str(directory("gpt2")))
        prints.append(describe_model(model, str(directory("gpt2"))))
    assert prints[0].is_held and prints[0].model_type == "gpt2"
    assert prints[0].fingerprint != prints[1].fingerprint
