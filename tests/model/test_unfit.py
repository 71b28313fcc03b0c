"""What a model cannot compute is said in one line by everything that reads it: NaN, overlong prompts, foreign ids."""

import pytest
import torch

from refusal_mi.directions import DirectionGrid
from refusal_mi.errors import UserError
from refusal_mi.generation import generate, stream
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import ABQuestions, next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.model.running import batches
from refusal_mi.reading import captured, combine_spans, mean_activations, template_residuals
from refusal_mi.search.sweep import Scorer
from refusal_mi.text.batches import Span, left_pad
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.pairs import ABPair
from tests.helpers.directions import random_direction
from tests.helpers.models import D_MODEL, N_LAYERS, save_tiny

PROMPTS = ["Hello there", "And how are you?"]
PAIR = ABPair("Is it a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes.", "(A)", "(B)")


def spans(model, chat, prompts):
    rows = [chat.encode(prompt) for prompt in prompts]
    return combine_spans(
        model, [Span(tuple(row), 0, len(row)) for row in rows], torch.ones(1, len(rows)), pad_id=chat.pad_id
    )


def scorer(model, chat, prompts):
    positions = tuple(chat.positions)
    vectors = torch.ones(len(positions), N_LAYERS, D_MODEL)
    grid = DirectionGrid(vectors, positions, ((False,) * N_LAYERS,) * len(positions))
    return Scorer(model, chat, grid, prompts, prompts, [[40]])


READERS = {
    "mean_activations": mean_activations,
    "combine_spans": spans,
    "template_residuals": template_residuals,
    "next_token_logits": next_token_logits,
    "captured": lambda model, chat, prompts: captured(
        model,
        left_pad([chat.encode(prompt) for prompt in prompts], chat.pad_id),
        {"blocks.3.hook_mlp_out": lambda x: x},
    ),
    "generate": lambda model, chat, prompts: generate(model, chat, prompts, max_new_tokens=2),
    "stream": lambda model, chat, prompts: [
        list(stream(model, chat, [{"role": "user", "content": prompt}], max_new_tokens=2)) for prompt in prompts
    ],
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A model with a context of 48 tokens."""
    return load_model(save_tiny("gpt2", tmp_path_factory.mktemp("narrow"), n_positions=48), device="cpu")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_unfinite_weights(read, own_model):
    chat = ChatFormat(own_model.tokenizer)
    read(own_model, chat, PROMPTS)
    with torch.no_grad():
        own_model.blocks[1].mlp.original_component.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        read(own_model, chat, PROMPTS)


def test_unfinite_weights_in_a_choice_of_two_answers(own_model):
    choices = ABQuestions(ChatFormat(own_model.tokenizer), [PAIR])
    choices.log_probabilities(own_model)
    with torch.no_grad():
        own_model.blocks[1].mlp.original_component.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        choices.log_probabilities(own_model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_unfinite_numbers_of_an_intervention(value):
    direction = random_direction()
    for make in (
        lambda: Add(direction, value),
        lambda: Ablate(direction, strength=value),
        lambda: Ablate(direction, constants=[value]),
    ):
        with pytest.raises(UserError, match="must be a finite number"):
            make()


CUT = {name: read for name, read in READERS.items() if name != "captured"} | {"scorer": scorer}
"""All that make their batches of prompts themselves."""


@pytest.mark.parametrize("read", CUT.values(), ids=CUT)
def test_a_prompt_longer_than_the_context_is_refused(read, narrow):
    chat = ChatFormat(narrow.tokenizer)
    with pytest.raises(UserError, match=r"(context of 48|no room for an answer)"):
        read(narrow, chat, ["Hello", "y" * 60])


def test_the_part_of_a_prompt_that_is_its_own_is_shown(narrow):
    chat = ChatFormat(narrow.tokenizer)
    rows = [chat.encode(text) for text in ("Hello", "y" * 60)]
    with pytest.raises(UserError, match=rf"this prompt has {len(rows[1])} tokens.*: 'y{{60}}'"):
        list(batches(narrow, rows, chat.pad_id, 2, description="reading"))


def test_ids_that_the_embedding_lacks(narrow):
    with pytest.raises(UserError, match=r"token id 9999, beyond the model's embedding of 275"):
        list(batches(narrow, [[1, 2, 9999]], 0, 2, description="reading"))
