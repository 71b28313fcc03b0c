"""Which layer `caa ab` chooses: only where a vector moves the choice beyond its controls, and text stays text."""

import json

import pytest
import torch
from scipy.stats import t

from refusal_mi.errors import UserError
from refusal_mi.files import read_json, read_record
from refusal_mi.model.points import explain_layer
from refusal_mi.recipes import caa_eval as caa_choice
from refusal_mi.recipes.caa import load_controls, load_vectors, pairs_behind, write_vectors
from refusal_mi.recipes.caa_eval import ABResults, ABTask, evaluate_choices, sweep_pairs
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.pairs import ABPair, PairSet, halves, load_pairs
from tests.helpers.directions import direction_of
from tests.helpers.models import N_LAYERS

LAST = N_LAYERS - 1
TASK = ABTask((-1.0, 1.0), None, "response", 4, 3, "made")


def pairs(name: str, start: int, answers=("(A)", "(B)")) -> PairSet:
    texts = [f"Is {'x' * n} a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes." for n in range(start, start + 4)]
    return PairSet(name, tuple(ABPair(text, *answers) for text in texts))


@pytest.fixture
def setting(tiny_model, monkeypatch):
    """A vector that raises the logit of A against B, read at the output of the last block; text that always passes."""
    monkeypatch.setattr(caa_choice, "is_degenerate", lambda _: False)
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    a, b = (chat.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    embedding = model.original_model.get_output_embeddings().weight.detach()
    vector = 20 * (embedding[a] - embedding[b])
    return model, chat, direction_of(vector.float(), LAST + 1)


def choices(setting, vector, control, folder, reported=None, other=None, **changes):
    model, chat, _ = setting
    task = ABTask(**{**vars(TASK), **changes})
    sets = (reported or pairs("held out", 0), other or pairs("others", 10))
    controls = {"shuffled labels": {LAST: control}}
    return evaluate_choices(model, chat, {LAST: vector}, controls, *sets, ["Why?"], RunFolder(folder), task)


def test_a_vector_that_moves_the_choice_is_chosen_and_reported_beside_its_control(setting, tmp_path):
    vector = setting[2]
    weak = direction_of(1e-3 * vector.vector, LAST + 1)
    results = choices(setting, vector, weak, tmp_path)
    chosen = results.chosen
    assert (chosen.layer, chosen.multiplier, chosen.chosen_on) == (LAST, 1.0, "others")
    assert chosen.change_added > 0.02 and chosen.change_subtracted < -0.02
    assert 0 < abs(chosen.controls["shuffled labels"].change_added) < 0.1 * chosen.change_added
    assert chosen.effect_there > results.controls.largest_change["shuffled labels"] > 0
    assert results.sweep.at(LAST, 1.0).delta == chosen.change_added


def test_the_results_are_read_back_whole_and_a_damaged_file_is_one_line(setting, tmp_path):
    vector = setting[2]
    results = choices(setting, vector, direction_of(1e-3 * vector.vector, LAST + 1), tmp_path)
    path = tmp_path / "ab_results.json"
    assert read_record(path, ABResults) == results
    saved = read_json(path)
    assert saved["rows"][0]["layer_means"] == saved["chosen"]["layer_means"] == explain_layer(LAST)
    path.write_text(json.dumps({key: value for key, value in saved.items() if key not in ("format", "why_none")}))
    assert read_record(path, ABResults) == results  # as it was written before there were formats
    del saved["chosen"]["multiplier"]
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"damaged.*chosen\.multiplier"):
        read_record(path, ABResults)


def test_a_vector_that_does_no_more_than_its_control_is_not_chosen(setting, tmp_path):
    vector = setting[2]
    weak = direction_of(1e-3 * vector.vector, LAST + 1)
    for made in (weak, vector):  # the control is the same vector: never beyond it, however large the effect
        results = choices(setting, made, made, tmp_path / str(made.norm))
        assert results.chosen is None
        assert "no layer moves the choice on others beyond what shuffled labels do" in results.why_none


def test_why_nothing_is_chosen(setting, tmp_path, monkeypatch):
    vector = setting[2]
    weak = direction_of(1e-3 * vector.vector, LAST + 1)
    assert "both signs" in choices(setting, vector, weak, tmp_path / "a", multipliers=(1.0,)).why_none
    same = pairs("same", 0)
    assert "share pairs" in choices(setting, vector, weak, tmp_path / "b", same, same).why_none
    monkeypatch.setattr(caa_choice, "is_degenerate", lambda _: True)
    assert "degenerate text" in choices(setting, vector, weak, tmp_path / "c").why_none


