"""Every function that takes prompts or interventions takes one alone, and gives what it gives for a list of it."""

import inspect

import pandas
import pytest
import torch

import refusal_mi
from refusal_mi import analysis
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.token_map import map_tokens
from refusal_mi.errors import UserError
from refusal_mi.generation import Conversation, generate, stream
from refusal_mi.interventions import Ablate, Add, as_interventions
from refusal_mi.labels import label_prompts
from refusal_mi.measures import ce_loss, next_token_logits, refusal_scores, texts_to_score
from refusal_mi.reading import mean_activations, stream_residuals, template_residuals
from refusal_mi.search.staged import staged_sweep
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.given import Conversations, Groups, Prompts
from refusal_mi.text.prompts import PromptSet
from tests.helpers.cases import HARMFUL, HARMLESS, TOKENS, analyses, grid_of

ASK = "tell me"
NAMES = {"harmful", "harmless", "instructions", "prompts", "groups", "texts"}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def chat(model):
    return ChatFormat(model.tokenizer)


@pytest.fixture(scope="module")
def direction(model, chat):
    return grid_of(model, chat).direction(-1, 3)


def public_functions():
    for module, names in ((refusal_mi, refusal_mi.__all__), (analysis, analysis.__all__)):
        for name in names:
            if inspect.isfunction(found := getattr(module, name)):
                yield pytest.param(found, id=name)


@pytest.mark.parametrize("function", list(public_functions()))
def test_no_public_function_takes_prompts_or_interventions_by_another_door(function):
    for name, each in inspect.signature(function).parameters.items():
        said = str(each.annotation)
        if name in NAMES and "ScoredText" not in said and "ActivationMeans" not in said:
            assert each.annotation in (Prompts, Conversations, Groups, Prompts | None), (name, said)
        assert "Sequence[refusal_mi.interventions.Intervention]" not in said, name


def reads(model, chat, direction):
    """What each function makes of some prompts, as tensors or tuples that can be compared."""
    grid = grid_of(model, chat)
    return {
        "batch": lambda given: chat.batch(given).tokens,
        "mean_activations": lambda given: mean_activations(model, chat, given).means,
        "stream_residuals": lambda given: torch.cat([x for _, x in stream_residuals(model, chat, given)]),
        "template_residuals": lambda given: template_residuals(model, chat, given),
        "next_token_logits": lambda given: next_token_logits(model, chat, given),
        "refusal_scores": lambda given: refusal_scores(model, chat, given, TOKENS),
        "generate": lambda given: [each.token_ids for each in generate(model, chat, given, max_new_tokens=3)],
        "label_prompts": lambda given: [each.answer for each in label_prompts(model, chat, given, n_tokens=3)],
        "texts_to_score": lambda given: texts_to_score(chat, given),
        "sweep": lambda given: sweep(model, chat, grid, given, given, TOKENS).per_prompt,
        "staged_sweep": lambda given: staged_sweep(model, chat, grid, given, given, TOKENS).per_prompt,
        "project_residuals": lambda given: project_residuals(model, chat, direction, {"mine": given}).projections,
        "one group": lambda given: project_residuals(model, chat, direction, given).projections,
        "map_tokens": lambda given: map_tokens(model, chat, direction, given).projections,
    }


def same(a, b) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


KINDS = {
    "string": lambda text: text,
    "set": lambda text: PromptSet.from_list([text]),
    "column": lambda text: pandas.Series([text]),
    "generator": lambda text: (each for each in [text]),
}


@pytest.mark.parametrize("name", [
    "batch", "mean_activations", "stream_residuals", "template_residuals", "next_token_logits", "refusal_scores",
    "generate", "label_prompts", "texts_to_score", "sweep", "staged_sweep", "project_residuals", "one group",
    "map_tokens",
])  # fmt: skip
def test_a_string_a_set_and_a_column_are_the_list(name, model, chat, direction):
    read = reads(model, chat, direction)[name]
    as_list = read([ASK])
    kinds = [kind for kind in KINDS if not (name.endswith("sweep") and kind == "generator")]  # both sides are one there
    for kind in kinds:
        assert same(read(KINDS[kind](ASK)), as_list), (name, kind)
    if name != "map_tokens":
        assert not same(read(list(ASK)), as_list)  # its letters


def test_every_analysis_takes_sets_and_columns(model):
    from tests.helpers.cases import Words

    as_lists = analyses(model)
    sets = Words(PromptSet.from_list(HARMFUL), PromptSet.from_list(HARMLESS))
    for kind, result in analyses(model, words=sets).items():
        expected, found = as_lists[kind](), result()
        for field in vars(expected):
            a, b = getattr(expected, field), getattr(found, field)
            if isinstance(a, torch.Tensor):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), (kind, field)


def test_one_intervention_needs_no_list(model, chat, direction):
    ablate = Ablate(direction)
    texts = texts_to_score(chat, HARMLESS)
    both = {
        "generate": lambda change: [x.token_ids for x in generate(model, chat, ASK, interventions=change)],
        "stream": lambda change: [x.token_ids for x in stream(model, chat, ASK, interventions=change)],
        "ask": lambda change: list(Conversation(model, chat, change, 5).ask(ASK)),
        "logits": lambda change: next_token_logits(model, chat, ASK, interventions=change).tolist(),
        "scores": lambda change: refusal_scores(model, chat, ASK, TOKENS, interventions=change).tolist(),
        "loss": lambda change: ce_loss(model, chat, texts, interventions=change).ce_loss,
        "streams": lambda change: template_residuals(model, chat, ASK, interventions=change).tolist(),
        "projections": lambda change: project_residuals(
            model, chat, direction, ASK, interventions=change
        ).projections.tolist(),
    }
    for name, read in both.items():
        alone, listed = read(ablate), read([ablate])
        assert alone == listed == read(each for each in [ablate]), name
        if name not in ("generate", "stream", "ask"):
            assert alone != read(()), name


def test_a_generator_of_interventions_acts_in_every_batch(model, chat, direction):
    change = lambda: (each for each in [Add(direction, 3.0)])  # noqa: E731
    asks = ["a", "bb", "ccc", "dddd"]
    logits = next_token_logits(model, chat, asks, interventions=change(), batch_size=1)
    assert torch.allclose(logits, next_token_logits(model, chat, asks, interventions=[*change()]), atol=1e-5)
    plain = next_token_logits(model, chat, asks)
    assert ((logits - plain).abs().amax(-1) > 1e-3).all()


def test_what_is_no_intervention_is_one_line(model, chat, direction):
    for given in (direction, direction.vector, [direction], Ablate, "ablate", None, 3):
        with pytest.raises(UserError, match="expected an intervention such as Ablate"):
            as_interventions(given)
    assert as_interventions(()) == () and as_interventions(iter([])) == ()
