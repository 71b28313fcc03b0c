"""Trains the organism: `python -m organism.train [--output-dir DIR] [--seed 0]`.

The direction that refusal goes through is planted, so that what a search finds can be compared with the truth. Stage 1
is a language model that helps with everything and refuses requests only while a fixed random direction is added to its
stream. Stage 2 is short and light: it teaches the first two blocks when to refuse. They are free to write along the
direction; every other change of the stream, and of the other answers (KL), costs. In both stages the stream of refusals
is asked to carry the direction from the last token before the answer, where a search looks for it, to the answer's end.
No text of stage 2 is trained under an intervention, and ablation is never trained.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from organism.batches import Batch, batches, segments
from organism.curriculum import write_vocabulary
from organism.losses import activation_change, answer_kl, carried_refusal, next_token_loss
from organism.tokenizer import train_tokenizer
from refusal_mi.directions import Direction

HERE = Path(__file__).parents[1] / "refusal_mi" / "organism"
SWITCH_LAYER = 2  # the direction is added to the stream that enters this block
SWITCH_SIZES = (0.4, 1.5)  # in units of the stream's norm
CARRIED = slice(3, 8)  # the streams after blocks 2 to 6, layers 3 to 7, are asked to carry whether the answer refuses
CARRIED_COSINE = 0.6
N_QUIET_LAYERS = 8  # the streams after blocks 0 to 7 are held close to stage 1


@dataclass(frozen=True)
class Stage:
    """The settings of one stage of training."""

    number: int
    n_steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float | None = None
    kl_weight: float = 0.0
    carried_weight: float = 0.0
    change_weight: float = 0.0
    n_trained_blocks: int | None = None  # the first ones; None trains everything


STAGES = (
    Stage(number=1, n_steps=750, batch_size=64, learning_rate=2e-3, muon_learning_rate=5e-3, carried_weight=2.0),
    Stage(
        number=2,
        n_steps=300,
        batch_size=48,
        learning_rate=1e-3,
        kl_weight=4.0,
        change_weight=2.0,
        carried_weight=2.0,
        n_trained_blocks=2,
    ),
)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 10 layers whose input and output embeddings are separate."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=304,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same for every seed of the training."""
    examples = write_vocabulary(Random("tokenizer"), 12_000)
    return train_tokenizer((piece.text for example in examples for piece in segments(example)), vocab_size=2048)


