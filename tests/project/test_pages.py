"""The pages of the site: every link leads somewhere, every block of Python runs, every analysis has its five lines."""

import importlib.util
import inspect
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import refusal_mi
from refusal_mi.analysis import KINDS
from refusal_mi.estimators import rdo
from refusal_mi.export import export_checkpoint
from refusal_mi.interventions import Ablate
from refusal_mi.judges.substring import is_refusal
from refusal_mi.loaded import load_run
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.recipes import options
from refusal_mi.studies.table import write_table
from tests.helpers.figures import studied
from tests.helpers.pages import PAGES, ROOT, blocks, broken_links, run_blocks

DOCS = ROOT / "docs"
OF_OTHER_TESTS = {ROOT / "README.md", DOCS / "python.md", DOCS / "judges.md"}
RUN_HERE = {DOCS / f"{name}.md" for name in ("concepts", "analyses", "conditional", "estimators", "export")}
RUN_HERE |= {DOCS / "audit.md", DOCS / "loading.md", DOCS / "studies.md"}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = load()


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("[a](start.md)", "[a](stort.md)"),
        ("![a](../figures/lens.png)", "![a](../figures/lense.png)"),
        ("[a](estimators.md#your-own)", "[a](estimators.md#your-other)"),
        ("# The rule\n[a](#the-rule)", "# A rule\n[a](#the-rule)"),
        ("[a](../README.md)", "[a](../../README.md)"),
        ("[a](api/search.md#refusal_mi.search.grid.select)", "[a](api/search.md#refusal_mi.search.grid.selected)"),
        ("[a](api/search.md#refusal_mi.search.grid.select)", "[a](api/export.md#refusal_mi.search.grid.select)"),
        ("```\n[a](nowhere.md)\n```", "[a](nowhere.md)"),
    ],
)
def test_a_link_that_leads_nowhere_is_seen(good: str, bad: str) -> None:
    assert not list(broken_links(DOCS / "page.md", good))
    assert len(list(broken_links(DOCS / "page.md", bad))) == 1


def test_every_page_is_in_the_navigation_once() -> None:
    def files(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [name for each in (part.values() if isinstance(part, dict) else part) for name in files(each)]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    cards = [ROOT / "refusal_mi/data/README.md", ROOT / "refusal_mi/organism/model/README.md"]
    assert sorted(listed) == sorted(shown(page) for page in [*PAGES, *notebooks, *cards])


def test_what_the_package_exports_is_on_a_page_of_the_api() -> None:
    text = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    described = {module: members for module, members in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)}
    for name in set(refusal_mi.__all__) - {"__version__"}:
        options_of = described[getattr(refusal_mi, name).__module__]
        assert "members" not in options_of or re.search(rf"[\[ ]{name}[,\]]", options_of), name


