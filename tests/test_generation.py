"""Completions: equal with and without cache, batched and alone, hooked by nothing and unhooked."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from refusal_mi import generation
from refusal_mi.errors import UserError
from refusal_mi.generation import Generated, Sampling, discover_response_prefix, generate, stream
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.model.points import write_hooks
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import N_LAYERS, tiny_tokenizer
from tests.helpers.naive import ASKS, ablating, prompt_ids
from tests.helpers.tiers import first_is_fast

N_NEW = 8


def ids(model, asks=ASKS, **options) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": N_NEW, **options}
    return [answer.token_ids for answer in generate(model, ChatFormat(model.tokenizer), asks, **options)]


@torch.no_grad()
def hf_greedy(hf, prompt: list[int]) -> tuple[int, ...]:
    """Argmax, token by token, without a cache, up to the end token."""
    row = list(prompt)
    for _ in range(N_NEW):
        token = int(hf(torch.tensor([row])).logits[0, -1].argmax())
        if token == hf.config.eos_token_id:
            break
        row.append(token)
    return tuple(row[len(prompt) :])


@pytest.mark.parametrize("family", first_is_fast(["gpt2", "llama", "gemma2", "mixtral"]))
def test_a_left_padded_batch_writes_what_plain_hf_writes_alone(family, tiny_model, plain_model):
    model, hf = tiny_model(family), plain_model(family)
    expected = [hf_greedy(hf, prompt_ids(model.tokenizer, ask)) for ask in ASKS]
    assert ids(model, batch_size=5) == expected == ids(model, batch_size=1)
    assert len(set(expected)) > 1


def test_text_under_ablation_is_that_of_plain_hf_hooks(tiny_model, plain_model):
    model, hf, direction = tiny_model("gpt2"), plain_model("gpt2"), random_direction(3)
    with ablating(hf, direction.vector):
        expected = [hf_greedy(hf, prompt_ids(model.tokenizer, ask)) for ask in ASKS]
    assert ids(model, interventions=[Ablate(direction)]) == expected
    assert ids(model) != expected


@pytest.mark.parametrize("family", first_is_fast(["gpt2", "llama"]))
@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_cached_and_uncached_generation_write_the_same(family, positions, tiny_model):
    model, direction = tiny_model(family), random_direction(1, scale=2.0)
    plain = ids(model)
    for intervention in (Add(direction, positions=positions), Ablate(direction, positions=positions)):
        cached, uncached = (ids(model, interventions=[intervention], use_kv_cache=flag) for flag in (True, False))
        assert cached == uncached
        assert ids(model, interventions=[intervention], batch_size=1) == cached
        assert cached != plain


def test_the_three_scopes_write_different_text(tiny_model):
    model, direction = tiny_model("gpt2"), random_direction(1, scale=2.0)
    texts = {
        tuple(ids(model, interventions=[Add(direction, positions=scope)])) for scope in ("all", "prompt", "response")
    }
    assert len(texts) == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_times_a_direction_writes_the_plain_text(family, tiny_model):
    model, direction = tiny_model(family), random_direction(0)
    for nothing in (Add(direction, 0.0), Ablate(direction, strength=0.0)):
        assert ids(model, interventions=[nothing]) == ids(model)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(tiny_model):
    model = tiny_model("gpt2")
    state = torch.get_rng_state()
    first = ids(model, sampling=Sampling(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert ids(model, sampling=Sampling(seed=1)) == first
    assert ids(model, sampling=Sampling(seed=2)) != first
    assert ids(model) != first
    assert ids(model, sampling=Sampling(seed=1, top_k=1)) == ids(model)


def test_the_end_token_ends_an_answer_and_what_follows_is_dropped(tiny_dir):
    model = load_model(tiny_dir("gpt2"), device="cpu")
    plain = ids(model)
    stop = plain[0][3]
    expected = [row[: row.index(stop)] if stop in row else row for row in plain]
    assert len({len(row) for row in expected}) > 1
    model.original_model.generation_config.eos_token_id = [stop]
    answers = generate(model, ChatFormat(model.tokenizer), ASKS, max_new_tokens=N_NEW)
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.is_finished for answer in answers] == [stop in row for row in plain]
    assert answers[0].text == model.tokenizer.decode(expected[0]).strip()


def test_a_multi_byte_character_that_was_cut_off_is_not_a_replacement_character(tiny_dir, monkeypatch):
    model = load_model(tiny_dir("gpt2"), device="cpu")
    chat = ChatFormat(model.tokenizer)
    whole = chat.tokenizer("né", add_special_tokens=False)["input_ids"]
    eos = chat.tokenizer.eos_token_id
    for written, text in ((whole[:-1], "n"), (whole, "né"), ([*whole[:-1], eos], "n\ufffd")):
        new = torch.tensor([written])
        monkeypatch.setattr("refusal_mi.generation.continued", lambda *_, new=new, **__: new)
        assert generate(model, chat, ASKS[:1], use_kv_cache=False)[0].text == text


def byte_fallback_tokenizer():
    """Words and single bytes, as Llama-2, Mistral and Gemma have them; other characters are written byte by byte."""
    words = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz▁!"]
    vocab = {token: index for index, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    return tokenizer


@pytest.mark.parametrize("text", ["😀é", "a 😀😀 b", "né!", "漢字 x", "ok", "😀"])
def test_byte_fallback_is_neither_doubled_nor_lost(text, tiny_model, monkeypatch):
    """However the answer is cut: every streamed text begins the next, and every whole character is there at the end."""
    model, chat = tiny_model("llama"), ChatFormat(byte_fallback_tokenizer())
    ids, eos = chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.tokenizer.eos_token_id
    assert chat.tokenizer.decode(ids) == text
    monkeypatch.setattr(generation, "stop_token_ids", lambda _: (eos,))
    ends = {0: 0}  # tokens -> characters that they make whole
    for n_characters in range(1, len(text) + 1):
        ends[len(chat.tokenizer(text[:n_characters], add_special_tokens=False)["input_ids"])] = n_characters
    for n in range(1, len(ids) + 2):
        script = iter([*ids, eos])

        def scripted(*_, script=script, **__):
            logits = torch.zeros(1, len(chat.tokenizer))
            logits[0, next(script)] = 1.0
            return logits, None

        monkeypatch.setattr(generation, "prefix_logits_and_cache", scripted)
        shown = [each.text for each in stream(model, chat, "hi", max_new_tokens=n)]
        whole = text[: max(made for end, made in ends.items() if end <= n)].strip()
        assert shown[-1] == whole
        assert all(after.startswith(before) for before, after in itertools.pairwise(shown)), shown


def test_hooks_are_gone_after_an_exception(tiny_model, monkeypatch):
    model, direction = tiny_model("llama"), random_direction(0)
    plain = ids(model)

    def n_hooks():
        return sum(len(point.fwd_hooks) for point in set(model.hook_dict.values()))

    def broken(*arguments, **options):
        assert n_hooks() == len(write_hooks(N_LAYERS))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("refusal_mi.generation.prefix_logits_and_cache", broken)
        with pytest.raises(KeyboardInterrupt):
            ids(model, interventions=[Ablate(direction)])
    assert n_hooks() == 0
    assert ids(model) == plain


def test_no_new_tokens_is_refused(tiny_model):
    with pytest.raises(UserError, match="at least 1, not 0"):
        ids(tiny_model("gpt2"), max_new_tokens=0)


def test_an_answer_ends_with_the_context_whatever_the_batch(tiny_model):
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    n_template = len(chat.encode(""))
    long, longer = ("x" * (model.cfg.n_ctx - n_template - room) for room in (3, 5))
    asks = [long, ASKS[0], longer, ASKS[1]]
    together = ids(model, asks)
    assert together == [ids(model, [ask])[0] for ask in asks]
    assert [len(answer) for answer in together] == [3, N_NEW, 5, N_NEW]
    for ask, expected in zip(asks, together, strict=True):
        assert list(stream(model, chat, ask, max_new_tokens=N_NEW))[-1].token_ids == expected
    with pytest.raises(UserError, match=r"no room for an answer.*--max-new-tokens"):
        ids(model, [ASKS[0], long + "xxx"])


PREFIXES = {
    # answers -> the shared prefix of added tokens
    "empty think block": (["<think>\n\n</think>\n\nYes", "<think>\n\n</think>\n\nNo"], "<think>\n\n</think>\n\n"),
    "words between": (["<think>a</think>b", "<think>a</think>c"], "<think>a</think>"),
    "ordinary words": (["I think so", "I think not"], ""),
    "an added token later": (["So <think>x", "So <think>y"], ""),
    "different thoughts": (["<think>a</think>", "<think>b</think>"], "<think>"),
    "not all": (["<think></think>a", "a"], ""),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_response_prefix_is_what_answers_share_and_begins_with_an_added_token(name, tiny_model, monkeypatch):
    texts, expected = PREFIXES[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    chat = ChatFormat(tokenizer)

    def answers(model, chat, instructions, **options):
        rows = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [Generated(text, tuple(row), True) for text, row in zip(texts, rows, strict=True)]

    monkeypatch.setattr(generation, "generate", answers)
    prefix = discover_response_prefix(tiny_model("gpt2"), chat, ["a", "b"])
    assert prefix == expected
    assert chat.with_response_prefix(prefix).render("Hi").endswith("assistant\n" + expected)


def test_random_models_share_no_prefix(tiny_model):
    model = tiny_model("gpt2")
    assert discover_response_prefix(model, ChatFormat(model.tokenizer), ASKS) == ""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_addition_that_overflows_a_norm_is_no_empty_answer(family, tiny_model):
    direction = random_direction()
    with pytest.raises(UserError, match="too long to add"):
        Add(direction, 1e19)
    model = tiny_model(family)
    assert all(answer.token_ids for answer in generate(model, ChatFormat(model.tokenizer), ["Hi"], max_new_tokens=2))
    assert Add(direction, 1e15).hooks(model)


def test_streams_that_overflow_inside_a_norm_are_named(own_model):
    chat, blow_up = ChatFormat(own_model.tokenizer), own_model.blocks[1].mlp.original_component.down_proj.weight
    ask = {
        "generate": lambda: generate(own_model, chat, ["Hi"], max_new_tokens=1),
        "stream": lambda: list(stream(own_model, chat, "Hi", max_new_tokens=1)),
        "logits": lambda: next_token_logits(own_model, chat, ["Hi"]),
    }
    assert all(len(each()) for each in ask.values())
    with torch.no_grad():
        blow_up.mul_(1e30)  # finite, and their squares are not
    for each in ask.values():
        with pytest.raises(UserError, match="logits are all 0"):
            each()
