"""Generation traces: the tokens are the answer's, the values those of the stream."""

import pytest
import torch

from refusal_mi.analysis.result import figures, load_result
from refusal_mi.analysis.trace import trace_generation
from refusal_mi.errors import UserError
from refusal_mi.generation import generate
from refusal_mi.interventions import Add
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, PROMPTS
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast

GROUPS = {"harmful": PROMPTS[:2], "harmless": PROMPTS[2:]}


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_values_are_projections_at_the_tokens_of_the_answer(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    both = [trace_generation(model, chat, direction, GROUPS, max_new_tokens=4, batch_size=size) for size in (16, 1)]
    result = both[0]
    assert result.tokens == both[1].tokens and result.groups == ("harmful", "harmful", "harmless")
    torch.testing.assert_close(both[1].values, result.values, atol=5e-6, rtol=0, equal_nan=True)
    answer = generate(model, chat, PROMPTS[1:2], interventions=[Add(direction)], max_new_tokens=4)[0]
    ids = [*chat.encode(PROMPTS[1]), *answer.token_ids]
    assert result.tokens[2][1] == tuple(chat.tokenizer.convert_ids_to_tokens(ids[-5 - len(answer.token_ids) :]))
    hooks = Add(direction).hooks(model)
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(torch.tensor([ids]), return_cache_object=False)
    expected = cache["blocks.2.hook_resid_pre"][0, -5 - len(answer.token_ids) :].double() @ direction.unit
    torch.testing.assert_close(result.values[2, 1, : len(expected)], expected, atol=1e-5, rtol=0)
    plain, ablated = result.values[0], result.values[1]
    assert ablated[~ablated.isnan()].abs().max() < 1e-5 < 0.1 < plain[~plain.isnan()].abs().max()


def test_each_condition_moves_the_projection_by_what_it_does_and_a_random_direction_by_little(tiny_model) -> None:
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = trace_generation(model, chat, direction, GROUPS, max_new_tokens=4, seed=3)
    assert result.conditions[3:] == result.controls == ("random ablated", "random added")
    random = direction.random_like(3)
    assert random.norm == pytest.approx(direction.norm)
    template = dict(zip(result.conditions, result.values[..., : result.n_template], strict=True))
    along = (random.vector.double() @ direction.unit).item()
    for name, moved in (("added", direction.norm), ("random added", along)):
        expected = torch.full_like(template["plain"], moved)
        torch.testing.assert_close(template[name] - template["plain"], expected, atol=1e-4, rtol=0)
    assert abs(along) < direction.norm / 2
    assert template["ablated"].abs().max() < 1e-5 < 0.1 < template["random ablated"].abs().max()
    seeds = [trace_generation(model, chat, direction, GROUPS, max_new_tokens=1, seed=seed) for seed in (3, 4)]
    assert torch.equal(seeds[0].values[:3], seeds[1].values[:3]) and not torch.equal(seeds[0].values, seeds[1].values)
    figure = figures(result)["trace"]
    counts = [trace for trace in figure.data if trace.yaxis in ("y3", "y4") and trace.name == "added"]
    of_group = {group: result.means("added", group)[2].tolist() for group in GROUPS}
    assert [list(trace.y) for trace in counts] == list(of_group.values())
    assert [max(trace.y) for trace in counts] == [len(prompts) for prompts in GROUPS.values()]


def test_means_leave_out_answers_that_have_ended(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = trace_generation(model, chat, direction, GROUPS, conditions={"plain": ()}, layer=5, max_new_tokens=3)
    shorter = result.values.clone()
    last = len(result.tokens[0][0]) - 1
    shorter[0, 0, last] = float("nan")
    tokens = ((result.tokens[0][0][:-1], *result.tokens[0][1:]),)
    cut = type(result)(("plain",), result.groups, result.prompts, 5, tokens, shorter, 5)
    mean, _, count = cut.means("plain", "harmful")
    assert count[last] == 1 and count[0] == 2 and mean[last] == shorter[0, 1, last]
    with pytest.raises(ValueError, match="every token"):
        type(result)(("plain",), result.groups, result.prompts, 5, result.tokens, shorter, 5)
    result.save(tmp_path / "trace.json")
    again = load_result(tmp_path / "trace.json")
    drawn = figures(again)
    assert again.tokens == result.tokens
    assert list(drawn["trace"].data[1].y)[:3] == pytest.approx(result.means("plain", "harmful")[0][:3].tolist())
    page = drawn["trace_tokens"]
    assert page.count("</script>") == 1 and page.count("CircuitsVis.ColoredTokens") >= 3


def test_an_empty_group_is_a_mistake(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="every group"):
        trace_generation(model, ChatFormat(model.tokenizer), random_direction(), {"a": []})
