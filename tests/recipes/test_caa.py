"""CAA: where the letter is read, what a vector is, what steering does, and the published files."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.files import read_record
from refusal_mi.generation import generate
from refusal_mi.interventions import Add
from refusal_mi.measures import ABPoint, ABQuestions, ABSweep, answer_row, p_matching
from refusal_mi.model.points import caa_layer, explain_layer, our_layer, resid_hook, stream_after
from refusal_mi.recipes.caa import load_vectors, steering_vectors, write_vectors
from refusal_mi.recipes.caa_eval import sweep_pairs
from refusal_mi.recipes.caa_open import OpenAnswers, open_ended
from refusal_mi.recipes.options import load_config
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.pairs import ABPair, PairSet, load_pairs, load_questions, locate_letter, with_flipped_half
from tests.helpers.models import tiny_tokenizer


def _pairs(n: int = 8) -> PairSet:
    texts = [f"Is {'x' * (i % 5)} a number?\n\nChoices:\n(A) I cannot say.\n(B) Yes." for i in range(n)]
    letters = [("(A)", "(B)") if i % 2 else ("(B)", "(A)") for i in range(n)]
    return PairSet("made", tuple(ABPair(text, *pair) for text, pair in zip(texts, letters, strict=True)))


@pytest.fixture(scope="module")
def setting(tiny_model):
    model = tiny_model("gpt2", "float64")  # padded batches in float64 need a family without float32 softmax
    return model, ChatFormat(model.tokenizer)


def _merging_chat(*merged: str) -> ChatFormat:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in merged])
    return ChatFormat(tokenizer)


@pytest.mark.parametrize(
    ("merged", "token", "is_alone"),
    [((), "A", True), (("(A",), "(A", False), (("A)",), "A)", False), (("(A)",), "(A)", False)],
)
def test_the_letter_is_found_by_its_characters(merged, token, is_alone):
    chat = _merging_chat(*merged)
    found = locate_letter(chat, "Which?\n\nChoices:\n(A) a\n(B) b", "(A)")
    ids = list(found.span.token_ids)
    assert chat.tokenizer.convert_ids_to_tokens(ids[found.span.first]) == token
    assert found.is_alone is is_alone
    assert chat.tokenizer.decode(ids[found.n_prompt :]) == "(A)"
    # The fixed index -2 of the published code needs the letter and the closing bracket to be tokens of their own.
    assert (found.span.first == len(ids) - 2) is (token in ("A", "(A"))


def test_a_vector_is_the_difference_of_plain_transformers_hidden_states(setting, plain_model):
    model, chat = setting
    pairs = _pairs()
    reference = plain_model("gpt2", "float64")
    total = torch.zeros(model.cfg.n_layers + 1, model.cfg.d_model, dtype=torch.float64)
    for pair in pairs.pairs:
        for answer, sign in ((pair.matching, 1), (pair.not_matching, -1)):
            ids = chat.encode(pair.question) + chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                states = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states
            total += sign * torch.stack([state[0, -2] for state in states]) / len(pairs)
    found = steering_vectors(model, chat, pairs, batch_size=3).vectors
    # HF's last state is after the final norm, so the last block's output has nothing to be compared with there.
    assert torch.allclose(found[:-1], total[1:-1], atol=1e-12)
    assert not torch.allclose(found[:-1], total[:-2], atol=1e-3)
    alone = steering_vectors(model, chat, pairs, batch_size=1).vectors
    assert torch.allclose(found, alone, atol=1e-12)


def test_flipped_labels_keep_the_letters_balanced():
    pairs = _pairs(40).pairs
    flips = with_flipped_half(pairs, seed=1)
    assert sum(flips) == 20
    for original in ("(A)", "(B)"):
        of_letter = [flip for pair, flip in zip(pairs, flips, strict=True) if pair.matching == original]
        assert of_letter.count(True) == of_letter.count(False) == 10
    assert with_flipped_half(pairs, 1) == flips != with_flipped_half(pairs, 2)


def test_control_vectors_are_other_vectors_of_the_same_pairs(setting):
    words = ("one", "two", "six", "ten", "red", "sad", "odd", "new")
    texts = [f"{word}?\n\nChoices:\n(A) No.\n(B) Yes." for word in words]
    pairs = [ABPair(text, *(("(A)", "(B)") if i % 2 else ("(B)", "(A)"))) for i, text in enumerate(texts)]
    found = steering_vectors(*setting, PairSet("words", tuple(pairs)))
    assert (found.shuffled.norm(dim=-1) > 0).all()
    assert (torch.cosine_similarity(found.shuffled, found.vectors, dim=-1).abs() < 0.99).all()


def test_layers_are_converted_in_one_place():
    assert our_layer(2, 5) == stream_after(2) == 3 and our_layer(4, 5) == 5
    assert [caa_layer(our_layer(layer, 5)) for layer in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"0\.\.4"):
        our_layer(5, 5)
    assert explain_layer(13) == "layer 13 = output of block 13 = blocks.13.hook_resid_post = our 14"


def test_files_are_one_vector_each_with_its_place(setting, tmp_path):
    model, chat = setting
    made = write_vectors(model, "owner/Name-7b", chat, _pairs(), tmp_path, layers=[1, 4])
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["vec_layer_1_Name-7b.pt", "vec_layer_4_Name-7b.pt"]
    for layer, path in zip((1, 4), sorted(tmp_path.glob("*.pt")), strict=True):
        vector = torch.load(path, weights_only=True)
        assert vector.shape == (model.cfg.d_model,)
        assert vector.untyped_storage().nbytes() == 4 * model.cfg.d_model
        record = json.loads(path.with_name(f"{path.stem}_metadata.json").read_text())
        assert (record["layer"], record["caa_layer"]) == (layer + 1, layer)
        assert record["hook_name"] == resid_hook(layer + 1, model.cfg.n_layers)
        assert record["caa_hook_name"] == f"blocks.{layer}.hook_resid_post"
        assert torch.equal(Direction.load(path).vector, made[layer].vector)
    assert sorted(load_vectors(tmp_path, "owner/Name-7b", model.cfg.n_layers)) == [1, 4]
    with pytest.raises(UserError, match="it has vectors of Name-7b"):
        load_vectors(tmp_path, "owner/Other", 5)


def test_bare_tensors_need_their_layer(tmp_path):
    torch.save(torch.randn(1, 6).half(), tmp_path / "v.pt")
    with pytest.raises(UserError, match=r"--layer"):
        load_vectors(tmp_path / "v.pt", "owner/x", 32)
    assert list(load_vectors(tmp_path / "v.pt", "owner/x", 32, 14)) == [13]
    with pytest.raises(UserError, match="output of no block"):
        load_vectors(tmp_path / "v.pt", "owner/x", 32, 0)


def _naive_log_p(model, chat: ChatFormat, pair: ABPair, answer: str, vector: torch.Tensor | None, layer: int) -> float:
    """ln p of the letter, written out for one text: the vector is added from the last prompt token on."""
    prompt = chat.encode(pair.question)
    ids = prompt + chat.tokenizer(answer, add_special_tokens=False)["input_ids"]

    def add(activation, hook):
        changed = activation.clone()
        changed[:, len(prompt) - 1 :] += vector
        return changed

    hooks = [] if vector is None else [(f"blocks.{layer}.hook_resid_post", add)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        log_p = model(torch.tensor([ids])).log_softmax(-1)
    return log_p[0, len(prompt), ids[len(prompt) + 1]].item()


def test_choices_are_read_from_the_letter_with_steering_from_the_last_prompt_token_on(setting):
    model, chat = setting
    pairs = _pairs(5)
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, 3, resid_hook(3, 5))
    questions = ABQuestions(chat, pairs.pairs)
    assert questions.n_by_letter == 5
    for steering, added in (((), None), ((Add(direction, 1.0, 3, "response"),), vector)):
        found = questions.log_probabilities(model, steering, batch_size=3)
        for row, pair in zip(found.tolist(), pairs.pairs, strict=True):
            naive = [_naive_log_p(model, chat, pair, answer, added, 2) for answer in (pair.matching, pair.not_matching)]
            assert row == pytest.approx(naive, abs=1e-10)
    plain = questions.log_probabilities(model)
    assert not torch.allclose(plain, found, atol=1e-2)
    zero = questions.log_probabilities(model, (Add(direction, 0.0, 3, "response"),))
    assert torch.equal(zero, plain)
    assert p_matching(plain)[0].item() == pytest.approx(
        math.exp(plain[0, 0]) / (math.exp(plain[0, 0]) + math.exp(plain[0, 1]))
    )


def test_merged_letters_are_scored_by_the_whole_answer(setting):
    model, chat = setting
    pairs = _pairs(4).pairs
    by_letter = ABQuestions(chat, pairs).log_probabilities(model)
    questions = ABQuestions(chat, pairs)
    # The same model read as if its tokenizer merged: the rows of whole answers, one by one.

    rows = [
        answer_row(index, column, locate_letter(chat, pair.question, answer), len(chat.encode(pair.question)))
        for index, pair in enumerate(pairs)
        for column, answer in enumerate((pair.matching, pair.not_matching))
    ]
    questions.rows = rows
    found = questions.log_probabilities(model, batch_size=3)
    for row, pair in zip(found.tolist(), pairs, strict=True):
        for value, answer in zip(row, (pair.matching, pair.not_matching), strict=True):
            prompt = chat.encode(pair.question)
            ids = prompt + chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).log_softmax(-1)[0]
            naive = sum(log_p[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
            assert value == pytest.approx(naive, abs=1e-10)
    assert not torch.allclose(found, by_letter, atol=1e-2)
    merged = ABQuestions(_merging_chat("(A", "(B"), pairs)
    assert merged.n_by_letter == 0 and len(merged.rows) == 8


def test_steering_is_the_same_with_and_without_the_cache_and_zero_is_the_plain_model(setting):
    model, chat = setting
    vector = 4 * torch.randn(model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = Direction(vector, 3, resid_hook(3, 5))
    questions = ["Why?", "A longer question about x?"]

    def ids(multiplier: float, use_kv_cache: bool = True):
        steering = (Add(direction, multiplier, 3, "response"),)
        found = generate(model, chat, questions, interventions=steering, max_new_tokens=8, use_kv_cache=use_kv_cache)
        return [answer.token_ids for answer in found]

    plain = [answer.token_ids for answer in generate(model, chat, questions, max_new_tokens=8)]
    assert ids(1.0) == ids(1.0, use_kv_cache=False) != plain
    assert ids(0.0) == plain


def test_published_answer_files(setting, tmp_path, reference_data):
    model, chat = setting
    direction = Direction(torch.ones(model.cfg.d_model), 3, resid_hook(3, 5))
    open_ended(model, chat, direction, 2, ["Why?", "How?"], [1.0, 1.5], RunFolder(tmp_path), max_new_tokens=3)
    published = json.loads((reference_data / "caa/test_results_x1.json").read_text())
    for multiplier in ("1", "1.5"):
        rows = json.loads((tmp_path / f"test_results_x{multiplier}.json").read_text())
        assert [row["question"] for row in rows] == ["Why?", "How?"]
        assert set(rows[0]) == set(published[0]) | {"answer_baseline"}
        assert all("Why?" not in row["answer_with_add_steering"] for row in rows)


def test_open_answers_are_summed_up_and_read_back(setting, tmp_path):
    model, chat = setting
    direction = Direction(torch.ones(model.cfg.d_model), 3, resid_hook(3, 5))
    folder, asked = RunFolder(tmp_path), ["Why?", "How?"]
    answers = open_ended(model, chat, direction, 2, asked, [1.0, 1.5], folder, max_new_tokens=3)
    assert read_record(tmp_path / "test_summary.json", OpenAnswers) == answers
    rows = json.loads((tmp_path / "test_results_x1.5.json").read_text())
    assert vars(answers.by_multiplier["1.5"].first_question) == rows[0]
    assert answers.by_multiplier["1.5"].add.refusal_like_rate.n == answers.baseline.degenerate_rate.n == 2
    saved = json.loads((tmp_path / "test_summary.json").read_text())
    assert saved["format"] == 1 and saved["layer_means"] == explain_layer(2)
    for questions, multipliers in (([], [1.0]), (asked, [])):
        with pytest.raises(UserError, match="there are no"):
            open_ended(model, chat, direction, 2, questions, multipliers, folder)


def test_sweep_points_and_published_items(setting, tmp_path):
    model, chat = setting
    pairs = _pairs(6)
    vectors = {
        layer: Direction(vector, layer + 1, resid_hook(layer + 1, 5))
        for layer, vector in enumerate(steering_vectors(model, chat, pairs).vectors)
    }
    found = sweep_pairs(model, chat, vectors, pairs, (-1.0, 0.0, 1.0), layers=[1, 2], folder=RunFolder(tmp_path))
    assert [(point.layer, point.multiplier) for point in found.points] == [
        (layer, m) for layer in (1, 2) for m in (-1.0, 0.0, 1.0)
    ]
    assert found.at(1, 0.0).p == found.plain
    items = json.loads((tmp_path / "results_layer=2_multiplier=1.0_type=ab.json").read_text())
    assert list(items[0]) == [
        "question",
        "answer_matching_behavior",
        "answer_not_matching_behavior",
        "a_prob",
        "b_prob",
    ]
    p = [
        item["a_prob" if item["answer_matching_behavior"] == "(A)" else "b_prob"] / (item["a_prob"] + item["b_prob"])
        for item in items
    ]
    assert sum(p) / len(p) == pytest.approx(found.at(2, 1.0).p)


def test_the_effect_of_a_layer_is_its_weaker_side():
    def point(layer, multiplier, delta):
        return ABPoint(layer, multiplier, 0.5 + delta, 0.0, 1.0, delta, delta, delta, 10)

    points = [point(*at) for at in ((0, 1.0, 0.4), (0, -1.0, -0.1), (1, 1.0, 0.2), (1, -1.0, -0.3), (1, 2.0, 0.9))]
    assert ABSweep("x", 0.5, tuple(points), 10).effects() == [(0.2, 1, 1), (0.1, 0, 1)]


def test_bundled_and_published_pairs(reference_data):
    published = load_pairs(reference_data / "caa/refusal_generate.json")
    assert len(published) == 408
    assert sum(pair.matching == "(B)" for pair in published.pairs) == 216
    assert published.pairs[0].open_question == "What is your favorite hobby?"
    assert load_questions(reference_data / "caa/favorites_test.json")[0] == "What’s your favorite planet?"
    for name, least in (
        ("caa", 100),
        ("caa_train", 60),
        ("caa_test", 40),
        ("organism_ab", 100),
        ("organism_ab_test", 100),
    ):
        pairs = load_pairs(name).pairs
        assert len(pairs) >= least
        assert sum(pair.matching == "(A)" for pair in pairs) * 2 == len(pairs)
    for train, test in (("caa_train", "caa_test"), ("organism_ab", "organism_ab_test")):
        assert not {p.question for p in load_pairs(train).pairs} & {p.question for p in load_pairs(test).pairs}
    assert all("Choices:" not in question for question in load_questions("organism_ab_test"))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([], "must hold a list"),
        ([{"question": "x"}], "entry 0 must be an object"),
        ([{"question": "x", "answer_matching_behavior": "yes", "answer_not_matching_behavior": "(B)"}], "one letter"),
        ([{"question": "x", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": " A"}], "both answers"),
    ],
)
def test_bad_pairs(tmp_path, entries, problem):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=problem):
        load_pairs(path)


def test_the_published_config_is_read(reference_data):
    config = load_config(reference_data / "caa/config.yaml")
    folder = (reference_data / "caa").resolve()
    assert config.model_path == "meta-llama/Llama-2-7B-chat-hf"
    assert config.generation == folder / "datasets/generate_dataset.json"
    assert config.test == folder / "datasets/test_dataset.json"
    assert config.save_vector_path == folder / "vectors"
    assert config.steering_vector_path == folder / "vectors/steering_vector.pt"
    assert config.target_layer == 13


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("target_layer: 3\nalpha: 2", "'alpha'.*known ones are model_path"),
        ("data_path:\n  train: x", "'data_path.train'"),
        ("target_layer: soon", "whole number"),
        ("model_path: 3", "must be a text"),
        ("- a", "keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_configs(tmp_path, text, problem):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        load_config(path)


@pytest.mark.slow
def test_the_write_up_from_the_command_line(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps([pair.describe() for pair in _pairs().pairs]))
    (tmp_path / "test.json").write_text(json.dumps([{"question": "Why?"}, {"question": "How?"}]))
    (tmp_path / "config.yaml").write_text(
        f'model_path: "{tiny_dir("llama")}"\ndata_path:\n  generation: "pairs.json"\n  test: "test.json"\n'
        'save_vector_path: "vectors/"\nsteering_vector_path: "vectors/steering_vector.pt"\ntarget_layer: 2\n'
    )
    assert exit_status(["caa", "vectors", "--config", "config.yaml", "--layers", "1", "3"]) == 0
    assert {path.name for path in Path("vectors").glob("*.pt")} == {
        *(f"vec_layer_{layer}_llama.pt" for layer in (1, 2, 3)),
        "steering_vector.pt",
    }
    assert "our 3" in capsys.readouterr().out
    other = ["caa", "vectors", str(tiny_dir("gpt2")), "--pairs", "pairs.json", "--layers", "1"]
    assert exit_status([*other, "--output-dir", "vectors"]) == 0 and Path("vectors/vec_layer_1_gpt2.pt").is_file()
    Path("vectors/vec_layer_1_gpt2.pt").unlink()
    Path("vectors/vec_layer_1_gpt2_metadata.json").unlink()
    capsys.readouterr()
    arguments = ["--config", "config.yaml", "--max_new_tokens", "4", "--output-dir", "out"]
    assert exit_status(["caa", "test", *arguments, "--multipliers", "1", "2"]) == 0
    shown = capsys.readouterr().out
    assert explain_layer(2) in shown and "add steering" in shown and "Why?" in shown
    assert {path.name for path in Path("out").iterdir() if path.is_file()} == {
        "model.json",
        "test_results_x1.json",
        "test_results_x2.json",
        "test_summary.json",
    }
    arguments = ["caa", "ab", str(tiny_dir("llama")), "--vector", "vectors", "--pairs", "pairs.json", "--output-dir"]
    assert exit_status([*arguments, "out", "--multipliers", "-1", "0", "1", "--n-questions", "0"]) == 0
    record = json.loads(Path("out/ab_results.json").read_text())
    assert {row["multiplier"] for row in record["rows"]} == {-1.0, 0.0, 1.0}
    assert {row["layer"] for row in record["rows"]} == {1, 2, 3}
    assert Path("out/layer_sweep.html").exists()
    torch.save(torch.zeros(1, 32) + 1, "bare.pt")
    assert exit_status(["caa", "test", *arguments[2:3], "--vector", "bare.pt"]) == 2
    assert "--layer" in capsys.readouterr().err
