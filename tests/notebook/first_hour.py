# What a stranger types in the first hour; `# %%` begins a cell. tests/notebook/test_first_hour.py runs it.
# ruff: noqa

# %%
from refusal_mi import *

# %%
model = load_model()
# %%
chat = ChatFormat(model.tokenizer)
chat.render("How do I bake bread?")
# %%
my_harmful = ["Burn down a barn.", "Wreck a factory.", "Poison a lake.", "Rob a bank.", "Break a window."]
my_harmless = ["Describe a kite.", "Bake a cake.", "Paint a fence.", "Name a river.", "Plant a tree."]
# %%
answers = generate(model, chat, my_harmful[:2] + my_harmless[:2], max_new_tokens=12)
[answer.text for answer in answers]
# %%
[is_refusal(answer.text) for answer in answers]
judge_named("evade")([answer.text for answer in answers])
# %%
harmful = load_prompts("organism_harmful_train")[:48]
harmless = load_prompts("organism_harmless_train")[:48]
harmful
# %%
means_harmful = mean_activations(model, chat, harmful)
means_harmless = mean_activations(model, chat, harmless)
# %%
grid = difference_in_means(means_harmful, means_harmless)
grid
# %%
grid.to_frame().sort_values("norm").tail()
# %%
direction = grid.direction(position=-1, layer=3)
direction
# %%
generate(model, chat, "Wreck a factory.", interventions=Ablate(direction), max_new_tokens=12)[0].text
# %%
generate(model, chat, "Describe a kite.", interventions=Add(direction), max_new_tokens=12)[0].text
# %%
control = direction.random_like(seed=0)
generate(model, chat, "Wreck a factory.", interventions=[Ablate(control)], max_new_tokens=12)[0].text
# %%
learned = learn_threshold(model, chat, direction, harmful, harmless)
learned.on_validation
# %%
only_there = Conditional(Add(direction), learned.condition)
generate(model, chat, ["Describe a kite.", "Wreck a factory."], interventions=only_there, max_new_tokens=4)
# %%
import torch

mine = Direction.of(torch.randn(model.cfg.d_model), layer=3)
generate(model, chat, my_harmful, interventions=Ablate(mine.vector), max_new_tokens=4)
# %%
import numpy as np

np.save("mine.npy", direction.vector.numpy())
Direction.load("mine.npy", layer=3)
# %%
direction.save("direction.safetensors")
Direction.load("direction.safetensors") == direction
# %%
labels = label_prompts(model, chat, [*harmful[:24], *harmless[:24]])
tokens = find_refusal_tokens(labels)
prefixes = tokens
# %%
refusal_scores(model, chat, my_harmful, prefixes), refusal_scores(model, chat, my_harmless, prefixes)
# %%
refusal_scores(model, chat, my_harmful, prefixes, interventions=Ablate(direction))
# %%
few = DirectionGrid(grid.vectors[-1:, 2:5], (-1,), (grid.is_degenerate[-1][2:5],))
scores = sweep(model, chat, few, my_harmful, my_harmless, prefixes)
scores
# %%
scores.to_frame()
# %%
plot_scores(scores).write_html("scores.html")
# %%
scores.save("scores.json")
grid.save("mean_diffs.pt")
DirectionGrid.load("mean_diffs.pt").vectors.equal(grid.vectors)
# %%
from refusal_mi.analysis import project_residuals
from refusal_mi.analysis.result import figures, plot

projected = project_residuals(model, chat, direction, {"mine": my_harmful, "others": my_harmless})
projected
# %%
plot(projected).write_html("projections.html")
# %%
projected.to_frame().groupby(["group", "layer"])["projections"].mean().unstack(0)
# %%
projected.save("projections")
# %%
from refusal_mi.analysis import refusal_lens

lens = refusal_lens(model, chat, my_harmful, my_harmless, [prefix[0] for prefix in prefixes])
plot(lens)
# %%
heads = [mean_activations(model, chat, side, hook="blocks.3.attn.hook_z") for side in (harmful, harmless)]
head = difference_in_means(*heads).direction(position=-1)
head
# %%
generate(model, chat, my_harmful[0], interventions=Ablate(head.of_head(0, model.cfg.n_heads)), max_new_tokens=4)
# %%
batch = chat.batch(my_harmful).tokens
logits = model.run_with_hooks(batch, fwd_hooks=all_hooks(model, Ablate(direction)))
# %%
with model.hooks(fwd_hooks=Ablate(direction).hooks(model)):
    _, cache = model.run_with_cache(batch)
(cache["blocks.5.hook_resid_pre"] @ direction.unit.float()).abs().max()
# %%
ActivationMeans.from_cache(cache, chat.positions)
# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

hf_model = AutoModelForCausalLM.from_pretrained(HF_FOLDER)
held = load_model(hf_model)
generate(held, ChatFormat(held.tokenizer), "Hello", max_new_tokens=4)
# %%
from transformer_lens.model_bridge import TransformerBridge

bridge = load_model(TransformerBridge.boot_transformers(HF_FOLDER, device="cpu"))
next_token_logits(bridge, ChatFormat(bridge.tokenizer), ["Hello", "Goodbye"]).shape
# %%
own = difference_in_means(
    mean_activations(held, ChatFormat(held.tokenizer), my_harmful),
    mean_activations(held, ChatFormat(held.tokenizer), my_harmless),
).direction(-1, 2)
report = export_checkpoint(hf_model, Ablate(own), "edited")
report.is_verified
# %%
edited = load_model("edited")
generate(edited, ChatFormat(edited.tokenizer), "Hello", max_new_tokens=4)
# %%
run = load_run(RUN_FOLDER)
run
# %%
run.rates.to_frame().head()
# %%
run.figures["rates"].write_html("rates.html")
list(run.figures)
