"""Numbers do not depend on where, how often and in which order items are done: no cluster is needed to see that."""

import pickle
import sys
from dataclasses import replace

import pytest
import torch

from refusal_mi.engine.jobs import Engine, Job
from refusal_mi.engine.named import engine_named
from refusal_mi.engine.same import SameModel
from refusal_mi.errors import UserError
from refusal_mi.generation import Sampling, generate
from refusal_mi.interventions import Add
from refusal_mi.measures import ce_loss, text_losses, texts_to_score
from refusal_mi.model.loading import load_model
from refusal_mi.search.grid import select
from refusal_mi.search.localize import localize_removal, map_writes
from refusal_mi.search.removals import RemovalItem, RemovalScorer
from refusal_mi.search.staged import Screening, staged_sweep
from refusal_mi.search.sweep import Scorer, ScoreTable, exact_items, sweep
from refusal_mi.search.thresholds import Thresholds
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import grid_of
from tests.helpers.engines import Remembering, Shuffled
from tests.helpers.naive import ASKS, CHATS

TOKENS = [(5,), (6, 7)]
HARMFUL, HARMLESS = list(ASKS[1:]), list(CHATS[1:])
ENGINES = [Shuffled(0), Shuffled(1, n_copies=1, times=2)]


@pytest.fixture(scope="module")
def parts(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer, "Be kind.")
    return model, chat, grid_of(model, chat, ASKS, CHATS)


def test_an_exact_sweep_gives_the_same_bits_in_any_order(parts):
    here = sweep(*parts, HARMFUL, HARMLESS, TOKENS)
    assert len({row.bypass for row in here.rows}) > 10
    for engine in ENGINES:
        assert sweep(*parts, HARMFUL, HARMLESS, TOKENS, engine=engine) == here


def test_a_staged_search_chooses_and_leaves_out_the_same_in_any_order(parts):
    rule, some = Thresholds(kl_max=None, induce_min=-6.0), Screening(n_prompts=2, n_contenders=3)

    def search(engine=None):
        return staged_sweep(*parts, HARMFUL, HARMLESS, TOKENS, thresholds=rule, screening=some, n_best=2, engine=engine)

    here = search()
    assert any(row.skipped and "screened" in row.skipped for row in here.rows) and select(here, rule).survivors
    assert all(search(engine) == here for engine in ENGINES)


def test_scores_that_depend_on_what_ran_before_would_show(parts):
    """The control: a difference in the last digits, which the tests above would see."""
    scorers = [kind(*parts, HARMFUL, HARMLESS, [TOKENS]) for kind in (Remembering, Remembering, Scorer)]
    tables = [ScoreTable(scorer) for scorer in scorers]
    items = exact_items(tables[0].open, len(HARMFUL), len(HARMFUL) + len(HARMLESS))
    for table, order in zip(tables, (items, items[::-1], items), strict=True):
        for item in order:
            table.run(item)
    forth, back, plain = (table.grids()[0] for table in tables)
    assert forth != back and (forth.per_prompt - plain.per_prompt).nan_to_num().abs().max() < 1e-9


def test_answers_are_the_same_in_any_order(parts):
    model, chat, grid = parts
    asked, how = [*HARMFUL, *HARMLESS, "long " * 20], {"interventions": Add(grid.direction(-1, 2)), "batch_size": 3}
    here = generate(model, chat, asked, max_new_tokens=6, **how)
    assert len({answer.text for answer in here}) > 3
    for engine in ENGINES:
        assert generate(model, chat, asked, max_new_tokens=6, **how, engine=engine) == here
    with pytest.raises(UserError, match="greedy"):
        generate(model, chat, asked, sampling=Sampling(seed=0), engine=ENGINES[0])


