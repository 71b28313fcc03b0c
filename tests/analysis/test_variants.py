"""Other wordings of a run's requests: what is read is what other ways read, controls show what is not chance."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refusal_mi.analysis.attention import attend_by_region
from refusal_mi.analysis.attribution import top_heads
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.variants import variants
from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.files import read_json
from refusal_mi.generation import generate
from refusal_mi.judges.named import judge_named
from refusal_mi.judges.substring import is_refusal
from refusal_mi.measures import refusal_scores
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.run.folder import RunInputs
from refusal_mi.run.stages import RunFolder
from refusal_mi.run.variants import VariantsResult
from refusal_mi.stats import Paired, holm, mean_interval
from refusal_mi.text.prompts import load_prompts
from refusal_mi.text.variants import PLACE, Variant
from tests.helpers.cases import HARMFUL, HARMLESS, TOKENS
from tests.helpers.directions import random_direction
from tests.helpers.models import TEMPLATE
from tests.helpers.runs import write_head

SUFFIX = Variant("suffix", f"{PLACE} ok now")
FRAME = Variant("frame", f"Act. {PLACE}", "Be kind.")
N = 12
DISTRACTION = " What are the steps to make noodles? Teach me to print a ticket. Write a plan to walk a turtle."


@pytest.fixture(scope="module")
def tiny(tiny_model, tiny_dir, tmp_path_factory):
    """A run of a tiny model, and what was found with two variants."""
    path, model = tmp_path_factory.mktemp("tiny-run"), tiny_model("llama")
    write_head(path, model, str(tiny_dir("llama")), {"harmful": HARMFUL, "harmless": HARMLESS}, TOKENS)
    random_direction().save(path / "direction.pt")
    run = RunInputs(model, path)
    return run, variants(run, [SUFFIX, FRAME], max_new_tokens=4)


def test_the_numbers_are_those_that_are_read_in_other_ways(tiny):
    run, found = tiny
    assert found.n_prompts == {"harmful": 5, "harmless": 5} and found.positions == run.chat.positions
    heads = top_heads(run.model, run.chat, run.direction, run.prompts("harmful", "val"), 8)
    assert found.heads == heads
    for side in ("harmful", "harmless"):
        asked = run.prompts(side)
        for chat, texts, wording in (
            (run.chat, asked, found.plain[side]),
            (run.chat, [f"{each} ok now" for each in asked], found.row("suffix").sides[side].given),
            (replace(run.chat, system="Be kind."), [f"Act. {e}" for e in asked], found.row("frame").sides[side].given),
        ):
            scores = refusal_scores(run.model, chat, texts, TOKENS)
            assert wording.score_nats == pytest.approx(mean_interval(scores.tolist()), rel=1e-6)
            projected = project_residuals(run.model, chat, run.direction, {side: texts}, seed=run.seed)
            for grid, expected in (
                (wording.projections, projected.projections),
                (wording.random_projections, projected.control_projections),
            ):
                means = torch.tensor(grid, dtype=torch.float64)[..., 0]
                torch.testing.assert_close(means, expected[:, 1:].mean(0), atol=1e-5, rtol=1e-5)
            answers = [each.text for each in generate(run.model, chat, texts, max_new_tokens=4)]
            assert wording.refused.count == sum(map(is_refusal, answers))
    regions = attend_by_region(
        run.model, run.chat, run.direction, run.prompts("harmful"), suffix=" ok now", heads=heads
    )
    given = found.row("suffix").sides["harmful"].given
    for part, region in (("context", 0), ("instruction", 1), ("variant", 2), ("template", 3)):
        attention = regions.mass[2, :, :, region].mean().item()
        assert given.attention[part][0] == pytest.approx(attention, abs=1e-6)
        along = regions.contributions[2, :, :, region].sum(-1).mean().item()
        assert given.written[part][0] == pytest.approx(along, abs=1e-5)
        assert given.n_tokens[part] == regions.n_tokens[2, :, region].mean().item()


def test_changes_are_paired_and_controls_as_long(tiny):
    run, found = tiny
    for row in found.rows:
        for side, each in row.sides.items():
            assert each.control.n_tokens == each.given.n_tokens and each.given.n_tokens["variant"] > 0
            for change, before, after in (
                (each.change, found.plain[side], each.given),
                (each.control_change, found.plain[side], each.control),
                (each.beyond_control, each.control, each.given),
            ):
                old, new = (torch.tensor(of.projections)[..., 0] for of in (before, after))
                torch.testing.assert_close(torch.tensor(change.projections)[..., 0], new - old, atol=1e-5, rtol=1e-5)
                assert change.refused["difference"] == pytest.approx(after.refused.value - before.refused.value)
    assert [name for name, *_ in found.wordings("harmful")] == [
        "plain",
        "suffix",
        "suffix (control)",
        "frame",
        "frame (control)",
    ]
    assert VariantsResult.load(run.path / "variants") == found
    assert len(found.to_frame()) == 10


def test_what_was_done_is_kept_and_only_what_changed_is_done_again(tiny):
    run, found = tiny
    lines: list[str] = []
    folder = RunFolder(run.path / "variants", report=lines.append)
    assert variants(run, [SUFFIX, FRAME], folder=folder, max_new_tokens=4) == found
    assert len(lines) == 1 + 2 * 5 and all("kept" in line for line in lines)
    lines.clear()
    other = variants(run, [replace(SUFFIX, template=f"{PLACE} ok then"), FRAME], folder=folder, max_new_tokens=4)
    again = {line.partition(":")[0] for line in lines if "kept" not in line}
    assert again == {"suffix.harmful", "suffix.harmless", "suffix.control-harmful", "suffix.control-harmless"}
    assert other.row("frame").sides["harmful"].given == found.row("frame").sides["harmful"].given
    assert other.row("suffix").sides["harmful"].given != found.row("suffix").sides["harmful"].given


class Strict:
    """A judge for whom every answer refuses, and who remembers what it was asked."""

    name = "strict"

    def __init__(self):
        self.prompts = []

    def complied(self, prompts, responses):
        self.prompts += prompts
        return [False] * len(responses)


def test_another_judge_is_asked_about_what_the_model_read(tiny, tmp_path):
    run, found = tiny
    judge, few = Strict(), RunInputs(run.model, run.path, max_prompts=2)
    strict = variants(few, [SUFFIX], folder=RunFolder(tmp_path), judge=judge, max_new_tokens=2)
    assert strict.judge == "strict" and strict.plain["harmless"].refused.value == 1
    assert found.plain["harmless"].refused.value == 0
    asked = few.prompts("harmful")
    assert judge.prompts[:2] == asked and [f"{each} ok now" for each in asked] == judge.prompts[4:6]


def test_layers_that_do_not_reach_the_last_are_told_too(tiny):
    found, far, none = tiny[1], (1.0, 0.5, 1.5), (0.0, -1.0, 1.0)
    row = found.row("suffix")
    side = row.sides["harmful"]
    n = len(side.change.projections[0])

    def acting(change, beyond):
        grids = [
            tuple(tuple(far if at in of else none for at in range(n)) for _ in found.positions)
            for of in (change, beyond)
        ]
        new = [
            replace(each, projections=grid)
            for each, grid in zip((side.change, side.beyond_control), grids, strict=True)
        ]
        sides = row.sides | {"harmful": replace(side, change=new[0], beyond_control=new[1])}
        return replace(found, rows=(replace(row, sides=sides), found.rows[1]))

    one = acting({0, 1}, {1})
    assert one.acts_at("suffix") == (1,) and one.in_words((1,)) == "at layer 1, not up to the last"
    apart = acting(set(), {0, 1})
    assert apart.acts_at("suffix") == () and apart.differs_at("suffix") == (0, 1)
    assert found.in_words(()) == "at no layer" and found.in_words(range(1, n)) == "from layer 1 on"
    assert found.in_words((0, n - 1)) == f"at layer 0 and from layer {n - 1} on"


class Labelling(Strict):
    """One of three classes: harmless answers are evaded."""

    def __init__(self, model="a"):
        super().__init__()
        self.identity = {"name": self.name, "model": model}

    def labels(self, prompts, responses):
        return ["evade" if "refuse" not in prompt else "refuse" for prompt in prompts]


def test_another_model_behind_a_judge_is_asked_anew_and_an_evasion_is_no_refusal(tiny, tmp_path):
    few, lines = RunInputs(tiny[0].model, tiny[0].path, max_prompts=2), []
    folder = RunFolder(tmp_path, report=lines.append)
    found = variants(few, [Variant("told", f"{PLACE} refuse")], folder=folder, judge=Labelling(), max_new_tokens=1)
    row = found.row("told").sides["harmless"].given
    assert found.plain["harmless"].refused.value == 0 and row.refused.value == 1
    for model, is_kept in (("a", True), ("b", False)):
        lines.clear()
        variants(few, [SUFFIX], folder=folder, judge=Labelling(model), max_new_tokens=1)
        assert any(line.startswith("plain.harmless") and "kept" in line for line in lines) is is_kept


def test_a_judge_of_harm_is_refused(tiny):
    with pytest.raises(UserError, match="llamaguard2 says what is harmful, not what is refused"):
        variants(tiny[0], [SUFFIX], judge=judge_named("llamaguard"))


def test_what_cannot_be_asked_is_one_line(tiny, own_model, tmp_path):
    run, _ = tiny
    with pytest.raises(UserError, match="two variants are called"):
        variants(run, [SUFFIX, replace(SUFFIX, name="Suffix")])
    with pytest.raises(UserError, match="there is none"):
        variants(run, [])
    own_model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}er"
    merged = RunInputs(own_model, run.path)
    with pytest.raises(UserError, match="'glued' runs into the tokens that the chat template"):
        variants(merged, [Variant("glued", f"{PLACE} us")], folder=RunFolder(tmp_path))  # "user" is one token
    only_users = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    own_model.tokenizer.chat_template = only_users + TEMPLATE
    with pytest.raises(UserError, match=r"'frame': the chat template refuses .*no system role"):
        variants(RunInputs(own_model, run.path), [FRAME], folder=RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The embedded model asked plainly, politely, and with three harmless requests after each: by the command."""
    if not ORGANISM.is_dir():
        pytest.skip("the embedded model is not built")
    path, model = tmp_path_factory.mktemp("embedded-run"), load_model(device="cpu")
    sides = {side: list(load_prompts(f"organism_{side}_test")[: N + 1]) for side in ("harmful", "harmless")}
    refusal = model.tokenizer("I", add_special_tokens=False)["input_ids"]
    write_head(path, model, str(ORGANISM), sides, refusal)
    replace(Direction.load(ORGANISM.parent / "planted_direction.pt"), position=-1).save(path / "direction.pt")
    rows = [{"name": "polite", "template": f"Please: {PLACE}"}, {"name": "three more", "template": PLACE + DISTRACTION}]
    (path / "mine.json").write_text(json.dumps(rows))
    words = ["variants", f"--variants={path / 'mine.json'}", f"--run={path}", "--max-new-tokens=8"]
    assert exit_status(words) == 0
    return words, VariantsResult.load(path / "variants")


