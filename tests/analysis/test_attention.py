"""Attention by region: regions come from token ids, and the masses are the patterns summed."""

import pytest
import torch

from refusal_mi.analysis.attention import REGIONS, attend_by_region, label_regions
from refusal_mi.analysis.attribution import attribute_direction
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.errors import UserError
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, HEADS, PROMPTS, cached
from tests.helpers.directions import random_direction
from tests.helpers.models import tiny_tokenizer
from tests.helpers.tiers import first_is_fast

SUFFIX = " ok now"


def _text(chat: ChatFormat, ids: list[int], labels: tuple[str, ...], region: str) -> str:
    return chat.tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label == region])


def test_regions_are_where_their_text_is() -> None:
    chat = ChatFormat(tiny_tokenizer(), system="Be kind.")
    ids, labels = label_regions(chat, "Name a color", " please")
    assert ids == chat.encode("Name a color please")
    assert list(dict.fromkeys(labels)) == list(REGIONS)
    assert _text(chat, ids, labels, "system") == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert _text(chat, ids, labels, "instruction") == "Name a color"
    assert _text(chat, ids, labels, "suffix") == " please"
    assert _text(chat, ids, labels, "template") == "<|im_end|>\n<|im_start|>assistant\n"
    plain, labels = label_regions(chat, "Name a color")
    assert "suffix" not in labels and _text(chat, plain, labels, "instruction") == "Name a color"
    given, labels = label_regions(chat, "Name a color", [7, 8])
    assert [token for token, label in zip(given, labels, strict=True) if label == "suffix"] == [7, 8]
    assert given[-7:] == [7, 8, *chat.post_instruction_ids]


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_masses_and_contributions_are_sums_over_regions(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = attend_by_region(model, chat, direction, PROMPTS, suffix=SUFFIX, heads=HEADS, batch_size=16)
    torch.testing.assert_close(result.mass.sum(-1), torch.ones(3, 3, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (result.mass[0, :, :, 2] == 0).all() and (result.mass[1:, :, :, 2] > 0).all()
    assert (result.n_tokens[1] == result.n_tokens[2]).all()
    pattern = cached(model, chat, PROMPTS[1] + SUFFIX)["blocks.2.attn.hook_pattern"][0, 1, -1].double()
    n_post, n_suffix = len(chat.positions), len(SUFFIX)
    assert abs(pattern[-n_post:].sum() - result.mass[2, 1, 2, 3]) < 1e-5
    assert abs(pattern[-n_post - n_suffix : -n_post].sum() - result.mass[2, 1, 2, 2]) < 1e-5
    whole = attribute_direction(model, chat, direction, {"a": [prompt + SUFFIX for prompt in PROMPTS]}).heads["a"]
    expected = torch.stack([whole[:, layer, head] for layer, head in HEADS], dim=1)
    torch.testing.assert_close(result.contributions[2].sum(-1), expected, atol=2e-6, rtol=0)
    alone = attend_by_region(model, chat, direction, PROMPTS, suffix=SUFFIX, heads=HEADS, batch_size=1)
    torch.testing.assert_close(alone.mass, result.mass, atol=2e-6, rtol=0)


def test_saved_drawn_and_mistakes_named(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = attend_by_region(model, chat, direction, PROMPTS[:2], suffix="</script>", n_heads=3)
    best = attribute_direction(model, chat, direction, {"a": PROMPTS[:2]}).top_heads(3, "a")
    assert result.heads == best
    result.save(tmp_path / "attention.json")
    drawn = figures(load_result(tmp_path / "attention.json"))
    torch.testing.assert_close(torch.tensor(drawn["attention"].data[0].y), result.mass[0].mean((0, 1)).float())
    assert drawn["attention_patterns"].count("</script>") == 1
    with pytest.raises(UserError, match="suffix"):
        attend_by_region(model, chat, direction, PROMPTS, suffix="", heads=HEADS)
    with pytest.raises(UserError, match="no head"):
        attend_by_region(model, chat, direction, PROMPTS, heads=[(9, 0)])
