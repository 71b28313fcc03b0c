"""Where the heads that write a direction look: system part, instruction, suffix or template."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar, Unpack

import circuitsvis
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..figures.views import Page, View, page, shown_tokens
from ..model.points import HookedModel, block_hook
from ..model.running import batches
from ..precision import as_double
from ..reading import captured
from ..run.folder import RunInputs
from ..stats import mean_interval
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .attribution import top_heads
from .result import AnalysisResult, call_with_a_run, provenance_of
from .sources import split_by_source

REGIONS = ("system", "instruction", "suffix", "template")
"""All that precedes the instruction (BOS, system message, header); the instruction; what is appended to it; the
post-instruction tokens."""
DEFAULT_SUFFIX = " Answer in one short sentence, please, and be friendly."


@dataclass(frozen=True, eq=False, repr=False)
class AttentionResult(AnalysisResult):
    """Attention of some heads from the last prompt position, summed over regions of the prompt.

    Examples:
        >>> found.mass.shape == (len(found.variants), found.n_prompts, len(found.heads), len(found.regions))
        True
        >>> found.mass.sum(-1).allclose(torch.ones(()).double(), atol=1e-5)
        True
    """

    kind: ClassVar[str] = "attention"
    units: ClassVar[Mapping[str, str]] = {
        "mass": "attention (fraction)",
        "contributions": "residual stream units along the unit direction",
        "n_tokens": "tokens",
        "example_pattern": "attention (fraction)",
    }

    heads: tuple[tuple[int, int], ...]
    """(layer, head)."""
    variants: tuple[str, ...]
    """How the instruction was changed: plain, random suffix, given suffix."""
    regions: tuple[str, ...]
    mass: Float[Tensor, "variant prompt head region"]
    """float64; sums to 1 over regions, or less where a head has an attention sink of its own."""
    contributions: Float[Tensor, "variant prompt head region"]
    """What the heads write along the direction, by the region that they read it from."""
    n_tokens: Float[Tensor, "variant prompt region"]
    suffix: str
    example_tokens: tuple[str, ...]
    """The first prompt with the given suffix."""
    example_pattern: Float[Tensor, "head query key"]

    def __post_init__(self) -> None:
        shape = (len(self.variants), self.mass.shape[1], len(self.heads), len(self.regions))
        if self.mass.shape != shape or self.contributions.shape != shape:
            raise ValueError(f"attention by region should have shape {shape}, not {tuple(self.mass.shape)}")

    @property
    def n_prompts(self) -> int:
        return self.mass.shape[1]


def attend_by_region(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    instructions: Prompts,
    *,
    suffix: str = DEFAULT_SUFFIX,
    heads: Sequence[tuple[int, int]] | None = None,
    n_heads: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> AttentionResult:
    """Attention mass of the last position per region, for plain, random-suffix and given-suffix prompts.

    The random suffix has as many tokens as the given one, drawn per prompt from the ordinary vocabulary
    (Arditi et al. 2024, section 5.2, with a suffix of the caller's).

    Examples:
        >>> figure = plot_attention(attend_by_region(model, chat, direction, harmful, heads=[(1, 0), (3, 2)]))

    Args:
        suffix: appended to every instruction as it stands, with its leading space.
        heads: (layer, head); by default the `n_heads` that write most along the direction on the plain prompts.

    Raises:
        UserError: there are no prompts, or the suffix adds no token.
    """
    check_in_stream(direction)
    instructions = as_prompts(instructions)
    if heads is None:
        heads = top_heads(model, chat, direction, instructions, n_heads, batch_size=batch_size)
    variants = _variants(model, chat, instructions, suffix, seed)
    shape = (len(variants), len(instructions), len(heads), len(REGIONS))
    mass, contributions = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    n_tokens = torch.zeros(len(variants), len(instructions), len(REGIONS), dtype=torch.float64)
    for index, prompts in enumerate(variants.values()):
        rows = [row for row, _ in prompts]
        written, pattern = split_by_source(
            model, rows, direction.unit, heads, pad_id=chat.pad_id, position=-1, batch_size=batch_size
        )
        for prompt, (row, labels) in enumerate(prompts):
            inside = torch.tensor([[label == region for region in REGIONS] for label in labels], dtype=torch.float64)
            mass[index, prompt] = pattern[prompt, :, -len(row) :] @ inside
            contributions[index, prompt] = written[prompt, :, -len(row) :] @ inside
            n_tokens[index, prompt] = inside.sum(0)
    row = variants["given suffix"][0][0]
    settings = {"suffix": suffix, "seed": seed, "direction": direction.describe()}
    return AttentionResult(
        tuple(heads),
        tuple(variants),
        REGIONS,
        mass,
        contributions,
        n_tokens,
        suffix,
        tuple(chat.tokenizer.convert_ids_to_tokens(row)),
        _patterns(model, row, chat.pad_id, heads),
        provenance=provenance_of(model, chat, {"prompts": instructions}, settings),
    )


def from_run(run: RunInputs) -> AttentionResult:
    """Regions that the top heads look at on held-out harmful prompts."""
    prompts = run.prompts("harmful", "test")
    return attend_by_region(
        run.model, run.chat, run.direction, prompts, seed=run.seed, batch_size=max(1, run.batch_size // 4)
    )


def label_regions(
    chat: ChatFormat, instruction: str, suffix: str | Sequence[int] = ""
) -> tuple[list[int], tuple[str, ...]]:
    """Token ids of a prompt and the region of each.

    The system part is what the ids share with the template's beginning; the template part the post-instruction
    ids. A suffix given as text begins at the first token that differs from the prompt without it; a suffix given as
    ids is put in before the post-instruction ids.
    """
    plain, n_post = chat.encode(instruction), len(chat.post_instruction_ids)
    n_pre = min(_n_shared(plain, chat.pre_instruction_ids), len(plain) - n_post)
    body = plain[:-n_post]
    whole = chat.encode(instruction + suffix) if isinstance(suffix, str) else body + list(suffix) + plain[-n_post:]
    n_before = _n_shared(body, whole[:-n_post])
    sizes = (n_pre, n_before - n_pre, len(whole) - n_post - n_before, n_post)
    labels = tuple(region for region, size in zip(REGIONS, sizes, strict=True) for _ in range(size))
    return whole, labels


def _variants(
    model: HookedModel, chat: ChatFormat, instructions: Sequence[str], suffix: str, seed: int
) -> dict[str, list[tuple[list[int], tuple[str, ...]]]]:
    given = [label_regions(chat, instruction, suffix) for instruction in instructions]
    lengths = [labels.count("suffix") for _, labels in given]
    if not lengths or min(lengths) == 0:
        raise UserError("attention by region needs at least one prompt and a suffix that adds a token to each")
    rng, ordinary = random.Random(seed), _ordinary_tokens(model, chat)
    noise = [rng.choices(ordinary, k=length) for length in lengths]
    return {
        "plain": [label_regions(chat, instruction) for instruction in instructions],
        "random suffix": [label_regions(chat, text, ids) for text, ids in zip(instructions, noise, strict=True)],
        "given suffix": given,
    }


def _ordinary_tokens(model: HookedModel, chat: ChatFormat) -> list[int]:
    """Ids that text is made of: no added (special) tokens, none beyond the vocabulary."""
    special = {*chat.tokenizer.get_added_vocab().values(), *chat.tokenizer.all_special_ids}
    return [token for token in range(min(len(chat.tokenizer), model.cfg.d_vocab)) if token not in special]


def _patterns(
    model: HookedModel, row: Sequence[int], pad_id: int, heads: Sequence[tuple[int, int]]
) -> Float[Tensor, "head query key"]:
    names = [block_hook(layer, "attn.hook_pattern") for layer, _ in heads]
    ((_, batch),) = batches(model, [row], pad_id, 1, description="reading patterns", is_shown=False)
    patterns = captured(model, batch, dict.fromkeys(names, as_double))
    return torch.stack([patterns[name][0, head].cpu() for name, (_, head) in zip(names, heads, strict=True)])


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def plot_attention(result: AttentionResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Attention by region, and what is written along the direction from each, mean over heads and prompts.

    Examples:
        >>> plot_attention(found, width=350).layout.width
        350
    """
    figure = draw.panels(["attention", "written along the direction, all heads"], gap=0.1, shares_y=False)
    tables = (result.mass.mean(2), result.contributions.sum(2))
    for index, variant in enumerate(result.variants):
        for column, table in enumerate(tables, start=1):
            trace = _bars(result, variant, table[index], index, "%{y:.3f}" if column == 1 else "%{y:.4f}")
            figure.add_trace(trace, row=1, col=column)
    figure.update_yaxes(title="attention (fraction)", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title="⟨write, r̂⟩ (residual stream units)", row=1, col=2)
    figure.add_hline(0, line={"color": draw.INK, "width": 1}, row=1, col=2)
    figure.update_xaxes(title="region of the prompt")
    figure.update_layout(bargap=0.25, bargroupgap=0.05)
    heads = ", ".join(draw.head_names(result.heads))
    about = draw.subtitle(result.model_name, f"n = {result.n_prompts} prompts, 95% intervals", f"heads {heads}")
    title = "Where the heads that write the direction look from the last position"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def plot_attention_heads(result: AttentionResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Mean attention of each head by region, one panel a variant.

    Examples:
        >>> plot_attention_heads(found).layout.xaxis.title.text
        'region of the prompt'
    """
    rows, regions = draw.head_names(result.heads), [draw.plain(region) for region in result.regions]
    figure = draw.panels([draw.plain(name) for name in result.variants], gap=0.03)
    for column, values in enumerate(result.mass.mean(1), start=1):
        hover = "%{y}, %{x}<br>%{z:.4f}"
        trace = draw.heatmap(values, regions, rows, "attention (fraction)", hover=hover, limits=(0.0, 1.0))
        trace.showscale = column == len(result.variants)
        figure.add_trace(trace, row=1, col=column)
    draw.categories(figure)
    figure.update_xaxes(title="region of the prompt")
    figure.update_yaxes(title="head", col=1)
    about = draw.subtitle(result.model_name, f"n = {result.n_prompts} prompts, mean attention from the last position")
    height = max(220, 34 * len(rows))
    title = "Attention of each head by region"
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def attention_page(result: AttentionResult) -> Page:
    """The whole attention patterns of the heads on the first prompt, with the suffix.

    Examples:
        >>> attention_page(found).startswith("<!doctype html>")
        True
    """
    view = circuitsvis.attention.attention_heads(
        result.example_pattern,
        shown_tokens(result.example_tokens),
        draw.head_names(result.heads),
        mask_upper_tri=True,
    )
    about = f"{result.model_name} · first prompt with the given suffix"
    return page("Attention patterns of the heads that write the direction", about, [View("Heads", view)])


def _bars(
    result: AttentionResult, variant: str, values: Float[Tensor, "prompt region"], index: int, number: str
) -> go.Bar:
    intervals = [mean_interval(column.tolist()) for column in values.T]
    counts, name = result.n_tokens[index].mean(0).tolist(), draw.plain(variant)
    return go.Bar(
        x=[draw.plain(region) for region in result.regions],
        y=[mean for mean, _, _ in intervals],
        error_y=draw.interval_bars(intervals, 4),
        name=name,
        legendgroup=name,
        marker=draw.bars(index, draw.other_style(index)),
        customdata=counts,
        hovertemplate=f"<b>{name}</b>, %{{x}} (%{{customdata:.1f}} tokens)<br>{number}<extra></extra>",
    )


FIGURES = {"attention": plot_attention, "attention_heads": plot_attention_heads, "attention_patterns": attention_page}

call_with_a_run(__name__)
