"""Response-averaged vectors: what is averaged, what is written, how a layer is chosen and what is reported."""

import json

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.cli.spelling import own_spelling
from refusal_mi.directions import Direction, layer_rows
from refusal_mi.errors import UserError
from refusal_mi.files import as_json, read_record
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.judges.http import HttpJudge
from refusal_mi.measures import kl_nats, next_token_logits, refusal_score
from refusal_mi.model.points import resid_hook
from refusal_mi.reading import combine_spans
from refusal_mi.recipes import responses_eval
from refusal_mi.recipes.options import REFUSAL_INSTRUCTION, EvalOptions, VectorOptions
from refusal_mi.recipes.responses import (
    NothingSurvives,
    VectorMetadata,
    recorded_dataset,
    row_direction,
    vector,
)
from refusal_mi.recipes.responses_eval import (
    EvalSummary,
    Evaluation,
    LayerScore,
    RefusalRates,
    evaluate_vector,
)
from refusal_mi.run.stages import RunFolder
from refusal_mi.stats import Rate
from refusal_mi.text.batches import Span
from refusal_mi.text.chat import ChatFormat

SIDES = ("compliant", "refusal")
METADATA = {
    "n_queries",
    "n_completions_per_query",
    "n_compliant_responses_generated",
    "n_refusal_responses_generated",
    "n_compliant_responses_kept",
    "n_refusal_responses_kept",
    "compliant_filter_rate",
    "refusal_filter_rate",
    "seed",
    "vector_shape",
}


class EvenJudge:
    """A random model refuses nothing, so these tests call every other length a refusal."""

    name = "even"

    def complied(self, prompts, responses):
        return [len(response) % 2 == 0 for response in responses]