def test_every_analysis_says_question_method_formula_source_call_and_figure() -> None:
    parts = re.split(r"^### (\w+)$", (DOCS / "analyses.md").read_text("utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(sections) == set(KINDS)
    of_notebooks = pictures.pictures(DOCS / "analyses.md")
    shown_in_site = pictures.with_pictures((DOCS / "analyses.md").read_text("utf-8"))
    assert re.findall(r"\(pictures/(\w+)\.svg\)", shown_in_site) == [*of_notebooks]
    assert all(svg.startswith("<svg") for svg in of_notebooks.values())
    assert len(set(of_notebooks.values())) == len(of_notebooks)
    for kind, text in sections.items():
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE)[:5] == [
            "Question", "Method", "Formula", "Source", "Call"
        ]  # fmt: skip
        assert f"[`{KINDS[kind][0]}(" in text and f"refusal_mi.analysis.{kind}.{KINDS[kind][0]})" in text
        has_picture = (ROOT / "figures" / f"{kind}.png").exists()
        assert f"(../figures/{kind}.png)" in text if has_picture else kind in of_notebooks


def test_a_notebook_without_the_figure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no cell of 01-.* calls refusal_lens"):
        pictures.first_figure(ROOT / "notebooks/01-find-a-refusal-direction.ipynb", "refusal_lens")


def test_every_page_with_python_is_run_by_a_test() -> None:
    assert {page for page in PAGES if blocks(page)} == OF_OTHER_TESTS | RUN_HERE


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """The names that all pages may use: those of the first block of docs/python.md."""
    return run_blocks(DOCS / "python.md", {}, slice(1))


@pytest.fixture
def run_page(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda name, **names: run_blocks(DOCS / f"{name}.md", given | names)


@pytest.mark.slow
def test_the_concepts_are_so(run_page: Any) -> None:
    names = run_page("concepts")
    direction, model = names["direction"], names["model"]
    assert direction.hook_name == "blocks.3.hook_resid_pre" and names["chat"].positions[-1] == -1
    assert direction.norm > 10 and direction.unit.norm().item() == pytest.approx(1, abs=1e-6)
    drawn = re.findall(r">((?:blocks\.\d\.)?hook_\w+)<", (DOCS / "stream.svg").read_text("utf-8"))
    assert len(set(drawn)) == 5  # what enters three blocks, what two components write
    assert all((name if "." in name else f"blocks.0.{name}") in model.hook_dict for name in drawn)


@pytest.mark.slow
def test_a_saved_analysis_is_drawn_again(run_page: Any) -> None:
    names = run_page("analyses")
    again = names["load_result"]("projections.json")
    assert again.to_frame().equals(names["found"].to_frame()) and names["plot"](again) == names["plot"](names["found"])


@pytest.mark.slow
def test_a_condition_is_learned_and_spares_the_harmless_prompts(run_page: Any) -> None:
    names = run_page("conditional")
    assert names["learned"].on_validation.auc.value > 0.95
    assert [is_refusal(answer.text) for answer in names["answers"]] == [True] * 4 + [False] * 4
    model, chat = names["model"], names["chat"]
    asked = [*names["harmful"][:2], *names["harmless"][:2]]
    logits, ablated, plain = (
        next_token_logits(model, chat, asked, interventions=each)
        for each in (names["refuses_less"], names["from_3"], ())
    )
    assert torch.equal(logits, torch.cat([plain[:2], ablated[2:]])) and not torch.equal(logits, plain)


@pytest.mark.slow
def test_an_estimator_of_ones_own_makes_the_grid_of_a_run(
    run_page: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = options.default_options
    few = {"n_train": 16, "n_val": 8, "steps": ("directions",)}
    monkeypatch.setattr(options, "default_options", lambda source: replace(whole(source), **few))
    monkeypatch.setattr(rdo, "RDOOptions", partial(rdo.RDOOptions, n_steps=2))
    names = run_page("estimators")
    assert names["rdo"](given["grid"], given["grid"]).n_layers == given["grid"].n_layers
    of_run, by_itself, plain = load_run("runs/mine").grid, names["grid"], given["grid"]
    assert of_run.vectors.shape == by_itself.vectors.shape == plain.vectors.shape
    assert "medians" in str(of_run.provenance) and not torch.allclose(by_itself.vectors, plain.vectors)


@pytest.mark.slow
def test_an_export_does_what_the_hooks_do(run_page: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    shutil.copytree(ORGANISM, tmp_path / "path/to/model")
    held = AutoModelForCausalLM.from_pretrained(ORGANISM, dtype=torch.float32)
    names = run_page("export", hf_model=held)
    model, chat, ask = given["model"], given["chat"], ["Wreck a factory."]
    hooked = next_token_logits(model, chat, ask, interventions=Ablate(given["direction"]))
    adapted = names["adapted"]
    ids = chat.batch(ask).tokens
    assert torch.allclose(adapted(ids).logits[0, -1].float(), hooked[0], atol=0.5)
    for edited in (load_model(tmp_path / "edited"), load_model(held, tokenizer=model.tokenizer)):
        assert torch.allclose(next_token_logits(edited, chat, ask), hooked, atol=0.1)
    assert not torch.allclose(next_token_logits(model, chat, ask), hooked, atol=1)
    assert names["report"].is_verified


@pytest.mark.slow
def test_an_audit_finds_what_was_removed(run_page: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    shutil.copytree(ORGANISM, tmp_path / "path/to/model")
    export_checkpoint(None, Ablate(given["direction"], layers=range(2, 5)), tmp_path / "edited", verify="none")
    names = run_page("audit")
    assert names["found"].verdict == "removed" and names["found"].in_blocks("mlp") == (2, 3, 4)
    assert names["found"].cosines[0] > 0.999 and len(names["figure"].data) == 2


def test_the_table_of_a_study_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "runs/study/study.parquet", studied())
    names = run_blocks(DOCS / "studies.md", {})
    assert names["ratios"].loc[("peel", 2)].tolist() == pytest.approx([2.1, 1.7])
    assert names["answers_all"].value.tolist() == [0.04] and names["failed"].model.tolist() == ["missing"]


def test_load_model_takes_what_the_page_gives_it() -> None:
    calls, signature = [], inspect.signature(load_model)

    def bound(*args: Any, **how: Any) -> None:
        calls.append(signature.bind(*args, **how))

    held = {name: object() for name in ("hf_model", "bridge", "hooked")}
    run_blocks(DOCS / "loading.md", {"load_model": bound, **held})
    assert len(calls) == 9
    with pytest.raises(TypeError):
        bound(device_mop="auto")
