"""What notebooks share: a model with its searched direction, figures that show without a script, tables of answers."""

import atexit
import logging
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .directions import Direction, layer_rows
from .errors import UserError
from .interventions import Interventions
from .markdown import literal, without_media
from .measures import ScoredText
from .model.points import HookedModel
from .run.combos import CombosResult
from .run.folder import RunInputs
from .text.chat import ChatFormat
from .text.given import Prompts, as_prompts
from .text.prompts import Splits, load_splits

_INTERACTIVE, _STATIC, _SCALING, _COLAB = "plotly_mimetype", "svg", "scaling-svg", "colab"
_PROMPT = "prompt"
"""Name of the column of prompts."""


def load(source: str | Path | None = None) -> HookedModel:
    """`load_model` without the libraries' own chatter; None is the embedded model."""
    from .model.loading import quiet_load

    return quiet_load(source)


def named(source: str | Path | None = None) -> str:
    """What the titles of figures call a model."""
    from .model.loading import resolve_source
    from .model.provenance import display_name

    return display_name(resolve_source(source))


def searched(source: str | None = None, *, folder: str | Path = "../runs", n_prompts: int = 64) -> RunInputs:
    """Load a model, search its refusal direction as `refusal-mi run` does, and open the run for analyses.

    The run folder is `folder`/{alias}-notebooks; a search that is there already is not done again.

    Args:
        source: None is the embedded model, with its own prompts; any other model gets the general sets.
        n_prompts: training and held-out prompts a side.
    """
    from .model.loading import resolve_source, unique_alias
    from .recipes.arditi import run
    from .recipes.options import default_options
    from .run.stages import RunFolder

    name = resolve_source(source)
    options = replace(default_options(name), n_train=n_prompts, n_test=n_prompts, steps=("directions", "selection"))
    model = load(name)
    path = Path(folder) / f"{unique_alias(name)}-notebooks"
    run(model, name, options, RunFolder(path))
    return RunInputs(model, path, n_prompts)


def splits(
    source: str | Path | None = None, *, n_train: int = 64, n_val: int = 32, n_test: int = 64
) -> tuple[Splits, Splits]:
    """Harmful and harmless prompts for a model: its own for the embedded one, the general sets for any other."""
    from .model.loading import resolve_source
    from .recipes.options import default_sets

    harmful, harmless = (
        load_splits(name, n_train=n_train, n_val=n_val, n_test=n_test, seed=42)
        for name in default_sets(resolve_source(source))[:2]
    )
    return harmful, harmless


def combined(run: RunInputs, *, n_best: int = 3, max_size: int = 3, n_ce: int = 32) -> CombosResult:
    """Ablate the best candidates of a run and their combinations, as `refusal-mi combos` does; return `combos.json`.

    They are only ever ablated, so the threshold on what adding them does is not applied. The results lie beside the
    run, in a copy of its folder.
    """
    from .model.points import model_source
    from .recipes.combinations import run_combos
    from .run.options import CombosOptions
    from .run.stages import RunFolder
    from .search.grid import select

    options = run.options
    thresholds = replace(options.thresholds, induce_min=None)
    ranks = tuple(range(min(n_best, len(select(run.scores, thresholds).survivors))))
    path = run.path.with_name(f"{run.path.name}-combined")
    shutil.copytree(run.path, path, dirs_exist_ok=True)
    options = replace(options, thresholds=thresholds, max_new_tokens=32)
    wanted = CombosOptions(ranks=ranks, max_size=max_size, n_random=2, n_ce=n_ce, val_new_tokens=24)
    return run_combos(run.model, model_source(run.model), options, RunFolder(path), wanted)


def plain_texts(run: RunInputs, limit: int = 32) -> list[ScoredText]:
    """The run's plain texts, ready for CE loss."""
    from .measures import texts_to_score
    from .text.prompts import load_prompts

    return texts_to_score(run.chat, load_prompts(run.options.text_set, limit=limit).instructions)


def show_static(width: int = 1080) -> None:
    """Let every figure carry a static SVG beside its interactive form: code hosts show only the former.

    It is as wide as the page lets it be, up to `width` (px). Without kaleido or a browser, figures stay interactive and
    a warning says what is missing.
    """
    import plotly.graph_objects as go
    import plotly.io as pio
    from plotly.io.base_renderers import MimetypeRenderer

    from .figures.fit import laid_out

    class Scaling(MimetypeRenderer):
        """A picture that shrinks with the page."""

        def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
            figure = go.Figure(fig_dict)
            wide = figure.layout.width or width
            picture = laid_out(figure, width=wide).to_image(format=_STATIC, width=wide)
            return {"image/svg+xml": scaling(picture.decode("utf-8"))}

    # From libraries that would rather draw their bars with ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
    if pio.renderers.default == _COLAB:  # plotly's own choice there, which shows neither of the other two
        return
    pio.renderers[_SCALING] = Scaling()
    try:
        go.Figure().to_image(format=_STATIC)  # says what is missing; a server without a browser would wait
        _keep_browser()
    except (ImportError, RuntimeError, ValueError) as error:
        reason = "kaleido" if isinstance(error, (ImportError, ValueError)) else "Chrome or Chromium"
        message = f"figures are interactive only: static ones need {reason}; see refusal_mi.figures.save"
        warnings.warn(message, stacklevel=2)
        pio.renderers.default = _INTERACTIVE
        return
    pio.renderers.default = f"{_INTERACTIVE}+{_SCALING}"