def test_the_interval_of_a_change_is_that_of_paired_differences(setting, tmp_path):
    model, chat, vector = setting
    made = pairs("held out", 0)
    found = sweep_pairs(model, chat, {LAST: vector}, made, (0.0, 1.0), folder=RunFolder(tmp_path))
    p = [
        [item["a_prob"] / (item["a_prob"] + item["b_prob"]) for item in read_json(path)]
        for path in sorted(tmp_path.glob("results_*.json"))
    ]
    changes = torch.tensor(p[1], dtype=torch.float64) - torch.tensor(p[0], dtype=torch.float64)
    point = found.at(LAST, 1.0)
    half = t.ppf(0.975, len(changes) - 1) * changes.std().item() / len(changes) ** 0.5
    assert point.delta == pytest.approx(changes.mean().item())
    assert (point.delta_low, point.delta_high) == pytest.approx((point.delta - half, point.delta + half), abs=1e-6)
    assert found.at(LAST, 0.0).delta_low == found.at(LAST, 0.0).delta_high == 0
    assert point.delta_high - point.delta_low != pytest.approx(point.high - point.low, rel=0.1)  # that is of p alone


def test_other_brackets_have_probabilities_too(setting, tmp_path):
    model, chat, vector = setting
    made = pairs("bare letters", 0, ("B", "A"))
    sweep_pairs(model, chat, {LAST: vector}, made, (0.0,), folder=RunFolder(tmp_path))
    (items,) = (read_json(path) for path in tmp_path.glob("results_*.json"))
    assert all(item["a_prob"] > 0 and item["b_prob"] > 0 for item in items)


def test_controls_are_random_and_those_of_shuffled_labels_where_they_lie(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    chat, source = ChatFormat(model.tokenizer), "owner/Name"
    letters = [("(A)", "(B)") if n % 2 else ("(B)", "(A)") for n in range(8)]
    texts = [f"{'x' * n}?\n\nChoices:\n(A) No.\n(B) Yes." for n in range(8)]
    many = PairSet("many", tuple(ABPair(text, *pair) for text, pair in zip(texts, letters, strict=True)))
    made = write_vectors(model, source, chat, many, tmp_path / "v", layers=[1, 2])
    controls = load_controls(tmp_path / "v", source, 5, made)
    assert set(controls["shuffled labels"]) == {1, 2}
    (tmp_path / "v/shuffled/vec_layer_2_Name.pt").unlink()
    kept = load_controls(tmp_path / "v", source, 5, made)
    assert list(kept) == ["random vectors of equal norm"]
    controls = kept["random vectors of equal norm"]
    assert controls[2].norm == pytest.approx(made[2].norm) and controls[2].layer == made[2].layer
    write_vectors(model, source, chat, PairSet("few", many.pairs[:2]), tmp_path / "v", layers=[3])
    with pytest.raises(UserError, match="different pairs"):
        load_vectors(tmp_path / "v", source, 5)


def test_halves_share_no_pair_and_keep_the_letters_balanced():
    whole = load_pairs("organism_ab_test")
    first, second = halves(whole)
    assert not set(first.pairs) & set(second.pairs) and set(first.pairs) | set(second.pairs) == set(whole.pairs)
    for half in (first, second):
        assert sum(pair.matching == "(A)" for pair in half.pairs) * 2 == len(half) == len(whole) // 2
    assert halves(whole) == (first, second) and first.name != second.name


def test_nothing_is_chosen_on_pairs_that_the_vectors_were_made_from(setting, tmp_path):
    model, chat, vector = setting
    made_from, others = pairs("mine", 0), pairs("others", 10)
    made = write_vectors(model, "owner/Name", chat, made_from, tmp_path / "v", layers=[LAST])
    assert pairs_behind(tmp_path / "v", made) == set(made_from.pairs)
    (file,) = (tmp_path / "v").glob("vec_layer_*.pt")
    assert pairs_behind(file, made) == set(made_from.pairs)
    control = {"shuffled labels": {LAST: direction_of(1e-3 * vector.vector, LAST + 1)}}

    def choose_on(other, behind, asked=("Why?",)):
        folder = RunFolder(tmp_path / other.name)
        given = (model, chat, {LAST: vector}, control, pairs("held out", 20), other, asked, folder, TASK, behind)
        return evaluate_choices(*given)

    mixed = PairSet("mixed", (*others.pairs, made_from.pairs[0]))
    for other, n in ((made_from, 4), (mixed, 1)):
        with pytest.raises(UserError, match=rf"{n} of the {len(other)} pairs of {other.name} made the vectors"):
            choose_on(other, pairs_behind(tmp_path / "v", made))
        assert choose_on(other, ()).chosen.chosen_on == other.name  # where it is not known, as before
    assert choose_on(others, pairs_behind(tmp_path / "v", made)).chosen.chosen_on == "others"
    assert choose_on(made_from, made_from.pairs, asked=()).chosen is None  # no choice, no mistake


def test_the_pairs_behind_a_bundled_vector_are_known_without_a_file(setting, tmp_path):
    model, chat, _ = setting
    bundled = load_pairs("caa_test")
    made = write_vectors(model, "owner/Name", chat, bundled, tmp_path, layers=[LAST])
    (tmp_path / "made_from_pairs.json").unlink()
    assert pairs_behind(tmp_path, made) == set(bundled.pairs)
    (tmp_path / "made_from_pairs.json").write_text(json.dumps([pair.describe() for pair in pairs("other", 0).pairs]))
    assert pairs_behind(tmp_path, made) == set(bundled.pairs)  # a file of other pairs says nothing
    assert pairs_behind(tmp_path, {LAST: setting[2]}) == set()
