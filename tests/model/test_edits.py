"""Edits of a loaded model's weights and attributes act in the package as on the bridge."""

import pytest
import torch

from refusal_mi.interventions import Ablate, all_hooks
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.model.running import last_logits
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS
from tests.helpers.passes import bridge, logits
from tests.helpers.tiers import first_is_fast


def attributes(name, change):
    """Change a plain attribute of every module of the HF model that has it."""

    def edit(model):
        for each in model.original_model.modules():
            if name in vars(each) and not isinstance(vars(each)[name], torch.nn.Module):
                setattr(each, name, change(getattr(each, name)))

    return edit


def named(suffix, change):
    """Change every weight of a block whose HF name ends so."""

    def edit(model):
        for name, weight in model.original_model.named_parameters():
            if name.endswith(suffix):
                weight.data.copy_(change(weight.data))

    return edit


def through_the_bridge(path):
    def edit(model):
        target = model.blocks[2]
        for part in path.split("."):
            target = getattr(target, part)
        with torch.no_grad():
            target.weight.mul_(1.5)

    return edit


def replaced(model):
    block = model.blocks[2].original_component
    owner = next(each for each in block.modules() if isinstance(each, torch.nn.Linear) or hasattr(each, "nf"))
    owner.weight = torch.nn.Parameter(owner.weight.detach() * 1.5)


def other_activation(model):
    for block in model.blocks:
        for each in block.original_component.modules():
            for name in ("act_fn", "act", "activation_fn"):
                if isinstance(getattr(each, name, None), torch.nn.Module) and name in each._modules:
                    each._modules[name] = torch.nn.Tanh()


EDITS = {
    "attention temperature": attributes("scaling", lambda value: value * 3),
    "epsilon of RMS norms": attributes("variance_epsilon", lambda value: 1.0),
    "epsilon of layer norms": attributes("eps", lambda value: 1.0),
    "activation": other_activation,
    "HF weight": named(".weight", lambda value: value * 1.1),
    "bridge weight, mlp": through_the_bridge("mlp.out"),
    "bridge weight, attention": through_the_bridge("attn.q"),
    "replaced weight": replaced,
    "dtype": lambda model: model.to(torch.float64),
    "dtype there and back, then a bridge weight": lambda model: (
        model.to(torch.bfloat16),
        model.to(torch.float32),
        through_the_bridge("attn.q")(model),
    ),
}
UNMOVED = {
    # edits that a family's bridge does not see, or does not have: the package does what the bridge does
    "gpt2": {"attention temperature", "epsilon of RMS norms", "epsilon of layer norms"},
    "gpt_neox": {"attention temperature", "epsilon of RMS norms"},
    "falcon": {"attention temperature", "epsilon of RMS norms", "epsilon of layer norms"},
    "phi3": {"attention temperature", "activation", "epsilon of layer norms"},
    "llama": {"epsilon of layer norms"},
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", first_is_fast(UNMOVED))
def test_edits_of_weights_and_attributes_move_the_packages_numbers_as_the_bridges(family, edit, tiny_dir):
    model = load_model(tiny_dir(family), device="cpu")
    chat = ChatFormat(model.tokenizer)
    before = next_token_logits(model, chat, ASKS[:1])
    EDITS[edit](model)
    with torch.no_grad(), model.hooks(fwd_hooks=[]):
        expected = last_logits(model, chat.batch(ASKS[:1]))
    found = next_token_logits(model, chat, ASKS[:1])
    assert torch.equal(found, expected)
    moved = (found - before).abs().max()
    assert edit == "dtype" or (moved > 1e-3) == (edit not in UNMOVED[family])
    ablated = all_hooks(model, [Ablate(random_direction(0))])
    batch = chat.batch(ASKS[:1])
    assert torch.equal(logits(model, batch, ablated), bridge(model, batch, ablated))