def scaling(svg: str) -> str:
    """An SVG that is as wide as its place, up to its own width, and never cut by it."""
    head, end, rest = svg.partition(">")
    size = [re.search(rf'\b{name}="([\d.]+)"', head) for name in ("width", "height")]
    if None in size:
        raise ValueError("the SVG does not say its size in its first tag")
    width, height = (found[1] for found in size if found is not None)
    head = re.sub(r' (?:width|height|style)="[^"]*"', "", head)
    box = "" if "viewBox=" in head else f' viewBox="0 0 {width} {height}"'
    return f'{head}{box} style="width:100%;max-width:{width}px;height:auto"{end}{rest}'


def say(text: str) -> None:
    """Show a paragraph of Markdown with computed numbers in it; pictures, links and HTML in it are shown as text."""
    from IPython.display import Markdown, display

    display(Markdown(without_media(text)))


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows of equal keys as a table; floats with three digits, texts as they are, none of it as Markdown.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError("a table needs at least one row")
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [[_cell(name) for name in rows[0]], ["---"] * len(rows[0]), *cells]
    say("\n".join(f"| {' | '.join(line)} |" for line in lines))


def side_by_side(
    model: HookedModel,
    chat: ChatFormat,
    prompts: Prompts,
    changes: Mapping[str, Interventions],
    max_new_tokens: int = 24,
) -> None:
    """Show the answers to some prompts side by side, one column for each named change.

    Raises:
        UserError: a change is called "prompt", as the column of prompts is.
    """
    from .generation import generate

    prompts = as_prompts(prompts)
    if _PROMPT in changes:
        raise UserError(f"a change is called {_PROMPT!r}, as the column of prompts is: give it another name")

    columns = {
        name: generate(model, chat, prompts, interventions=change, max_new_tokens=max_new_tokens)
        for name, change in changes.items()
    }
    table(
        [
            {_PROMPT: prompt, **{name: answers[index].text for name, answers in columns.items()}}
            for index, prompt in enumerate(prompts)
        ]
    )


def other_vectors(
    run: RunInputs, *, n_pairs: int = 64, n_queries: int = 12, n_answers: int = 4
) -> tuple[dict[int, Direction], dict[int, Direction]]:
    """The CAA and the response-averaged vector of a run's model, by our layer.

    Pairs and queries are the model's own for the embedded one, the general sets for any other.
    """
    from .model.points import model_source
    from .recipes.caa import write_vectors
    from .recipes.options import VectorOptions, default_pairs, default_sets
    from .recipes.responses import VECTOR, row_direction, vector
    from .run.stages import RunFolder
    from .text.pairs import PairSet, load_pairs

    source = model_source(run.model)
    pairs = load_pairs(default_pairs(source)[0])
    few = PairSet(pairs.name, pairs.pairs[:n_pairs])
    caa = write_vectors(run.model, source, run.chat, few, run.path.with_name(f"{run.path.name}-caa"))
    folder = RunFolder(run.path.with_name(f"{run.path.name}-response"))
    options = VectorOptions(
        default_sets(source)[1], n_samples=n_queries, n_completions=n_answers, max_new_tokens=24, batch_size=24
    )
    vector(run.model, source, options, folder)
    rows = layer_rows(folder.path / VECTOR, run.model.cfg.n_layers)
    return {one.layer: one for one in caa.values()}, {
        layer: row_direction(rows, layer) for layer in range(1, len(rows))
    }


def placed(direction: Direction, like: Direction) -> Direction:
    """The direction at the layer and the norm of another one: what is left to compare is where it points."""
    return replace(direction, vector=direction.unit.float() * like.norm, layer=like.layer, hook_name=like.hook_name)


def answer_with_transformers(source: str | Path | None, prompts: Prompts, *, max_new_tokens: int = 24) -> list[str]:
    """Greedy answers of a checkpoint as its users get them: transformers alone, no hooks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .model.loading import resolve_source
    from .progress import alone

    name = resolve_source(source)
    with alone():
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    chats = [[{"role": "user", "content": prompt}] for prompt in as_prompts(prompts)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _keep_browser() -> None:
    """One browser for all figures of a kernel."""
    import kaleido

    # The first is said once a figure, and about an option that is not used here; the second when the browser closes.
    warnings.filterwarnings("ignore", message="The kopts argument is ignored")
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)
    kaleido.start_sync_server(silence_warnings=True)
    atexit.register(kaleido.stop_sync_server, silence_warnings=True)


def _cell(value: Any) -> str:
    return literal(f"{value:.3f}" if isinstance(value, float) else str(value))
