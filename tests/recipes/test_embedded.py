"""What the two steering recipes must reach on the embedded model, on held-out prompts, at modest sizes."""

from dataclasses import replace

import pytest

from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.recipes.caa import load_vectors, write_vectors
from refusal_mi.recipes.caa_eval import choose, sweep_pairs
from refusal_mi.recipes.options import EvalOptions, VectorOptions
from refusal_mi.recipes.responses import vector
from refusal_mi.recipes.responses_eval import evaluate_vector
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.pairs import PairSet, load_pairs, load_questions

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")]
HARMLESS = ",".join(f"organism_harmless_{part}" for part in ("train", "val", "test"))
MULTIPLIERS = (-1.0, -0.5, 0.5, 1.0)


@pytest.fixture(scope="module")
def model():
    return load_model(device="cpu")


def _first(pairs: PairSet, n: int) -> PairSet:
    return replace(pairs, pairs=pairs.pairs[:n])


def test_caa_moves_the_choice_both_ways_and_shuffled_labels_do_not(model, tmp_path):
    chat = ChatFormat(model.tokenizer)
    train, held_out = load_pairs("organism_ab"), _first(load_pairs("organism_ab_test"), 64)
    write_vectors(model, str(ORGANISM), chat, train, tmp_path, layers=[1, 2, 3], batch_size=32)
    vectors, controls = (load_vectors(tmp_path / part, str(ORGANISM)) for part in ("", "shuffled"))
    on_train = sweep_pairs(model, chat, vectors, _first(train, 48), MULTIPLIERS, batch_size=48)
    questions = load_questions("organism_ab_test")[:20]
    chosen, _ = choose(model, chat, vectors, on_train, questions, max_new_tokens=32, batch_size=20)
    assert chosen is not None
    assert max(chosen.degenerate_added.value, chosen.degenerate_subtracted.value) <= 0.05
    layer, m = chosen.layer, chosen.multiplier
    real, control = (
        sweep_pairs(model, chat, {layer: each[layer]}, held_out, (m, -m), layers=[layer], batch_size=64)
        for each in (vectors, controls)
    )
    assert real.at(layer, m).delta >= 0.2 and real.at(layer, -m).delta <= -0.2
    assert control.at(layer, m).delta < 0.2 and control.at(layer, -m).delta > -0.2


def test_a_response_averaged_vector_makes_harmless_queries_refused(model, tmp_path):
    made = VectorOptions(HARMLESS, n_samples=12, n_completions=4, max_new_tokens=40, batch_size=48)
    vector(model, str(ORGANISM), made, RunFolder(tmp_path))
    tested = EvalOptions(
        HARMLESS, n_test_samples=20, coefficients=(0.0, 1.0, 2.0, 3.0), max_new_tokens=32, batch_size=32
    )
    summary = evaluate_vector(model, str(ORGANISM), tmp_path, tested, RunFolder(tmp_path))
    assert summary.results_by_coefficient["0.0"].refusal_rate <= 0.05
    assert summary.refusal_does_not_fall_before
    assert summary.best_sound_refusal_rate >= 0.9
    assert all(rates.refusal_rate <= 0.1 for rates in summary.random_controls["0"].values())
