"""One prompt, every token, every layer: where along the text the direction appears."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Unpack

import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..figures import style as draw
from ..model.points import HookedModel
from ..precision import as_double
from ..reading import stream_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompt
from .result import AnalysisResult, call_with_a_run, provenance_of


@dataclass(frozen=True, eq=False, repr=False)
class TokenMapResult(AnalysisResult):
    """Projection and cosine of one prompt's stream, on the direction and on a random one.

    Examples:
        >>> found.cosines.shape == (len(found.tokens), model.cfg.n_layers + 1)
        True
        >>> found.n_template
        5
    """

    kind: ClassVar[str] = "token_map"
    units: ClassVar[Mapping[str, str]] = {
        "projections": "residual stream units",
        "cosines": "cosine, -1 to 1",
        "control_cosines": "cosine with a random vector, -1 to 1",
    }

    projections: Float[Tensor, "pos layer"]
    """float64; layers 0..n_layers."""
    cosines: Float[Tensor, "pos layer"]
    control_cosines: Float[Tensor, "pos layer"]
    tokens: tuple[str, ...]
    """Vocabulary entries, in the order of the text."""
    prompt: str
    n_template: int
    """How many of the last tokens belong to the template."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.projections):
            raise ValueError(f"{len(self.tokens)} tokens for {len(self.projections)} positions")


def map_tokens(
    model: HookedModel, chat: ChatFormat, direction: Direction, prompt: Prompts, *, seed: int = 0
) -> TokenMapResult:
    """⟨x, r̂⟩ and its cosine at every token of one templated prompt and every layer.

    Examples:
        >>> figure = plot_token_map(map_tokens(model, chat, direction, "Hi"))
    """
    check_in_stream(direction)
    prompt = as_prompt(prompt)
    ids = chat.encode(prompt)
    ((_, streams),) = stream_residuals(model, chat, [prompt], n_last=len(ids))
    x = as_double(streams[0]).cpu()
    units = torch.stack([direction.unit, direction.random_like(seed).unit])
    along = einsum(x, units, "pos layer d_model, unit d_model -> unit pos layer")
    cosines = along / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    return TokenMapResult(
        along[0],
        cosines[0],
        cosines[1],
        tuple(chat.tokenizer.convert_ids_to_tokens(ids)),
        prompt,
        len(chat.positions),
        provenance=provenance_of(model, chat, {"prompt": [prompt]}, {"seed": seed, "direction": direction.describe()}),
    )


def from_run(run: RunInputs) -> TokenMapResult:
    """The first held-out harmful prompt of a run."""
    return map_tokens(run.model, run.chat, run.direction, run.prompts("harmful")[0], seed=run.seed)


def plot_token_map(result: TokenMapResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Cosine of the stream with the direction at every token and layer; hover has the projection and the control.

    Examples:
        >>> plot_token_map(found).layout.yaxis.title.text
        'layer (stream entering the block)'
    """
    n_tokens, n_layers = result.cosines.shape
    labels = [f"{index} {draw.plain(draw.token_text(token))}" for index, token in enumerate(result.tokens)]
    custom = rearrange([result.projections, result.control_cosines], "shown pos layer -> layer pos shown").tolist()
    hover = (
        "token %{x}<br>layer %{y}<br>cosine %{z:.4f}<br>projection %{customdata[0]:.4g}"
        "<br>random direction: cosine %{customdata[1]:.4f}"
    )
    figure = go.Figure(
        draw.heatmap(
            result.cosines.T,
            labels,
            [str(layer) for layer in range(n_layers)],
            "cos(x, r̂)",
            hover=hover,
            custom=custom,
            limits=draw.symmetric(result.cosines),
        )
    )
    figure.add_vline(n_tokens - result.n_template - 0.5, line={"color": "#1a1a1a", "width": 2, "dash": "dash"})
    figure.update_xaxes(title="token (right of the dashed line: the template after the instruction)", type="category")
    figure.update_xaxes(tickangle=-90)
    figure.update_yaxes(title="layer (stream entering the block)", type="category", autorange="reversed")
    about = draw.subtitle(result.model_name, "1 prompt") + f": “{draw.shortened(result.prompt)}”"
    title = "The direction along one prompt"
    return draw.finish(figure, title=title, about=about, height=max(260, 30 * n_layers), look=look)


FIGURES = {"token_map": plot_token_map}

call_with_a_run(__name__)
