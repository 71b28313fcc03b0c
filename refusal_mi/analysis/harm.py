"""Two judgements apart: whether the model finds an instruction harmful, and whether it is about to refuse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..errors import UserError
from ..interventions import Ablate, Intervention
from ..models import HookedModel
from ..reading import template_residuals
from ..scores import next_token_logits, refusal_score
from .inputs import RunInputs
from .result import AnalysisResult, provenance_of


@dataclass(frozen=True)
class HarmResult(AnalysisResult):
    """Belief scores of every prompt for harm (last instruction token) and refusal (last template token)."""

    kind: ClassVar[str] = "harm"
    units: ClassVar[Mapping[str, str]] = {
        "deltas": "mean difference of cosines over layers (−2..2)",
        "scores": "refusal score, log-odds (nats)",
        "cosines": "cosine",
        "harm_vectors": "residual stream units",
        "refusal_vectors": "residual stream units",
    }

    groups: tuple[str, ...]
    deltas: dict[str, Tensor]
    """Group -> `[prompt 2]`: Δharm, Δrefuse, float64; positive is harmful, refusing."""
    scores: dict[str, Tensor]
    """Group -> `[prompt]`: first-token refusal score, float64."""
    layers: tuple[int, ...]
    """The layers that are averaged over: 1..n_layers (at layer 0 all prompts have the same last token)."""
    cosines: Float[Tensor, " layer"]
    """Cosine of the harmfulness direction with the refusal direction, float64."""
    harm_vectors: Float[Tensor, "layer d_model"]
    """Mean over harmful minus mean over harmless prompts at the last instruction token, float64."""
    refusal_vectors: Float[Tensor, "layer d_model"]
    """Mean over refused minus mean over answered prompts at the last template token, float64."""
    n_refused: int
    """Prompts of the training sets that were refused, by the sign of their refusal score (or as given)."""
    n_answered: int

    def __post_init__(self) -> None:
        if self.cosines.shape != (len(self.layers),) or set(self.deltas) != set(self.groups):
            raise ValueError("harm and refusal need one cosine a layer and scores for every group")

    def quadrants(self, group: str) -> dict[str, int]:
        """How many prompts of a group are judged harmful or not, and refused or answered."""
        harmful, refused = (self.deltas[group] > 0).T
        return {
            f"{harm_word}, {refuse_word}": int(((harmful == is_harmful) & (refused == is_refused)).sum())
            for is_harmful, harm_word in ((True, "harmful"), (False, "harmless"))
            for is_refused, refuse_word in ((True, "refused"), (False, "answered"))
        }


def separate_harm(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    refusal_tokens: Sequence[int],
    *,
    refused: Sequence[bool] | None = None,
    interventions: Mapping[str, Sequence[Intervention]] | None = None,
    batch_size: int = 32,
) -> HarmResult:
    """Δ = mean over layers of cos(h, mean of A) − cos(h, mean of B), for harm and for refusal.

    For Δharm, h is the stream at the last instruction token and A, B are `harmful` and `harmless`; for Δrefuse, h is
    the stream at the last template token and A, B are those of the same prompts that the model refuses and answers
    (Zhao et al. 2025, "LLMs encode harmfulness and refusal separately").

    Args:
        harmful: training prompts; share none with `groups`.
        groups: name -> instructions to place on the map.
        refused: of every prompt of `harmful`, then `harmless`; by default the sign of its refusal score.
        interventions: name of a group -> what is done to the model while it is read.

    Raises:
        UserError: a set is empty, or the model refuses all training prompts, or none.
    """
    training = [*harmful, *harmless]
    if refused is None:
        refused = (_scores(model, chat, training, refusal_tokens, (), batch_size) > 0).tolist()
    flags = torch.tensor(list(refused))
    if len(flags) != len(training) or bool(flags.all()) or not bool(flags.any()):
        raise UserError(
            f"of {len(training)} training prompts {int(flags.sum())} count as refused, and both kinds are needed; "
            "add prompts of the other kind, or say with refused=[...] which ones were refused"
        )
    inside, last = _streams(model, chat, training, (), batch_size)
    harm_means = _two_means(inside, torch.arange(len(training)) < len(harmful))
    refuse_means = _two_means(last, flags)
    deltas, scores = {}, {}
    for name, instructions in groups.items():
        hooks = (interventions or {}).get(name, ())
        streams = _streams(model, chat, instructions, hooks, batch_size)
        both = [_delta(x, means) for x, means in zip(streams, (harm_means, refuse_means), strict=True)]
        deltas[name] = torch.stack(both, dim=1)
        scores[name] = _scores(model, chat, instructions, refusal_tokens, hooks, batch_size)
    harm_vectors, refusal_vectors = harm_means[0] - harm_means[1], refuse_means[0] - refuse_means[1]
    return HarmResult(
        tuple(groups),
        deltas,
        scores,
        tuple(range(1, model.cfg.n_layers + 1)),
        torch.cosine_similarity(harm_vectors, refusal_vectors, dim=-1),
        harm_vectors,
        refusal_vectors,
        int(flags.sum()),
        int((~flags).sum()),
        provenance=provenance_of(
            model, chat, {"harmful (training)": harmful, "harmless (training)": harmless, **groups}
        ),
    )


def from_run(run: RunInputs) -> HarmResult:
    """Held-out prompts on the map, the harmful ones also with the chosen direction ablated."""
    harmful, harmless = run.prompts("harmful", "test"), run.prompts("harmless", "test")
    groups = {"harmful": harmful, "harmless": harmless, "harmful, ablated": harmful}
    return separate_harm(
        run.model,
        run.chat,
        run.prompts("harmful", "train"),
        run.prompts("harmless", "train"),
        groups,
        run.refusal_tokens,
        interventions={"harmful, ablated": (Ablate(run.direction),)},
        batch_size=run.batch_size,
    )


def _scores(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    refusal_tokens: Sequence[int],
    interventions: Sequence[Intervention],
    batch_size: int,
) -> Float[Tensor, " prompt"]:
    logits = next_token_logits(model, chat, instructions, interventions=interventions, batch_size=batch_size)
    return refusal_score(logits, refusal_tokens)


def _streams(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    interventions: Sequence[Intervention],
    batch_size: int,
) -> tuple[Float[Tensor, "prompt layer d_model"], Float[Tensor, "prompt layer d_model"]]:
    """The stream at the last instruction token and at the last template token, float64."""
    table = template_residuals(
        model,
        chat,
        instructions,
        layers=range(1, model.cfg.n_layers + 1),
        n_last=len(chat.positions) + 1,
        interventions=interventions,
        batch_size=batch_size,
    )
    return table[:, 0].double(), table[:, -1].double()


def _two_means(
    x: Float[Tensor, "prompt layer d_model"], is_first: Tensor
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    return x[is_first].mean(0), x[~is_first].mean(0)


def _delta(
    x: Float[Tensor, "prompt layer d_model"],
    means: tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]],
) -> Float[Tensor, " prompt"]:
    a, b = (torch.cosine_similarity(x, mean, dim=-1) for mean in means)
    return (a - b).mean(-1)
