"""What the recipes must reach on the embedded model, on held-out prompts, at modest sizes."""

from dataclasses import replace

import pytest

from refusal_mi.directions import difference_in_means
from refusal_mi.interventions import Ablate, AblateInTurn
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.reading import mean_activations, template_residuals
from refusal_mi.recipes.caa import load_vectors, write_vectors
from refusal_mi.recipes.caa_eval import choose, sweep_pairs
from refusal_mi.recipes.options import EvalOptions, VectorOptions
from refusal_mi.recipes.responses import vector
from refusal_mi.recipes.responses_eval import evaluate_vector
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.pairs import PairSet, load_pairs, load_questions
from refusal_mi.text.prompts import load_prompts

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
    vectors, controls = (load_vectors(tmp_path / part, str(ORGANISM), 10) for part in ("", "shuffled"))
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


@pytest.mark.parametrize("second", [2, 7])
def test_of_two_directions_one_after_the_other_the_first_keeps_a_few_percent(model, second):
    """Ranks 0 and 2 of a quick and of a whole run; nothing of their span stays, and more with writes alone."""
    chat = ChatFormat(model.tokenizer)
    harmful, harmless = (load_prompts(f"organism_{side}_train").instructions[:64] for side in ("harmful", "harmless"))
    grid = difference_in_means(*(mean_activations(model, chat, texts) for texts in (harmful, harmless)))
    pair = [grid.direction(-1, layer) for layer in (3, second)]
    held_out = load_prompts("organism_harmful_test").instructions[:32]
    layers = range(3, model.cfg.n_layers)

    def along_first(*interventions):
        """Root mean square over prompts and positions, at the input of every block from the direction's own on."""
        found = template_residuals(model, chat, held_out, layers=layers, interventions=interventions)
        return (found.double() @ pair[0].unit).square().mean((0, 1)).sqrt()

    plain = along_first()
    kept, of_writes = along_first(AblateInTurn(pair)) / plain, along_first(*map(Ablate, pair)) / plain
    assert kept.min() > 0.02 and kept.max() < 0.1
    assert (of_writes > 1.5 * kept).all()
    assert (along_first(Ablate(pair)) / plain).max() < 1e-6
