"""The chat: the whole conversation, every token, streamed; commands, pipes, interrupts."""

import io
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.cli.chat import Change, Session, interact
from refusal_mi.errors import UserError
from refusal_mi.generation import Conversation, generate, stream
from refusal_mi.interventions import Ablate, AblateInTurn, Add
from refusal_mi.terminal import printable
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast

TURNS = ("Hello there", "And then?")


CHANGES = {
    "plain": (),
    "span": (Ablate([random_direction(0), random_direction(1)]),),
    "sequential": (AblateInTurn([random_direction(0), random_direction(1)]),),
    "added": (Add(random_direction(2, scale=0.5)),),
    "added to the response": (Add(random_direction(3), positions="response"),),
}


@pytest.fixture(params=first_is_fast(["llama", "gpt2"]))
def model(tiny_model, request):
    return tiny_model(request.param)


def talk(conversation: Conversation, *turns: str) -> list[str]:
    return ["".join(conversation.ask(turn)) for turn in turns]


def test_streamed_cached_uncached_and_generated_answers_are_the_same(model, monkeypatch):
    """Under every intervention, in a second turn; and the interventions do change what is written."""
    monkeypatch.setattr("refusal_mi.generation.stop_token_ids", lambda _: ())  # a random model stops too soon
    chat, written = ChatFormat(model.tokenizer), {}
    for name, interventions in CHANGES.items():
        conversation = Conversation(model, chat, interventions, max_new_tokens=6)
        talk(conversation, TURNS[0])
        (answer,) = talk(conversation, TURNS[1])
        messages = conversation.messages[:3]
        options = {"interventions": interventions, "max_new_tokens": 6}
        for cached in (True, False):
            (expected,) = generate(model, chat, [messages], use_kv_cache=cached, **options)
            *_, last = stream(model, chat, messages, use_kv_cache=cached, **options)
            assert last == expected
            assert answer == expected.text
            assert written.setdefault(name, expected.token_ids) == expected.token_ids
    assert all(len(ids) == 6 for ids in written.values())
    assert all(ids != written["plain"] for name, ids in written.items() if name != "plain"), written


def test_the_texts_of_a_stream_grow(model):
    """Half characters and trailing space wait: every text is the beginning of the next."""
    found = [each.text for each in stream(model, ChatFormat(model.tokenizer), TURNS[0], max_new_tokens=40)]
    assert len(found) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(found))


def test_half_characters_are_held_back(tiny_model, monkeypatch):
    """A model that writes "é" byte by byte: the stream shows nothing, then é, never a replacement character."""
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    ids = chat.tokenizer("né ok", add_special_tokens=False)["input_ids"]
    script = iter([*ids, chat.tokenizer.eos_token_id])

    def scripted(*_, **__):
        logits = torch.zeros(1, model.cfg.d_vocab)
        logits[0, next(script)] = 1.0
        return logits, None

    monkeypatch.setattr("refusal_mi.generation.prefix_logits_and_cache", scripted)
    texts = [each.text for each in stream(model, chat, "Hi")]
    assert "n" in texts and not any("�" in text for text in texts)
    assert texts.index("né") == 2  # n, half of é, é
    monkeypatch.setattr("refusal_mi.generation.prefix_logits_and_cache", scripted)
    script = iter([*ids, chat.tokenizer.eos_token_id])
    conversation = Conversation(model, chat)
    pieces = list(conversation.ask("Hi"))
    assert "".join(pieces) == "né ok" == conversation.messages[-1]["content"]


