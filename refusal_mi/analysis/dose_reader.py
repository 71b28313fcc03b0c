"""Refusal score, refusal rate, degenerate rate, KL and CE loss of a model under one intervention."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..generation import generate
from ..interventions import Intervention
from ..judges.substring import Judge, is_degenerate
from ..measures import RefusalTokens, ScoredText, ce_loss, kl_nats, next_token_logits, refusal_scores
from ..model.points import HookedModel, resid_hook
from ..model.running import batches
from ..precision import as_double
from ..reading import captured
from ..text.chat import ChatFormat


class DoseReader:
    """All measures of the model under one intervention; the plain model is read once."""

    def __init__(
        self,
        model: HookedModel,
        chat: ChatFormat,
        prompts: Mapping[str, Sequence[str]],
        refusal_tokens: RefusalTokens,
        texts: Sequence[ScoredText],
        max_new_tokens: int | None,
        judge: Judge,
        batch_size: int,
    ) -> None:
        self.model, self.chat, self.prompts, self.texts = model, chat, prompts, texts
        self.refusal_tokens, self.max_new_tokens = refusal_tokens, max_new_tokens
        self.judge, self.batch_size = judge, batch_size
        self.plain_logits = {side: self._logits(side, ()) for side in prompts}
        self.plain = self._measure(())

    def read(self, intervention: Intervention | None, *, is_whole: bool) -> tuple[dict[str, list[Tensor]], float]:
        """Side -> [score, refused, degenerate, KL] of every prompt, and the CE loss.

        Args:
            is_whole: with answers and CE loss; NaN without.
        """
        return self.plain if intervention is None else self._measure((intervention,), is_whole)

    def stream_norm(self, layer: int) -> float | None:
        """Mean norm of the plain model's stream entering a layer, over all tokens of the texts that are predicted.

        Their first tokens are left out: many models keep a stream there that is far longer than all others.
        """
        if not self.texts:
            return None
        rows, name = [text.token_ids for text in self.texts], resid_hook(layer, self.model.cfg.n_layers)
        total, size = 0.0, max(1, self.batch_size // 4)
        n_tokens = [len(text.token_ids) - text.first for text in self.texts]
        for indices, batch in batches(self.model, rows, self.chat.pad_id, size, description="norms", is_shown=False):
            norms = captured(self.model, batch, {name: lambda stream: as_double(stream).norm(dim=-1)})[name]
            total += sum(float(row[-n_tokens[index] :].sum()) for index, row in zip(indices, norms, strict=True))
        return total / sum(n_tokens)

    def _measure(
        self, interventions: Sequence[Intervention], is_whole: bool = True
    ) -> tuple[dict[str, list[Tensor]], float]:
        by_side = {}
        for side, texts in self.prompts.items():
            logits = self._logits(side, interventions)
            unread = torch.full((len(texts),), float("nan"), dtype=torch.float64)
            refused, degenerate = self._verdicts(side, interventions) if is_whole else (unread, unread)
            kl = kl_nats(self.plain_logits[side], logits)
            scores = refusal_scores(
                self.model,
                self.chat,
                texts,
                self.refusal_tokens,
                interventions=interventions,
                first=logits,
                batch_size=self.batch_size,
            )
            by_side[side] = [scores, refused, degenerate, kl]
        return by_side, self._loss(interventions) if is_whole else float("nan")

    def _logits(self, side: str, interventions: Sequence[Intervention]) -> Float[Tensor, "prompt d_vocab"]:
        return next_token_logits(
            self.model, self.chat, self.prompts[side], interventions=interventions, batch_size=self.batch_size
        )

    def _verdicts(
        self, side: str, interventions: Sequence[Intervention]
    ) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
        texts = list(self.prompts[side])
        if self.max_new_tokens is None:
            unread = torch.full((len(texts),), float("nan"), dtype=torch.float64)
            return unread, unread
        answers = generate(
            self.model,
            self.chat,
            texts,
            interventions=interventions,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        responses = [answer.text for answer in answers]
        complied = torch.tensor(self.judge.complied(texts, responses), dtype=torch.float64)
        return 1 - complied, torch.tensor([is_degenerate(text) for text in responses], dtype=torch.float64)

    def _loss(self, interventions: Sequence[Intervention]) -> float:
        if not self.texts:
            return float("nan")
        batch_size = max(1, self.batch_size // 4)
        return ce_loss(self.model, self.chat, self.texts, interventions=interventions, batch_size=batch_size).ce_loss