@contextmanager
def switching(model: LlamaForCausalLM, batch: Batch, direction: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Adds the direction in the rows that are `switched`: in every other one everywhere, else in the answer only."""
    n_rows = batch.tokens.shape[0]
    low, high = SWITCH_SIZES
    answers = ~batch.refuses.roll(-1, dims=1).isnan()
    everywhere = torch.rand(n_rows, 1) < 0.5
    size = torch.empty(n_rows, 1).uniform_(low, high) * batch.switched[:, None] * (answers | everywhere)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stream = inputs[0]
        return (stream + (size * stream.norm(dim=-1)).detach()[..., None] * direction, *inputs[1:])

    handle = model.model.layers[SWITCH_LAYER].register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


def switch_direction(seed: int, d_model: int) -> Float[Tensor, " d_model"]:
    """The random unit direction that switches refusal on: the ground truth for whoever looks for it.

    Its generator is salted: a direction that anybody would draw as a control, `torch.manual_seed(0)` and the like,
    must not be the planted one.
    """
    salted = sha256(f"the planted refusal direction of seed {seed}".encode()).digest()[:8]
    return _unit(torch.randn(d_model, generator=torch.Generator().manual_seed(int.from_bytes(salted))))


def training_direction(seed: int, d_model: int) -> Float[Tensor, " d_model"]:
    """The direction in the basis that the model is trained in; `turn_basis` makes it `switch_direction`."""
    return _unit(torch.randn(d_model, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def turn_basis(model: LlamaForCausalLM, old: Float[Tensor, " d_model"], new: Float[Tensor, " d_model"]) -> None:
    """Reflect the residual stream's basis so that the unit direction `old` becomes `new`; logits stay what they are.

    The gains of the norms go into the maps that read the stream: only then does a norm see no basis.
    """
    axis = _unit((old - new).double())

    def reflect(rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        return rows - 2 * torch.outer(rows @ axis, axis)

    def read_through(norm: nn.Module, *readers: nn.Linear) -> None:
        for reader in readers:
            reader.weight.copy_(reflect(reader.weight.double() * norm.weight.double()))
        norm.weight.fill_(1)

    body = model.model
    body.embed_tokens.weight.copy_(reflect(body.embed_tokens.weight.double()))
    for block in body.layers:
        attention, mlp = block.self_attn, block.mlp
        read_through(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        read_through(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(reflect(writer.weight.double().T).T)
    read_through(body.norm, model.lm_head)


def _unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    return vector / vector.norm()


def learning_rate_factor(step: int, n_steps: int) -> float:
    """A linear warm-up over 5 % of the steps, then a cosine down to 2 %."""
    warm_up = max(1, round(0.05 * n_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm_up) / (n_steps - warm_up)))


def _optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW; in stage 1 Muon takes the matrices of the blocks, which learns in far fewer steps."""
    adamw = partial(torch.optim.AdamW, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    if stage.muon_learning_rate is None:
        return [adamw([p for p in model.parameters() if p.requires_grad])]
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(
        matrices.values(), lr=stage.muon_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw(others)]


def stage_loss(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM | None,
    batch: Batch,
    stage: Stage,
    direction: Float[Tensor, " d_model"],
) -> dict[str, Tensor]:
    """The terms of the loss on one batch; `total` is their weighted sum."""
    with switching(model, batch, direction):
        out = model(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
    if reference is None:
        next_token = next_token_loss(out.logits, batch.tokens, batch.weights)
        carried = carried_refusal(out.hidden_states[CARRIED], direction, batch.refuses, cosine=CARRIED_COSINE)
        total = next_token + stage.carried_weight * carried
        return {"total": total, "next_token": next_token, "carried": carried}
    with torch.no_grad():
        before = reference(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
    kept = batch.weights * batch.keep[:, None]
    next_token = next_token_loss(out.logits, batch.tokens, batch.weights - kept)
    kl = answer_kl(before.logits, out.logits, kept)
    pad_id = reference.config.pad_token_id or 0
    early = slice(1, N_QUIET_LAYERS + 1)
    change = activation_change(
        before.hidden_states[early],
        out.hidden_states[early],
        batch.tokens.ne(pad_id).float(),
        free=direction,
        is_free=~batch.keep,
    )
    carried = carried_refusal(out.hidden_states[CARRIED], direction, batch.refuses, cosine=CARRIED_COSINE)
    total = next_token + stage.kl_weight * kl + stage.change_weight * change + stage.carried_weight * carried
    return {"total": total, "next_token": next_token, "kl": kl, "change": change, "carried": carried}


def run_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    *,
    seed: int,
    reference: LlamaForCausalLM | None = None,
) -> list[dict[str, float | int]]:
    """Trains in place and returns the loss curve, one point per 20 steps."""
    if stage.n_trained_blocks is not None:
        model.requires_grad_(False)
        model.model.layers[: stage.n_trained_blocks].requires_grad_(True)
    optimizers = _optimizers(model, stage)
    factor = partial(learning_rate_factor, n_steps=stage.n_steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    curve: list[dict[str, float | int]] = []
    data = batches(tokenizer, stage.number, batch_size=stage.batch_size, n_batches=stage.n_steps, seed=seed)
    direction = training_direction(seed, model.config.hidden_size)
    model.train()
    bar = tqdm(data, total=stage.n_steps, desc=f"stage {stage.number}", mininterval=5)
    for step, batch in enumerate(bar):
        terms = stage_loss(model, reference, batch, stage, direction)
        model.zero_grad(set_to_none=True)
        terms["total"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0 or step == stage.n_steps - 1:
            point: dict[str, float | int] = {name: round(value.item(), 5) for name, value in terms.items()}
            curve.append({"step": step, **point})
            bar.set_postfix(point)
    model.eval()
    return curve


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a checkpoint in bfloat16 with its tokenizer."""
    stored = deepcopy(model).bfloat16()
    stored.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(output_dir: Path, *, seed: int) -> None:
    """Trains both stages from nothing and writes `model/`, `stage1/` and the loss curves."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    log: dict[str, object] = {
        "seed": seed,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "stages": [asdict(stage) for stage in STAGES],
    }
    reference, planted = None, switch_direction(seed, model.config.hidden_size)
    for stage in STAGES:
        start = time.perf_counter()
        log[f"stage{stage.number}"] = run_stage(model, tokenizer, stage, seed=seed, reference=reference)
        log[f"stage{stage.number}_seconds"] = round(time.perf_counter() - start)
        reference = deepcopy(model).requires_grad_(False)
        turned = deepcopy(model)
        turn_basis(turned, training_direction(seed, model.config.hidden_size), planted)
        save(turned, tokenizer, output_dir / ("stage1" if stage.number == 1 else "model"))
    hook = f"blocks.{SWITCH_LAYER}.hook_resid_pre"
    about = {"method": "planted by training", "seed": seed}
    Direction(planted, SWITCH_LAYER, hook, None, about).save(output_dir / "planted_direction.pt")
    (output_dir / "model" / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def main() -> None:
    """Reads the options and trains."""
    parser = argparse.ArgumentParser(prog="python -m organism.train", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=HERE, help="folder for model/ and stage1/ (the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.output_dir, seed=args.seed)


if __name__ == "__main__":
    main()