@pytest.mark.parametrize("is_plain", [True, False])
def test_losses_are_the_same_in_any_order(parts, is_plain):
    model, chat, grid = parts
    texts = texts_to_score(chat, [*HARMFUL, *HARMLESS, "long " * 30])
    how = {"interventions": () if is_plain else Add(grid.direction(-1, 2)), "batch_size": 2}
    here = text_losses(model, chat, texts, **how)
    assert len({each.nats for each in here}) == len(texts)
    for engine in ENGINES:
        assert text_losses(model, chat, texts, **how, engine=engine) == here
    assert ce_loss(model, chat, texts, **how, engine=ENGINES[0]) == ce_loss(model, chat, texts, **how)
    assert text_losses(model, chat, texts, **how | {"batch_size": 5}) != here, (
        "the control: other batches round otherwise"
    )


def test_the_least_removal_is_found_the_same_in_any_order(parts):
    """Its rounds read more and more prompts: what the plain model gives of them must not depend on who reads them."""
    model, chat, grid = parts
    asked, answered = ([f"{text} {'now ' * n}" for n in range(5) for text in side] for side in (HARMFUL, HARMLESS))
    direction = grid.direction(-1, 2)

    def search(engine=None):
        scorer = RemovalScorer(model, chat, asked, answered, [5])
        found = localize_removal(scorer, [direction], n_generations=0, engine=engine)
        return found, *map_writes(scorer, direction, engine)

    found, *mapped = search()
    again, *others = search(Shuffled(1))
    assert found.n_tried > len(found.measured) >= 12 and len({each.mean_kl for each in found.measured}) > 10
    assert [each.removal for each in again.measured] == [each.removal for each in found.measured]
    both = zip(again.measured, found.measured, strict=True)
    pairs = [pair for a, b in both for pair in ((a.scores, b.scores), (a.kl, b.kl))]
    assert all(torch.equal(a, b) for a, b in [*pairs, *zip(others[1:], mapped[1:], strict=True)])
    assert others[0] == mapped[0]
    scorer = RemovalScorer(model, chat, asked, answered, [5])
    removal = found.measured[0].removal
    item = RemovalItem((direction,), (removal.weights(model.cfg.n_layers),), len(asked), (len(answered),))
    _, kl = scorer.run(item)
    assert not kl[0].equal(found.measured[0].kl), "the control: all at once round otherwise"
    assert torch.allclose(kl[0], found.measured[0].kl, atol=1e-5)


def test_jobs_and_engines_are_what_they_say(parts):
    assert isinstance(ENGINES[0], Engine) and isinstance(Scorer(*parts, HARMFUL, HARMLESS, [TOKENS]), Job)
    assert not isinstance(ENGINES[0], Job)


def test_another_process_finds_the_same_model_or_says_what_differs(tiny_dir):
    same = pickle.loads(pickle.dumps(SameModel.of(load_model(tiny_dir("llama"), device="cpu"))))
    assert SameModel.of(same.load()) == same
    for changed, message in (
        (replace(same, versions={**same.versions, "torch": "1.0"}), r"a worker has torch .* and this process 1\.0"),
        (replace(same, record=replace(same.record, fingerprint="0" * 64)), r"fingerprint is \w{12}, not 000000000000"),
    ):
        with pytest.raises(UserError, match=message):
            changed.load()


def test_a_model_that_was_given_as_an_object_is_refused_in_one_line(plain_model, tiny_dir):
    from transformers import AutoModelForCausalLM

    held = load_model(AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), attn_implementation="eager"))
    with pytest.raises(UserError, match="given as an object"):
        SameModel.of(held)


@pytest.mark.parametrize(
    "name, workers, message",
    [
        ("rey", None, "--engine takes local, ray or ray://HOST:PORT, not 'rey'"),
        ("local", 2, "--workers is for --engine ray"),
        ("ray", 2, r"--engine ray needs Ray: pip install 'refusal_mi\[ray\]'"),
        ("ray", 0, r"\(--workers\) must be at least 1, not 0"),
    ],
)
def test_an_engine_that_there_is_not_is_one_line(name, workers, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=message):
        engine_named(name, workers)


def test_here_is_no_engine():
    with engine_named("local") as engine:
        assert engine is None