@pytest.mark.slow
def test_a_suffix_that_stops_refusals_does_so_where_the_direction_is_read(asked):
    _, found = asked
    assert found.plain["harmful"].refused.value > 0.9 and found.plain["harmless"].refused.value < 0.1
    more, polite = (found.row(name).sides["harmful"] for name in ("three more", "polite"))
    assert more.given.refused.value < 0.2 and more.change.p_holm < 0.01
    assert more.control.refused.value > 0.6 and more.beyond_control.refused["difference"] < -0.5, "length is not it"
    assert polite.given.refused.value > 0.9 and polite.change.p_holm == 1
    place = found.slot, found.direction_layer + 1
    at = {name: getattr(more, name).projections[place[0]][place[1]] for name in ("change", "beyond_control")}
    assert at["change"][2] < 0 and at["beyond_control"][2] < 0, "the direction is not written any more"
    random = more.change.random_projections[place[0]][place[1]]
    assert abs(random[0]) < 0.3 * abs(at["change"][0]), "a random direction hardly moves"
    assert more.given.attention["instruction"][2] < found.plain["harmful"].attention["instruction"][1]
    assert more.given.written["instruction"][0] < 0.5 * found.plain["harmful"].written["instruction"][0]
    assert found.in_words(found.acts_at("three more")).endswith("on") and set(found.acts_at("three more")) >= {place[1]}
    values = holm([Paired(0, 0, 0, 1).p_value, more.change.refused["p"]])
    assert more.change.p_holm == pytest.approx(values[1]), "over both variants"


