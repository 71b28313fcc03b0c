"""Mean residual streams, recomputed prompt by prompt with plain HF."""

import pytest
import torch

from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.model.loading import load_model
from refusal_mi.reading import mean_activations
from refusal_mi.text.chat import ChatFormat
from tests.helpers.models import D_MODEL, N_LAYERS
from tests.helpers.naive import ASKS, CHATS, FAMILIES, dtype_of, mean_residuals, relative_error, tolerance
from tests.helpers.tiers import first_is_fast


@pytest.mark.parametrize("family", FAMILIES)
def test_means_and_their_difference_equal_plain_hf_prompt_by_prompt(family, tiny_model, plain_model):
    model, hf = tiny_model(family, dtype_of(family)), plain_model(family, dtype_of(family))
    chat = ChatFormat(model.tokenizer)
    found = [mean_activations(model, chat, texts, batch_size=3) for texts in (ASKS, CHATS)]
    expected = [mean_residuals(hf, model.tokenizer, texts, 5) for texts in (ASKS, CHATS)]
    for means, naive in zip(found, expected, strict=True):
        assert means.means.shape == (5, N_LAYERS, D_MODEL) and means.means.dtype == torch.float64
        assert means.n_prompts == 5 and means.positions == (-5, -4, -3, -2, -1)
        assert relative_error(means.means, naive) < tolerance(family)
    grid = difference_in_means(*found)
    assert relative_error(grid.vectors, expected[0] - expected[1]) < tolerance(family)
    assert relative_error(grid.vectors, expected[1] - expected[0]) > 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_batch_size_does_not_matter(family, tiny_model):
    model = tiny_model(family, dtype_of(family))
    chat = ChatFormat(model.tokenizer)
    alone, together = (mean_activations(model, chat, ASKS, batch_size=size).means for size in (1, 5))
    assert relative_error(together, alone) < tolerance(family)


@pytest.mark.parametrize("family", first_is_fast(["llama", "qwen2", "gemma2"]))
def test_without_padding_float64_is_exact_on_rmsnorm_families_too(family, tiny_model, plain_model):
    model, hf = tiny_model(family, "float64"), plain_model(family, "float64")
    found = mean_activations(model, ChatFormat(model.tokenizer), ASKS, batch_size=1).means
    assert relative_error(found, mean_residuals(hf, model.tokenizer, ASKS, 5)) < 1e-10


def test_learned_positions_need_position_ids_under_padding(tiny_model, plain_model):
    """Negative control: positions counted from the padding read other embeddings."""
    model = tiny_model("gpt2", "float64")
    batch = ChatFormat(model.tokenizer).batch(ASKS)
    name = f"blocks.{N_LAYERS - 1}.hook_resid_pre"
    columns = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    expected = mean_residuals(plain_model("gpt2", "float64"), model.tokenizer, ASKS, 5)[:, -1]
    errors = []
    for positions in (columns, batch.position_ids):
        with torch.no_grad():
            _, cache = model.run_with_cache(
                batch.tokens, attention_mask=batch.mask, position_ids=positions, names_filter=[name]
            )
        errors.append(relative_error(cache[name][:, -5:].mean(0), expected))
    assert errors[0] > 1e-3 and errors[1] < 1e-10


def test_positions_that_share_their_tokens_have_no_difference_at_layer_zero(tiny_model):
    """The embeddings of the template's tokens do not depend on the prompt, without learned positions."""
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    grid = difference_in_means(*(mean_activations(model, chat, texts) for texts in (ASKS, CHATS)))
    assert all(row[0] and not any(row[1:]) for row in grid.is_degenerate)


def test_nothing_to_average_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="at least one prompt"):
        mean_activations(model, ChatFormat(model.tokenizer), [])


def test_a_folded_model_is_refused(tiny_dir):
    model = load_model(tiny_dir("gpt2"), device="cpu")
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="centred"):
        mean_activations(model, ChatFormat(model.tokenizer), ASKS)