def test_the_whole_conversation_is_templated(model):
    chat = ChatFormat(model.tokenizer, system="Be brief.")
    conversation = Conversation(model, chat, max_new_tokens=6)
    first, second = talk(conversation, *TURNS)
    text = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{TURNS[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = chat.tokenizer(text + f"{first}<|im_end|>\n<|im_start|>user\n{TURNS[1]}<|im_end|>\n<|im_start|>assistant\n")
    expected = Conversation(model, ChatFormat(model.tokenizer), max_new_tokens=6)
    (alone,) = talk(expected, TURNS[1])
    with torch.no_grad():
        token = model(torch.tensor([ids["input_ids"]]))[0, -1].argmax().item()
    *_, last = stream(
        model, chat, [{"role": "system", "content": "Be brief."}, *conversation.messages[:3]], max_new_tokens=6
    )
    assert last.token_ids[:1] == (token,) and last.text == second
    conversation.reset()
    conversation.set_system(None)
    assert talk(conversation, TURNS[1]) == [alone]


def test_a_reader_who_stops_keeps_the_turn_and_the_hooks_are_gone(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    plain = talk(Conversation(model, chat, max_new_tokens=12), TURNS[0])
    conversation = Conversation(model, chat, CHANGES["added"], max_new_tokens=12)
    answer = conversation.ask(TURNS[0])
    pieces = [next(answer) for _ in range(6)]
    # Between tokens the model is unchanged, so that another conversation can use it.
    assert talk(Conversation(model, chat, max_new_tokens=12), TURNS[0]) == plain
    answer.close()
    assert conversation.messages == [
        {"role": "user", "content": TURNS[0]},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    assert talk(Conversation(model, chat, max_new_tokens=12), TURNS[0]) == plain
    conversation.ask(TURNS[1]).close()
    assert len(conversation.messages) == 2  # nothing was written: the turn is dropped


def test_a_conversation_too_long_for_the_model_says_so(tiny_model):
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match="no room for an answer"):
        talk(Conversation(model, ChatFormat(model.tokenizer)), "x" * model.cfg.n_ctx)


def test_a_template_without_a_system_role_leaves_the_conversation_as_it_was(tiny_model):
    model = tiny_model("llama")
    tokenizer = type(model.tokenizer).from_pretrained(model.tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    conversation = Conversation(model, ChatFormat(tokenizer))
    with pytest.raises(UserError, match="no system role"):
        conversation.set_system("Be brief.")
    assert conversation.chat.system is None


def session(model, *, compare: bool = False) -> Session:
    chat = ChatFormat(model.tokenizer)

    def by_ranks(text: str) -> Change:
        if text != "0-2":
            raise UserError(f"no direction of rank {text}")
        return Change("ablated 0-2", CHANGES["span"])

    return Session(
        changed=Conversation(model, chat, max_new_tokens=8),
        plain=Conversation(model, chat, max_new_tokens=8) if compare else None,
        name="tiny",
        change=None,
        by_ranks=by_ranks,
        steered_by=lambda coefficient: Change(
            f"{coefficient:+g} added", (Add(random_direction(2, scale=7.0), coefficient),)
        ),
    )


def typed(monkeypatch, *lines) -> None:
    """Feed `input()`; an exception among the lines is raised there."""
    waiting = iter(lines)

    def read(_: str = "") -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_commands(tiny_model, monkeypatch, capsys, tmp_path):
    state = session(tiny_model("llama"), compare=True)
    for line in ("/ablate 0-2", "/coefficient -2", "/system Be brief.", "/help"):
        assert state.obey(line)
    assert state.label == "-2 added" and state.changed.chat.system == state.plain.chat.system == "Be brief."
    state.obey("/ablate 0-2")
    assert state.changed.interventions == CHANGES["span"] and state.plain.interventions == ()
    saved = tmp_path / "new folder" / "chat.json"
    typed(
        monkeypatch, TURNS[0], "/ablate 9", "/nonsense", "/coefficient x", f"/save {saved}", "/reset", "/quit", "never"
    )
    interact(state)
    out = capsys.readouterr().out
    assert "error: no direction of rank 9" in out and "error: unknown command /nonsense" in out
    assert "error: /coefficient takes a number" in out
    record = json.loads(saved.read_text())
    assert [each["label"] for each in record["conversations"]] == ["plain", "ablated 0-2"]
    contents = [[message["content"] for message in each["messages"]] for each in record["conversations"]]
    assert contents[0][0] == contents[1][0] == TURNS[0] and contents[0][1] != contents[1][1]
    assert state.changed.messages == state.plain.messages == []
    state.obey("/ablate off")
    assert state.changed.interventions == () and state.label == "plain"
    with pytest.raises(UserError, match="cannot write"):
        state.obey(f"/save {tmp_path}")
    state.obey(f"/save {saved}")
    held = tmp_path / "config.json"
    held.write_text('{"model": "x"}')
    with pytest.raises(UserError, match="is no saved conversation"):
        state.obey(f"/save {held}")
    assert held.read_text() == '{"model": "x"}'
    state.steered_by = None
    with pytest.raises(UserError, match="--steer"):
        state.obey("/coefficient 1")


def test_an_interrupt_stops_the_answer_and_keeps_the_session(tiny_model, monkeypatch, capsys):
    model = tiny_model("llama")
    state = session(model)
    state.obey("/ablate 0-2")
    reads = {"n": 0}
    import refusal_mi.generation as generation

    real = generation.prefix_logits_and_cache

    def interrupted(*arguments, **options):
        reads["n"] += 1
        if reads["n"] == 4:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "prefix_logits_and_cache", interrupted)
    typed(monkeypatch, KeyboardInterrupt(), TURNS[0], TURNS[1], EOFError())
    interact(state)
    out = capsys.readouterr().out
    assert "(stopped)" in out and "/quit or Ctrl-D" in out
    first, second = state.changed.messages[1]["content"], state.changed.messages[3]["content"]
    whole = talk(Conversation(model, state.changed.chat, CHANGES["span"], 3), TURNS[0])
    assert [first] == whole and printable(second) in out


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\n\tc\x07") == "a�[2Jb�\n\tc�"


def test_prompts_from_a_pipe(tiny_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TURNS[0]}\n\n{TURNS[1]}\n/reset\n{TURNS[0]}\n"))
    assert exit_status(["chat", str(tiny_dir("llama")), "--max-new-tokens", "5", "--compare"]) == 0
    out = capsys.readouterr().out.split("[plain]\n")[1:]
    assert len(out) == 3 and all("[unchanged]\n" in block for block in out)
    plain, changed = out[0].split("[unchanged]\n")
    assert plain == changed == out[2].split("[unchanged]\n")[0]
    assert out[1] != out[0]


def test_prompts_as_options_and_the_published_spelling(tiny_dir, tmp_path, capsys):
    model = str(tiny_dir("llama"))
    random_direction(2, scale=7.0).save(tmp_path / "v.pt")
    outs = []
    for extra in ([], ["--steer", str(tmp_path / "v.pt"), "--coefficient", "0"], ["--steer", str(tmp_path / "v.pt")]):
        status = exit_status(["chat", "--model_path", model, "--prompt", "/reset", "--max_new_tokens", "8", *extra])
        assert status == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ablate", "0-2"], "first run: refusal-mi run"),
        (["--ablate", "0", "--steer", "x.pt"], "one of --directions, --vectors-ablated, --direction and --steer"),
        (["--layer", "2"], "--steer FILE or --direction FILE"),
        (["--direction", "missing.pt"], "no such file"),
        (["--steer", "bare.pt"], "--layer"),
        (["--steer", "bare.pt", "--layer", "9"], "layer 9 does not exist"),
        (["--steer", "matrix.pt", "--layer", "1"], "expected floats of shape [d], [1, d] or [n, d]"),
        (["--positions", "some"], "--positions"),
        (["--multi", "both"], "--multi"),
    ],
)
def test_bad_input_is_one_line(tiny_dir, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.ones(32), tmp_path / "bare.pt")
    torch.save(torch.ones(2, 3, 32), tmp_path / "matrix.pt")
    assert exit_status(["chat", str(tiny_dir("llama")), "--prompt", "Hi", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


INTERRUPTED = """
import signal, sys
import refusal_mi.generation as generation
from refusal_mi.cli import exit_status

real, calls = generation.prefix_logits_and_cache, []

def step(*arguments, **options):
    calls.append(1)
    if len(calls) == 4:
        signal.raise_signal(signal.SIGINT)
    return real(*arguments, **options)

generation.prefix_logits_and_cache = step
sys.exit(exit_status(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_in_a_real_terminal(tiny_dir):
    """A pseudo-terminal, SIGINT in the middle of an answer, the next answer after it, and a clean end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", INTERRUPTED, "chat", str(tiny_dir("gpt2")), "--max-new-tokens", "12"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    waiting = ""

    def until(text: str) -> None:
        nonlocal waiting
        while text not in waiting:
            waiting += os.read(ours, 4096).decode(errors="replace")
        waiting = waiting.split(text, 1)[1]

    try:
        for typed_in, *answered in (("Hello", "model> ", "(stopped)"), ("Again", "model> "), ("/reset", "a new")):
            until("you> ")
            os.write(ours, f"{typed_in}\n".encode())
            for text in answered:
                until(text)
        until("you> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=120) == 0
    finally:
        watchdog.cancel()
        process.kill()
        os.close(ours)