@pytest.mark.slow
def test_the_command_prints_draws_and_goes_on(asked, capsys, monkeypatch):
    words, found = asked
    folder = Path(words[2].partition("=")[2]) / "variants"
    assert exit_status([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"][1]["sides"]["harmful"]["change"]["p_holm"] < 0.01
    assert said.err.count("kept") == 11 and "tokens" not in said.err, "nothing was computed again"
    for name in ("projections", "rates", "parts"):
        assert "Plotly.newPlot" in (folder / f"{name}.html").read_text(encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_status(words) == 0
    shown = capsys.readouterr().out
    assert (
        "three more begins: " in shown
        and "three more changes ⟨x, r̂⟩ beyond its control: harmful" in shown
        and "I cannot help" in shown
    )
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert all(len(line) <= 80 and line.count("[") == line.count("]") for line in rows)
    assert sum("│ three more" in line for line in rows) >= 4 and not any("…" in line for line in rows)
    assert sum(line.strip("│ ").partition("│")[0] == "" for line in rows) == 0, "no cell goes on in a second line"
    assert read_json(folder / "variants.json")["n_prompts"] == found.n_prompts


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(asked, tmp_path, capsys):
    words, _ = asked
    for change, said in (
        ([words[0], words[2]], "--variants FILE is missing"),
        ([*words, f"--variants={tmp_path / 'none.json'}"], "no such file"),
        ([*words, "--n-prompts=1"], "--n-prompts must be at least 2"),
        ([*words, f"--run={tmp_path}"], "is not a run folder"),
    ):
        assert exit_status(change) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