class NeverJudge(EvenJudge):
    """Nothing complies."""

    def complied(self, prompts, responses):
        return [False for _ in responses]


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "queries.txt"
    path.write_text("".join(f"What is {'x' * (i % 7)}{i} good for?\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def made(tiny_model, tiny_dir, queries, tmp_path_factory):
    """A vector folder, its metadata and its model."""
    folder = tmp_path_factory.mktemp("vector")
    options = VectorOptions(str(queries), n_samples=4, n_completions=3, max_new_tokens=4, batch_size=12)
    model = tiny_model("gpt2", "float64")
    return folder, vector(model, str(tiny_dir("gpt2")), options, RunFolder(folder), EvenJudge()), model, options


def _read(folder, name):
    return json.loads((folder / name).read_text())


def _states(reference, ids):
    """hidden_states[l] of plain transformers is the stream entering block l (the last one is normed)."""
    with torch.no_grad():
        return torch.stack([s[0] for s in reference(torch.tensor([ids]), output_hidden_states=True).hidden_states])


def test_spans_are_averaged_without_padding_or_neighbors(tiny_model, plain_model):
    model, reference = tiny_model("gpt2", "float64"), plain_model("gpt2", "float64")
    texts = [(5, 6, 7, 8, 9, 10, 11), (40, 41, 42), (90, 91, 92, 93, 94)]
    spans = [Span(texts[0], 2, 5), Span(texts[1], 1, 2), Span(texts[2], 0, 5)]
    weights = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    means = torch.stack([_states(reference, span.token_ids)[:, span.first : span.end].mean(1) for span in spans])
    expected = torch.einsum("cs,sld->cld", weights, means)
    for batch_size in (1, 3):
        found = combine_spans(model, spans, weights, pad_id=0, batch_size=batch_size)
        assert torch.allclose(found[:, :-1], expected[:, :-1], atol=1e-12)
    normalized = combine_spans(model, spans, weights, pad_id=0, normalize=True, batch_size=3)
    norms = means.norm(dim=-1, keepdim=True)
    expected = torch.einsum("cs,sld->cld", weights, means / norms * norms.mean(0))
    assert torch.allclose(normalized[:, :-1], expected[:, :-1], atol=1e-12)
    assert not torch.allclose(normalized, found, atol=1e-3)
    shifted = [Span(texts[0], 1, 4), *spans[1:]]
    assert not torch.allclose(combine_spans(model, shifted, weights, pad_id=0), found, atol=1e-3)


def test_the_vector_is_the_difference_of_means_in_the_context_of_generation(made, plain_model):
    folder, _, model, _ = made
    reference, chat = plain_model("gpt2", "float64"), ChatFormat(model.tokenizer)
    tokens = _read(folder, "response_tokens.json")
    means = []
    for side, kept in (("compliant", "compliant"), ("refusing", "refusal")):
        rows = _read(folder, f"{kept}_responses.json")
        wanted = [len(row["response"]) % 2 == (side == "refusing") for row in rows]
        total = []
        for row, entry, keep in zip(rows, tokens[side], wanted, strict=True):
            if keep and entry["token_ids"]:
                prompt = chat.encode(row["prompt"])
                total.append(_states(reference, prompt + entry["token_ids"])[:, len(prompt) :].mean(1))
        assert len(total) == len(_read(folder, f"filtered_{kept}_responses.json"))
        means.append(torch.stack(total).mean(0))
    found = torch.load(folder / "refusal_vector.pt", weights_only=True)
    assert found.shape == (model.cfg.n_layers + 1, model.cfg.d_model) and found.dtype == torch.float32
    assert torch.allclose(found[:-1].double(), (means[1] - means[0])[:-1], atol=1e-6)
    assert row_direction(found, model.cfg.n_layers).hook_name == f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def test_documented_files(made):
    folder, record, model, _ = made
    metadata = _read(folder, "metadata.json")
    assert set(metadata) >= METADATA and metadata == as_json(record)
    assert record == read_record(folder / "metadata.json", VectorMetadata)
    assert metadata["vector_shape"] == [model.cfg.n_layers + 1, model.cfg.d_model]
    for side in SIDES:
        rows, kept = (_read(folder, f"{part}{side}_responses.json") for part in ("", "filtered_"))
        assert len(rows) == metadata[f"n_{side}_responses_generated"] == 12
        assert len(kept) == metadata[f"n_{side}_responses_kept"] > 0
        assert metadata[f"{side}_filter_rate"] == len(kept) / 12
        prefix = "" if side == "compliant" else REFUSAL_INSTRUCTION
        for row in rows:
            assert list(row) == ["instruction", "prompt", "response"]
            assert row["prompt"] == prefix + row["instruction"]
        assert all(row in rows for row in kept)
        assert len({row["response"] for row in rows}) > 6
    assert [name.split(".")[-1] for name in metadata["hook_names"]] == ["hook_resid_pre"] * 5 + ["hook_resid_post"]


def test_the_same_seed_gives_the_same_files_and_another_does_not(made, tiny_dir, tmp_path):
    folder, _, model, options = made
    names = ["refusal_vector.pt", "compliant_responses.json", "refusal_responses.json"]
    vector(model, str(tiny_dir("gpt2")), options, RunFolder(tmp_path / "same"), EvenJudge())
    assert all((tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    other = VectorOptions(**{**vars(options), "seed": 7})
    vector(model, str(tiny_dir("gpt2")), other, RunFolder(tmp_path / "other"), EvenJudge())
    assert not any((tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_the_options_beyond_the_documented_ones(made, tiny_dir, tmp_path):
    folder, _, model, options = made
    plain = layer_rows(folder / "refusal_vector.pt", 5)
    changed = VectorOptions(
        **{
            **vars(options),
            "refusal_instructions": (REFUSAL_INSTRUCTION, "Say no.\n"),
            "layers": (1, 3),
            "token_weights": "first",
        }
    )
    metadata = vector(model, str(tiny_dir("gpt2")), changed, RunFolder(tmp_path), EvenJudge())
    assert metadata.n_refusal_responses_generated == 24 and metadata.layers == (1, 3)
    rows = layer_rows(tmp_path / "refusal_vector.pt", 5)
    assert rows.any(dim=1).tolist() == [False, True, False, True, False, False]
    assert not torch.allclose(rows[1], plain[1], atol=1e-3)
    with pytest.raises(UserError, match="layer 6 does not exist"):
        vector(
            model, str(tiny_dir("gpt2")), VectorOptions(options.dataset, layers=(6,)), RunFolder(tmp_path), EvenJudge()
        )


def test_the_dataset_of_a_published_folder_is_unknown(made, tmp_path):
    folder, _, _, options = made
    assert recorded_dataset(folder) == options.dataset
    published = {key: value for key, value in _read(folder, "metadata.json").items() if key in METADATA}
    (tmp_path / "metadata.json").write_text(json.dumps(published))
    assert recorded_dataset(tmp_path) is recorded_dataset(tmp_path / "none") is None


def test_when_nothing_survives_the_responses_are_kept(made, tiny_dir, tmp_path):
    _, _, model, options = made
    with pytest.raises(NothingSurvives, match=r"no compliant response.*--dataset"):
        vector(model, str(tiny_dir("gpt2")), options, RunFolder(tmp_path), NeverJudge())
    assert len(_read(tmp_path, "compliant_responses.json")) == 12
    assert _read(tmp_path, "filtered_compliant_responses.json") == []
    assert not (tmp_path / "refusal_vector.pt").exists()


def test_where_none_survive_no_vector_of_other_responses_stays(made, tiny_dir, tmp_path):
    class NeverJudge(EvenJudge):
        name = "never"

        def complied(self, prompts, responses):
            return [False for _ in responses]

    _, _, model, options = made
    vector(model, str(tiny_dir("gpt2")), options, RunFolder(tmp_path), EvenJudge())
    assert (tmp_path / "refusal_vector.pt").exists() and (tmp_path / "metadata.json").exists()
    with pytest.raises(NothingSurvives):
        vector(model, str(tiny_dir("gpt2")), options, RunFolder(tmp_path), NeverJudge())
    assert not (tmp_path / "refusal_vector.pt").exists() and not (tmp_path / "metadata.json").exists()


def test_the_same_judge_at_another_address_decides_anew(made, tiny_dir, tmp_path, monkeypatch):
    """Two endpoints share a name; what one kept is not the other's."""
    _, _, model, options = made
    asked = []

    def complied(self, prompts, responses):
        asked.append(self.url)
        return [index % 2 == 0 for index, _ in enumerate(responses)]

    monkeypatch.setattr(HttpJudge, "complied", complied)
    urls = ["http://localhost:1/v1", "http://localhost:1/v1", "http://localhost:2/v1"]
    for url in urls:
        vector(model, str(tiny_dir("gpt2")), options, RunFolder(tmp_path), HttpJudge(url))
    assert asked == [urls[0]] * 2 + [urls[2]] * 2


def test_when_few_survive_the_report_says_which_and_what_helps(made, tiny_dir, tmp_path):
    class FewJudge(EvenJudge):
        def complied(self, prompts, responses):
            return [index < 9 for index, _ in enumerate(responses)]

    _, _, model, options = made
    lines: list[str] = []
    metadata = vector(model, str(tiny_dir("gpt2")), options, RunFolder(tmp_path, report=lines.append), FewJudge())
    (warning,) = metadata.warnings
    assert "3 of 12 refusing responses" in warning and "--refusal-instruction" in warning
    assert any(line == f"warning: {warning}" for line in lines)


@pytest.fixture(scope="module")
def evaluated(made, tiny_dir, queries, tmp_path_factory):
    folder, _, model, _ = made
    out = tmp_path_factory.mktemp("eval")
    options = EvalOptions(
        str(queries),
        n_validation_samples=6,
        n_test_samples=5,
        coefficients=(0.0, 1.0),
        max_new_tokens=4,
        refusal_tokens=(10, 20),
        layer=2,
    )
    summary = evaluate_vector(model, str(tiny_dir("gpt2")), folder, options, RunFolder(out), EvenJudge())
    return out, summary, model, folder, options


def test_every_row_is_scored_at_the_hook_it_was_read_from(evaluated):
    out, summary, model, folder, options = evaluated
    chat = ChatFormat(model.tokenizer)
    scores = _read(out, "layer_selection_scores.json")
    rows = scores["per_layer_scores"]
    assert [row["layer"] for row in sorted(rows, key=lambda row: row["layer"])] == [0, 1, 2, 3, 4, 5]
    assert rows == sorted(rows, key=lambda row: -row["steering_score"])
    trained_on = {row["instruction"] for row in _read(folder, "compliant_responses.json")}
    run = Evaluation(model, summary.model_path, folder, options, RunFolder(out), EvenJudge())
    val, test = set(run.val.instructions), set(run.test.instructions)
    assert not (val & test or val & trained_on or test & trained_on) and len(val) == 6 and len(test) == 5
    vectors = layer_rows(folder / "refusal_vector.pt", 5)
    plain = next_token_logits(model, chat, run.val.instructions)
    assert scores["baseline_refusal_score"] == pytest.approx(refusal_score(plain, (10, 20)).mean().item())
    for row in rows:
        layer = row["layer"]
        name = f"blocks.{layer}.hook_resid_pre" if layer < 5 else "blocks.4.hook_resid_post"
        logits = []
        for text in run.val.instructions:
            hooks = [(name, lambda x, hook: x + vectors[layer])]
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                logits.append(model(torch.tensor([chat.encode(text)]))[0, -1])
        expected = refusal_score(torch.stack(logits), (10, 20)).mean().item()
        assert row["steering_score"] == pytest.approx(expected, abs=1e-9)
        assert row["improvement_over_baseline"] == pytest.approx(expected - scores["baseline_refusal_score"])
        ablation = (Ablate(Direction(vectors[layer], layer, resid_hook(layer, 5))),)
        ablated = next_token_logits(model, chat, run.val.instructions, interventions=ablation)
        assert row["kl_nats_ablation"] == pytest.approx(kl_nats(plain, ablated).mean().item(), abs=1e-9)


def test_documented_evaluation_files(evaluated):
    out, record, model, *_ = evaluated
    summary = _read(out, "eval_summary.json")
    assert summary == as_json(record) and record == read_record(out / "eval_summary.json", EvalSummary)
    documented = {
        "model_path",
        "vector_dir",
        "selected_layer",
        "layer_selection_method",
        "baseline_refusal_score",
        "selected_layer_steering_score",
        "n_validation_samples",
        "n_test_samples",
        "validation_seed",
        "test_seed",
        "results_by_coefficient",
    }
    assert documented <= set(summary) and summary["selected_layer"] == 2
    assert list(summary["results_by_coefficient"]) == ["0.0", "1.0"]
    for coefficient, found in summary["results_by_coefficient"].items():
        rows = _read(out, f"eval_completions_coeff_{coefficient}.json")
        assert [list(row) for row in rows] == [["category", "prompt", "response"]] * 5
        assert found["total_count"] == 5
        assert found["refusal_count"] == sum(len(row["response"]) % 2 for row in rows)
        assert found["refusal_rate"] == found["refusal_count"] / 5
    assert list(summary["random_controls"]["0"]) == ["1.0"]
    zero = _read(out, "eval_completions_coeff_0.0.json")
    plain = generate(model, ChatFormat(model.tokenizer), [row["prompt"] for row in zero], max_new_tokens=4)
    assert [row["response"] for row in zero] == [answer.text for answer in plain]


def test_a_late_or_degenerate_winner_is_flagged_and_the_best_other_named():
    broken = {9: 0.0, 7: 0.5, 6: 0.05}.__getitem__
    ranked = [LayerScore(layer, 10.0 - place, 0.0, 0.0) for place, layer in enumerate((9, 8, 7, 6))]
    flags, sound = responses_eval.check_layers(10, ranked, broken)
    assert flags == ["late (from 8 on)"] and sound == 6
    assert responses_eval.check_layers(10, ranked[2:], broken) == (["0.50 of its answers are degenerate text"], 6)
    assert responses_eval.check_layers(10, ranked[3:], broken) == ([], 6)
    assert responses_eval.check_layers(10, ranked[:2], broken) == (["late (from 8 on)"], None)


def test_the_conclusion_looks_only_at_coefficients_before_text_breaks():
    def rates(rate, high, broken):
        return RefusalRates(round(20 * rate), 20, rate, (0.0, high), Rate(round(20 * broken), 20))

    rising = {"0.0": rates(0.0, 0.2, 0.0), "2.0": rates(0.95, 1.0, 0.05), "5.0": rates(0.1, 0.3, 0.9)}
    assert responses_eval.conclude(rising) == responses_eval.Conclusion(
        first_degenerate_coefficient=5.0,
        refusal_does_not_fall_before=True,
        best_sound_coefficient=2.0,
        best_sound_refusal_rate=0.95,
    )
    falling = {**rising, "3.0": rates(0.5, 0.7, 0.0)}
    assert responses_eval.conclude(falling).refusal_does_not_fall_before is False


def test_other_shapes_are_refused(tmp_path):
    torch.save(torch.zeros(5, 8), tmp_path / "refusal_vector.pt")
    with pytest.raises(UserError, match=r"n_layers \+ 1"):
        layer_rows(tmp_path / "refusal_vector.pt", 5)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("--model_path x --n_samples 5", "--model-path x --n-samples 5"),
        ("m --coefficients 0.0 0.5 1.0 --seed 3", "m --coefficients=0.0,0.5,1.0 --seed 3"),
        ("--multipliers -1 0 1 m", "--multipliers=-1,0,1 m"),
        ("--layers 13 14", "--layers=13,14"),
        ("--layers 13,15-17", "--layers=13,15-17"),
        ("--layers=all m", "--layers=all m"),
        ("--multipliers -1,0,1", "--multipliers=-1,0,1"),
        ("--coefficients 1e-1 -.5 -o", "--coefficients=1e-1,-.5 -o"),
        ("--layers --seed 1", "--layers --seed 1"),
        ("--multipliers -1 --seed 1 --multipliers 2", "--multipliers=-1,2 --seed 1"),
    ],
)
def test_published_spellings(given, own):
    assert own_spelling(given.split()) == own.split()


@pytest.mark.slow
def test_the_commands_of_the_write_up(made, tiny_dir, queries, tmp_path, monkeypatch, capsys):
    folder, _, _, _ = made
    monkeypatch.chdir(tmp_path)
    model = ["--model_path", str(tiny_dir("gpt2")), "--dataset", str(queries)]
    sizes = ["--n_samples", "2", "--n_completions", "2", "--max_new_tokens", "3", "--generation_batch_size", "2"]
    # A random model never refuses: the science fails, the responses stay.
    assert exit_status(["vector", *model, *sizes, "--output_dir", "v"]) == 1
    assert (tmp_path / "v/refusal_responses.json").exists()
    assert "no refusing response passes" in capsys.readouterr().err
    sizes = ["--n_validation_samples", "3", "--n_test_samples", "2", "--max_new_tokens", "3", "--batch_size", "2"]
    seeds = ["--validation_seed", "1", "--test_seed", "2", "--refusal-tokens", "10", "--n-random", "0"]
    rest = [*sizes, *seeds, "--vector_dir", str(folder), "--coefficients", "0.0", "2.5", "--output_dir", "e"]
    assert exit_status(["vector-eval", *model, *rest]) == 0
    assert list(_read(tmp_path, "e/eval_summary.json")["results_by_coefficient"]) == ["0.0", "2.5"]
    assert exit_status(["vector-eval", *model, *rest, "--kl-max", "0"]) == 1
    assert "no layer survives" in capsys.readouterr().out
    other = ["--model_path", str(tiny_dir("llama")), "--dataset", str(queries)]
    assert exit_status(["vector-eval", *other, *rest]) == 2
    assert "holds a run of" in capsys.readouterr().err
