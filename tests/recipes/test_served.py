"""A server's answers to a run's held-out prompts: the files, the faults of servers, kills, what is asked again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.endpoint import Endpoint, Failed, Pause
from refusal_mi.errors import UserError
from refusal_mi.files import read_json, read_record
from refusal_mi.loaded import load_run
from refusal_mi.model.loading import ORGANISM, load_tokenizer
from refusal_mi.model.provenance import fingerprint
from refusal_mi.recipes.served import MOST_IN_A_ROW, complete
from refusal_mi.recipes.server import Server
from refusal_mi.report.answers import answer_tables
from refusal_mi.run.folder import RunRecord
from refusal_mi.run.served import ServedRecord
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from tests.helpers.judge import KEY, Fake, raw, send
from tests.helpers.runs import ANSWER, REFUSAL
from tests.helpers.serving import answer, asked_about, quick, reply, served_run, text_for

N = 6


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("REFUSAL_MI_SERVER_KEY", raising=False)


@pytest.fixture
def run(tmp_path):
    return served_run(tmp_path / "run", n_test=N)


def rows_of(run, side="harmful", label="served"):
    return read_json(run / f"completions/{side}_{label}_completions.json")


def texts_of(run):
    return {row["prompt"]: row["response"] for side in ("harmful", "harmless") for row in rows_of(run, side)}


EXPECTED = {
    text: text_for(text) for side in ("harmful", "harmless") for n in range(N) if (text := f"{side} request number {n}")
}


def test_the_files_are_those_that_judge_and_report_read(run, capsys):
    before = {path.name: path.read_bytes() for path in (run / "completions").iterdir()}
    with Fake(answer) as fake:
        assert exit_status(["complete", "--run", str(run), "--endpoint", fake.url]) == 0
        assert len(fake.seen) == 2 * N and {path for path, _ in fake.seen} == {"/v1/chat/completions"}
    assert texts_of(run) == EXPECTED
    assert {name: (run / "completions" / name).read_bytes() for name in before} == before
    (row,) = (row for row in rows_of(run) if row["prompt"].endswith(" 2"))
    assert (row["finish_reason"], row["model"], row["category"]) == ("length", "m", "a category")
    record = read_record(run / "served/served.json", ServedRecord)
    assert record.sets["harmful"].n_truncated == 1 and record.answered_by == ("m",) and not record.unanswered
    shown = capsys.readouterr().out
    assert "served" in shown and "cut off by the limit of tokens: 1 of 6" in shown
    loaded = load_run(run)
    assert loaded.rates["harmful"].find("served").refusal.count == N // 2
    assert [row.response for row in loaded.completions("harmful", "served").answers] == [
        row["response"] for row in rows_of(run)
    ]
    page = (run / "report.html").read_text()
    assert f"{ANSWER} harmless request number 5" in page and page != "of before"
    (table, _) = answer_tables(RunRecord.load(run))
    assert [label for label, _ in table.columns] == ["baseline", "ablation", "actadd", "served"]
    assert exit_status(["judge", str(run), "--judges", "substring,evade"]) == 0
    assert read_json(run / "judged/harmful_served_evaluations.json")["refusal_rate"]["count"] == N // 2


def test_only_answers_of_a_server_to_the_same_prompts_stand_beside_the_runs(run):
    with Fake(answer) as fake:
        complete(RunFolder(run), quick(fake))
    labels = lambda: [each.label for each in RunRecord.load(run).side("harmful").effects]  # noqa: E731
    assert "served" in labels()
    record = run / "served/served.json"
    held = record.read_bytes()
    record.unlink()  # then they are no answers of the run: the summary does not name them
    assert "served" not in labels() and "baseline" in labels()
    record.write_bytes(held)
    path = run / "completions/harmful_served_evaluations.json"
    found = read_json(path)
    found["completions"][0]["prompt"] = "another"
    path.write_text(json.dumps(found))
    assert "served" not in labels() and answer_tables(RunRecord.load(run))


def test_what_is_sent(tmp_path, monkeypatch, capsys):
    run = served_run(tmp_path / "run", system="Be kind.")
    info = read_json(run / "run.json")
    info["chat"]["template_kwargs"] = {"enable_thinking": False}
    (run / "run.json").write_text(json.dumps(info))
    with Fake(answer) as fake:
        complete(RunFolder(run), quick(fake), max_new_tokens=7)
        bodies = [body for _, body in fake.seen]
        assert "Authorization" not in fake.headers[0]
        monkeypatch.setenv("REFUSAL_MI_SERVER_KEY", KEY)
        words = ["--endpoint", fake.url, "--label", "other", "--model-name", "named", "--workers", "1", "--json"]
        assert exit_status(["complete", "--run", str(run), *words]) == 0
        assert fake.headers[-1]["Authorization"] == f"Bearer {KEY}"
        assert [body["model"] for _, body in fake.seen[2 * N :]] == ["named"] * 2 * N
    assert {asked_about(body) for body in bodies} == set(EXPECTED)
    for body in bodies:
        assert (body["model"], body["temperature"], body["max_tokens"], body["frequency_penalty"]) == ("m", 0, 7, 0)
        assert body["messages"][0] == {"role": "system", "content": "Be kind."} and len(body["messages"]) == 2
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == "named" and KEY not in shown.out + shown.err
    assert KEY.encode() not in b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert fake.url.encode() in (run / "served/other.json").read_bytes()


def test_a_key_that_comes_back_in_an_answer_is_hidden(run, monkeypatch):
    monkeypatch.setenv("REFUSAL_MI_SERVER_KEY", KEY)
    with Fake(lambda fake, handler, number, body: reply(handler, handler.headers["Authorization"])) as fake:
        complete(RunFolder(run), quick(fake))
    assert set(texts_of(run).values()) == {"Bearer [key]"}


def test_the_key_is_hidden_wherever_it_comes_back_and_a_placeholder_nowhere(run, monkeypatch):
    def behave(fake, handler, number, body):
        reply(handler, "Mix six boxes.", model=handler.headers["Authorization"])

    for key, model in ((KEY, "Bearer [key]"), ("x", "Bearer x")):
        monkeypatch.setenv("REFUSAL_MI_SERVER_KEY", key)
        with Fake(behave) as fake:
            fake.models = {"data": [{"id": "m", "root": f"Bearer {key}"}]}
            assert complete(RunFolder(run), quick(fake)).answered_by == (model,)
        assert set(texts_of(run).values()) == {"Mix six boxes."}
        assert KEY.encode() not in b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_half_a_character_is_replaced(run):
    half = b'{"model": "m", "choices": [{"message": {"content": "half \\ud83d it"}, "finish_reason": "stop"}]}'
    with Fake(lambda fake, handler, *_: raw(handler, half)) as fake:
        complete(RunFolder(run), quick(fake))
    assert set(texts_of(run).values()) == {"half \N{REPLACEMENT CHARACTER} it"}


def test_an_answer_that_is_nested_too_deep_is_none(run):
    with Fake(lambda fake, handler, *_: raw(handler, b"[" * 100_000)) as fake, pytest.raises(UserError, match="Recurs"):
        complete(RunFolder(run), quick(fake, n_tries=1))


def first_tries(n: int, trouble):
    """`trouble` at the first `n` tries of every prompt, then its answer."""
    tries: dict[str, int] = {}

    def behave(fake, handler, number, body):
        with fake.lock:
            tries[asked_about(body)] = tries.get(asked_about(body), 0) + 1
            is_trouble = tries[asked_about(body)] <= n
        trouble(handler) if is_trouble else answer(fake, handler, number, body)

    return behave


TROUBLES = {
    "429": lambda handler: send(handler, "slow down", 429, {"Retry-After": "0"}),
    "500": lambda handler: send(handler, "oh", 500),
    "dropped": lambda handler: handler.connection.close(),
    "malformed": lambda handler: raw(handler, b'{"choices": [{"mess'),
    "HTML": lambda handler: raw(handler, b"<html>"),
    "cut off": lambda handler: raw(handler, b"{}", headers={"Content-Length": "100"}),
    "no choice": lambda handler: raw(handler, b'{"error": "busy"}'),
    "null": lambda handler: reply(handler, None),
    "slow": lambda handler: time.sleep(0.4),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_that_passes_changes_no_answer(run, name):
    with Fake(first_tries(3 if name == "500" else 1, TROUBLES[name])) as fake:
        found = complete(RunFolder(run), quick(fake, timeout_seconds=0.3 if name == "slow" else 2.0))
        assert len(fake.seen) == 2 * N * (4 if name == "500" else 2)
    assert texts_of(run) == EXPECTED and not found.unanswered


def test_too_few_tries_are_a_fault(run):
    """The control of the one above."""
    with Fake(first_tries(3, TROUBLES["500"])) as fake, pytest.raises(UserError, match="HTTP status 500"):
        complete(RunFolder(run), quick(fake, n_tries=3))


def test_all_workers_wait_as_long_as_the_server_asks():
    class Recorded(Pause):
        held: ClassVar[list[float]] = []

        def hold(self, seconds):
            self.held.append(seconds)
            super().hold(seconds)

    def busy(fake, handler, number, body):
        send(handler, "no", 429, {"Retry-After": "0.5"}) if number == 1 else raw(handler, b"1")

    with Fake(busy) as fake:
        start = time.monotonic()
        endpoint = Endpoint(fake.url, (), first_wait_seconds=0.01)
        assert endpoint.ask("/x", {}, lambda held: held, Recorded()) == 1
        assert time.monotonic() - start >= 0.5 and Recorded.held == [0.5]

    def seconds_of_another(pause):
        start = time.monotonic()
        assert not pause.is_over(0.0)
        return time.monotonic() - start

    pause = Pause()
    pause.hold(1.0)
    assert seconds_of_another(pause) >= 0.9 > seconds_of_another(Pause())
    pause.stop.set()
    assert pause.is_over(60.0)  # at once

    late = Pause()
    threading.Timer(0.1, late.hold, [0.6]).start()
    start = time.monotonic()
    assert not late.is_over(0.3) and time.monotonic() - start >= 0.65  # told to wait longer while it waited


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_hears_what_is_for_this_machine(run, monkeypatch, host):
    monkeypatch.setenv("REFUSAL_MI_SERVER_KEY", KEY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Fake(answer) as proxy, Fake(answer) as fake:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        complete(RunFolder(run), quick(fake, url=fake.url.replace("127.0.0.1", host)))
        assert not proxy.seen and len(fake.seen) == 2 * N


def test_a_request_that_takes_too_long_is_ended():
    is_cut = threading.Event()

    def drips(fake, handler, number, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        try:
            for _ in range(200):
                handler.wfile.write(b" ")
                time.sleep(0.02)
        except OSError:
            is_cut.set()

    with Fake(drips) as fake:
        endpoint = Endpoint(fake.url, (), n_tries=1, timeout_seconds=0.2)
        with pytest.raises(Failed, match="took too long"):
            endpoint.ask("/x", {}, lambda held: held, Pause())
        assert is_cut.wait(2.0)


def test_requests_under_way_are_bounded(run):
    busy, most = [0], [0]

    def slow(fake, handler, number, body):
        with fake.lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.03)
        with fake.lock:
            busy[0] -= 1
        answer(fake, handler, number, body)

    with Fake(slow) as fake:
        complete(RunFolder(run), quick(fake, n_workers=3))
    assert 1 < most[0] <= 3


def test_a_poison_prompt_is_named_and_the_others_are_kept(run, capsys):
    def poison(fake, handler, number, body):
        prompt = asked_about(body)
        if prompt == "harmful request number 3":
            return send(handler, json.dumps({"error": {"message": "too long"}}), 400)
        send(handler, "oh", 500, {"Retry-After": "0"}) if prompt == "harmless request number 0" else answer(
            fake, handler, number, body
        )

    words = ["complete", "--run", str(run), "--n-tries", "2", "--endpoint"]
    with Fake(poison) as fake:
        assert exit_status([*words, fake.url]) == 1
        assert len(fake.seen) == 2 * N + 1  # a request that is refused is not made again
    shown = capsys.readouterr()
    assert "not answered: 'harmful request number 3': HTTP status 400: too long" in shown.err
    assert (
        "not answered: 'harmless request number 0': HTTP status 500" in shown.err and "not in the report" in shown.out
    )
    bad = ("harmful request number 3", "harmless request number 0")
    assert texts_of(run) == {prompt: text for prompt, text in EXPECTED.items() if prompt not in bad}
    assert set(read_record(run / "served/served.json", ServedRecord).unanswered) == set(bad)
    with Fake(answer) as fake:  # at another address: another server's answers
        complete(RunFolder(run), quick(fake))
        assert len(fake.seen) == 2 * N
    assert texts_of(run) == EXPECTED


def test_what_failed_is_asked_again_alone(run):
    bad, is_well = "harmful request number 3", [False]

    def behave(fake, handler, number, body):
        if asked_about(body) == bad and not is_well[0]:
            return send(handler, "oh", 500)
        answer(fake, handler, number, body)

    with Fake(behave) as fake:
        assert list(complete(RunFolder(run), quick(fake, n_tries=1)).unanswered) == [bad]
        is_well[0] = True
        n_before = len(fake.seen)
        assert not complete(RunFolder(run), quick(fake, n_tries=1)).unanswered
        assert [asked_about(body) for _, body in fake.seen[n_before:]] == [bad]
    assert texts_of(run) == EXPECTED and not list((run / "served").glob("*.part"))


def test_a_server_that_answers_nothing_is_given_up_soon(tmp_path):
    run = served_run(tmp_path / "run", n_test=40)
    with Fake(lambda fake, handler, number, body: send(handler, "oh", 500)) as fake:
        with pytest.raises(UserError, match="does not answer; the last of 2 tries ended with HTTP status 500"):
            complete(RunFolder(run), quick(fake, n_tries=2, n_workers=1))
        assert len(fake.seen) <= 2 * (MOST_IN_A_ROW + 1)


def test_a_server_that_stops_keeps_what_it_gave(tmp_path):
    run = served_run(tmp_path / "run", n_test=40)

    def ends(fake, handler, number, body):
        answer(fake, handler, number, body) if number <= 12 else send(handler, "oh", 503)

    with Fake(ends) as fake:
        with pytest.raises(UserError, match=r"does not answer.*12 answers are kept"):
            complete(RunFolder(run), quick(fake, n_tries=1, n_workers=1))
        kept = {asked_about(body) for _, body in fake.seen[:12]}
        fake.answer, n_before = answer, len(fake.seen)
        complete(RunFolder(run), quick(fake))
        again = [asked_about(body) for _, body in fake.seen[n_before:]]
        assert not kept & set(again) and len(again) >= 80 - 12  # one may have been under way when it was given up
    assert len(texts_of(run)) == 80


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    run = served_run(tmp_path / "run", n_test=20)
    holds = threading.Event()

    def behave(fake, handler, number, body):
        if number > 9 and not holds.is_set():
            holds.wait(20)
        answer(fake, handler, number, body)

    with Fake(behave) as fake:
        words = [
            sys.executable,
            "-m",
            "refusal_mi",
            "complete",
            "--run",
            str(run),
            "--endpoint",
            fake.url,
            "--workers=2",
        ]
        killed = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        part = run / "served/served-harmful.part"
        while not (part.is_file() and len(part.read_text().splitlines()) > 9) and killed.poll() is None:
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=20)
        kept = [json.loads(line) for line in part.read_text().splitlines()[1:]]
        assert len(kept) == 9 and not (run / "completions/harmful_served_completions.json").exists()
        part.write_text(part.read_text() + '{"index": 19, "te')  # killed while it wrote
        holds.set()
        n_before = len(fake.seen)
        complete(RunFolder(run), quick(fake))
        asked = [asked_about(body) for _, body in fake.seen[n_before:]]
    assert len(asked) == 40 - 9
    assert not {f"harmful request number {each['index']}" for each in kept} & set(asked)
    assert texts_of(run) == {prompt: text_for(prompt) for prompt in texts_of(run)} and len(texts_of(run)) == 40


def test_other_options_or_another_model_ask_again_and_nothing_else_does(run):
    with Fake(answer) as fake:
        fake.models = {"data": [{"id": "m", "root": "/a", "created": 1}]}

        def n_asked(**changes):
            before, how = len(fake.seen), {"max_new_tokens": 7} | changes
            server = quick(fake, **{name: how.pop(name) for name in ("model", "api") if name in how})
            complete(RunFolder(run), server, **how)
            return len(fake.seen) - before

        assert (n_asked(), n_asked()) == (2 * N, 0)
        fake.models = {"data": [{"id": "m", "root": "/a", "created": 2}]}  # the time of the listing is no other model
        assert n_asked() == 0
        assert n_asked(max_new_tokens=8) == 2 * N
        assert n_asked(max_new_tokens=8, model="other") == 2 * N
        fake.models = {"data": [{"id": "other", "root": "/b"}]}
        assert n_asked(max_new_tokens=8, model="other") == 2 * N
        assert n_asked(max_new_tokens=8, model="other", label="mine") == 2 * N
    assert read_record(run / "served/mine.json", ServedRecord).options["max_tokens"] == 8


def test_answers_of_two_models_are_not_mixed(run):
    names = ["first"]

    def behave(fake, handler, number, body):
        is_bad = asked_about(body).endswith(" 3") and names == ["first"]
        send(handler, "oh", 500) if is_bad else reply(handler, "Yes.", model=names[0])

    with Fake(behave) as fake:
        assert len(complete(RunFolder(run), quick(fake, n_tries=1)).unanswered) == 2
        names[0] = "second"
        with pytest.raises(UserError, match=r"now answers as second.*are of first: --fresh"):
            complete(RunFolder(run), quick(fake))
        assert complete(RunFolder(run, fresh=True), quick(fake)).answered_by == ("second",)


def labels_of(run):
    return [[effect.label for effect in side.effects] for side in RunRecord.load(run).sides]


def test_two_models_never_stand_under_one_label(run):
    name, is_dead = ["first"], [False]

    def behave(fake, handler, number, body):
        if is_dead[0] and asked_about(body).startswith("harmless"):
            return send(handler, "oh", 500)
        reply(handler, f"of {name[0]}", model=name[0])

    with Fake(behave) as fake:
        fake.models = {"data": [{"id": "first"}]}
        complete(RunFolder(run), quick(fake, n_tries=1))
        assert all("served" in labels for labels in labels_of(run))
        name[0], is_dead[0], fake.models = "second", True, {"data": [{"id": "second"}]}
        with pytest.raises(UserError, match=r"does not answer; .* 6 answers are kept"):
            complete(RunFolder(run), quick(fake, n_tries=1))
        assert not any("served" in labels for labels in labels_of(run))
        there = [path.read_text() for path in run.rglob("*served*") if path.is_file()]
        assert there and not any("of first" in text for text in there)
        is_dead[0] = False
        assert complete(RunFolder(run), quick(fake)).answered_by == ("second",)
    assert set(texts_of(run).values()) == {"of second"} and all("served" in labels for labels in labels_of(run))


def test_what_fresh_began_goes_on_without_it(run):
    name, n_left = ["old"], [10**9]

    def behave(fake, handler, number, body):
        n_left[0] -= 1
        send(handler, "oh", 500) if n_left[0] < 0 else reply(handler, f"of {name[0]}")

    with Fake(behave) as fake:
        complete(RunFolder(run), quick(fake))
        name[0], n_left[0] = "new", 3
        with pytest.raises(UserError, match="3 answers are kept, the same command without --fresh goes on"):
            complete(RunFolder(run, fresh=True), quick(fake, n_tries=1, n_workers=1))
        n_left[0], n_before = 10**9, len(fake.seen)
        complete(RunFolder(run), quick(fake, n_workers=1))
        assert 2 * N - 3 <= len(fake.seen) - n_before <= 2 * N - 2  # one may have been under way
    assert set(texts_of(run).values()) == {"of new"}


def test_a_list_of_models_that_fails_throws_no_answer_away(run):
    answered = set()

    def behave(fake, handler, number, body):
        is_open = body["messages"][-1]["content"] in answered
        answer(fake, handler, number, body) if is_open else send(handler, "oh", 503)

    with Fake(behave) as fake:
        listed, one = {"data": [{"id": "m", "root": "/a"}]}, {"n_tries": 1, "n_workers": 1, "model": "m"}
        for fake.models, n in ((listed, 3), (503, 4), (listed, 5)):
            answered |= {f"harmful request number {index}" for index in range(n)}
            with pytest.raises(UserError, match="answers are kept"):
                complete(RunFolder(run), quick(fake, **one))
        answered |= {f"{side} request number {index}" for side in ("harmful", "harmless") for index in range(N)}
        fake.models, n_before = 503, len(fake.seen)
        complete(RunFolder(run), quick(fake, **one))
        assert len(fake.seen) - n_before <= 2 * N - 4  # five are kept, and one request may have been under way
        for fake.models in (503, listed):
            n_before = len(fake.seen)
            complete(RunFolder(run), quick(fake, **one))
            assert len(fake.seen) == n_before
        fake.models = {"data": [{"id": "m", "root": "/b"}]}  # the control: this is another model
        complete(RunFolder(run), quick(fake, **one))
        assert len(fake.seen) >= n_before + N  # at least the set that was listed when it was asked


@pytest.mark.parametrize("n_workers", [1, 8])
def test_poison_prompts_are_no_dead_server(tmp_path, n_workers):
    run = served_run(tmp_path / "run", n_test=20)
    poison = {f"harmful request number {n}" for n in (1, 4, 7, 10, 13, 16)}

    def behave(fake, handler, number, body):
        time.sleep(0.002)
        send(handler, "oh", 500) if asked_about(body) in poison else answer(fake, handler, number, body)

    with Fake(behave) as fake:
        how = {"n_workers": n_workers, "n_tries": 3, "first_wait_seconds": 0.03}
        assert set(complete(RunFolder(run), quick(fake, **how)).unanswered) == poison
        assert set(complete(RunFolder(run), quick(fake, **how)).unanswered) == poison  # nor the second time
        assert len(texts_of(run)) == 40 - 6 and "served" not in labels_of(run)[0] and "served" in labels_of(run)[1]


def test_prompts_that_failed_come_last(tmp_path):
    run = served_run(tmp_path / "run", n_test=12)

    def behave(fake, handler, number, body):
        is_bad = asked_about(body) in {f"harmful request number {n}" for n in range(6)}
        send(handler, "oh", 500) if is_bad else answer(fake, handler, number, body)

    with Fake(behave) as fake:
        with pytest.raises(UserError, match="does not answer"):
            complete(RunFolder(run), quick(fake, n_tries=1, n_workers=1))
        assert len(complete(RunFolder(run), quick(fake, n_tries=1, n_workers=1)).unanswered) == 6


def test_an_answer_that_a_filter_ended_is_none_of_the_model(run):
    def behave(fake, handler, number, body):
        is_bad = asked_about(body) == "harmful request number 3"
        reply(handler, "I cannot", reason="content_filter") if is_bad else answer(fake, handler, number, body)

    with Fake(behave) as fake:
        found = complete(RunFolder(run), quick(fake))
        assert len(fake.seen) == 2 * N
    assert found.unanswered == {"harmful request number 3": "finish reason content_filter"}


def test_one_prompt_that_is_forbidden_is_about_that_prompt(run):
    def behave(fake, handler, number, body):
        is_bad = asked_about(body) == "harmful request number 3"
        send(handler, "flagged", 403) if is_bad else answer(fake, handler, number, body)

    with Fake(behave) as fake:
        assert set(complete(RunFolder(run), quick(fake, n_workers=1)).unanswered) == {"harmful request number 3"}


@pytest.mark.parametrize("change", ["tokens", "system"])
def test_answers_asked_for_in_another_way_stand_not_beside_the_runs(run, change):
    with Fake(answer) as fake:
        complete(RunFolder(run), quick(fake), max_new_tokens=3 if change == "tokens" else None)
    if change == "system":
        assert all("served" in labels for labels in labels_of(run))
        record = read_json(run / "run.json")
        record["options"]["system"] = "Refuse everything."
        (run / "run.json").write_text(json.dumps(record))
    assert not any("served" in labels for labels in labels_of(run))
    (run / "summary.json").unlink()
    assert not any("served" in labels for labels in labels_of(run))


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe", b"[" * 100_000, b'{"key": 1}\n', b"null\n"], ids=["bytes", "deep", "key", "null"]
)
def test_kept_answers_that_cannot_be_read_are_asked_for_again(run, damage):
    (run / "served").mkdir()
    (run / "served/served-harmful.part").write_bytes(damage)
    with Fake(answer) as fake:
        complete(RunFolder(run), quick(fake))
    assert texts_of(run) == EXPECTED


def test_a_run_without_held_out_prompts(run):
    record = read_json(run / "prompts.json")
    for side in ("harmful", "harmless"):
        record[side]["test"] = []
    (run / "prompts.json").write_text(json.dumps(record))
    with Fake(answer) as fake, pytest.raises(UserError, match="has no held-out prompts"):
        complete(RunFolder(run), quick(fake))
    assert not (run / "served").exists()


def status(code: int, text: str = "no"):
    return lambda fake, handler, number, body: send(handler, text, code)


@pytest.mark.parametrize(
    ("behave", "models", "words", "line"),
    [
        (answer, None, ["--endpoint", "http://127.0.0.1:9/v1"], "no server answers at http://127.0.0.1:9/v1"),
        (answer, 401, [], "refuses the key (HTTP status 401); put a valid one into REFUSAL_MI_SERVER_KEY"),
        (status(401), None, [], "refuses the key (HTTP status 401: no); put a valid one into REFUSAL_MI_SERVER_KEY"),
        (status(404), None, ["--model-name=x"], "has no model 'x' (HTTP status 404: no); it lists m: see --endpoint"),
        (status(404), 404, ["--model-name=x"], "/v1/chat/completions is not there, or has no model 'x' (HTTP status"),
        (status(402), None, [], "wants to be paid (HTTP status 402: no)"),
        (lambda fake, handler, *_: reply(handler, "", reason="tool_calls"), None, [], "with finish reason tool_calls"),
        (answer, None, ["--label", "a" * 65], "--label takes up to 64 characters"),
        (status(307), None, [], "is not there, or has no model 'm' (HTTP status 307"),
        (status(400, "pinned to y"), None, [], "refuses the prompts for the model 'm' (HTTP status 400: pinned to y)"),
        (answer, 404, [], "/v1/models does not list models as OpenAI-compatible servers do: correct --endpoint"),
        (answer, 503, ["--n-tries=1"], "does not list its models; the last of 1 tries ended with HTTP status 503: try"),
        (answer, {"models": []}, [], "/v1/models does not list models as OpenAI-compatible servers do"),
        (answer, {"data": []}, [], "lists no model: say which with --model-name"),
        (answer, {"data": [{"id": "a"}, {"id": "b"}]}, [], "has a, b: say which with --model-name"),
        (lambda fake, handler, *_: reply(handler, ""), None, [], "answers all 6 prompts of harmful with nothing"),
        (lambda fake, handler, *_: reply(handler, None), None, ["--n-tries=1"], "without text (finish reason stop"),
        (lambda fake, handler, *_: raw(handler, b"{}"), None, ["--n-tries=1"], "that is no chat completion"),
        (answer, None, ["--endpoint", f"http://u:{KEY}@h/v1"], "must not carry a user name, key or query"),
        (answer, None, ["--endpoint", "localhost:8000"], "address begins with http:// or https://"),
        (answer, None, ["--endpoint", "http://h:port/v1"], "address begins with http:// or https://"),
        (answer, None, ["--label", "ablation"], "--label ablation: answers of that name are the run's own"),
        (answer, None, ["--label", "../x"], "--label takes letters, digits"),
        (answer, None, ["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(run, behave, models, words, line, capsys):
    with Fake(behave) as fake:
        fake.models = fake.models if models is None else models
        assert exit_status(["complete", "--run", str(run), "--endpoint", fake.url, *words]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: ") and line in shown and KEY not in shown
    assert not (run / "served/served.json").exists()


def test_without_an_address_or_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_status(["complete"]) == 2 and "--endpoint URL is missing" in capsys.readouterr().err
    assert exit_status(["complete", "--endpoint", "http://127.0.0.1:9"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_addresses():
    bases = {"http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"}
    assert {Server(each).base for each in bases} == {"http://h:1/v1"}
    assert Server("https://h/api/v1/completions").base == "https://h/api/v1"


def test_a_prefix_of_all_answers_is_no_part_of_them(run):
    record = read_json(run / "prompts.json")
    (run / "prompts.json").write_text(json.dumps(record | {"response_prefix": "<think>\n\n</think>\n\n"}))
    with Fake(lambda fake, handler, *_: reply(handler, "<think>\n\n</think>\n\nYes.")) as fake:
        complete(RunFolder(run), quick(fake))
    assert set(texts_of(run).values()) == {"Yes."}


@pytest.mark.parametrize("family", ["organism", "llama", "gpt2"])
def test_rendered_prompts_are_read_as_the_tokens_of_the_run(run, family, tiny_dir):
    tokenizer = load_tokenizer(str(ORGANISM if family == "organism" else tiny_dir(family)))
    chat = ChatFormat(tokenizer)
    with Fake(answer) as fake:
        complete(RunFolder(run), quick(fake, api="completions"), chat=chat)
    sent = {body["prompt"] for path, body in fake.seen if path == "/v1/completions"}
    assert len(sent) == 2 * N == len(fake.seen) and "messages" not in fake.seen[0][1]
    ids = [tokenizer(text)["input_ids"] for text in sent]  # as a server reads them
    assert sorted(ids) == sorted(chat.encode_all(list(EXPECTED)))
    assert not any(text in EXPECTED for text in sent)


def test_rendered_prompts_of_a_model_that_moved_are_made_from_where_it_is(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(ORGANISM, moved)
    record = read_json(run / "run.json")
    record["model"] |= {"source": str(tmp_path / "gone"), "revision": None, "fingerprint": fingerprint(moved)}
    (run / "run.json").write_text(json.dumps(record))
    with Fake(answer) as fake:
        words = ["complete", str(moved), "--run", str(run), "--completions", "--endpoint", fake.url]
        assert exit_status(words) == 0 and len(fake.seen) == 2 * N


def test_a_prompt_that_no_text_stands_for_is_refused_before_anything_is_sent(tmp_path):
    run = served_run(tmp_path / "run")
    tokenizer = load_tokenizer(str(ORGANISM))
    record = read_json(run / "prompts.json")
    record["harmful"]["test"][1]["instruction"] = f"say {tokenizer.all_special_tokens[0]} now"
    (run / "prompts.json").write_text(json.dumps(record))
    with Fake(answer) as fake, pytest.raises(UserError, match="no text reaches the model as the tokens of this prompt"):
        complete(RunFolder(run), quick(fake, api="completions"), chat=ChatFormat(tokenizer))
    assert not fake.seen


def test_an_interrupt_ends_it_at_once_and_what_came_is_kept(run):
    def behave(fake, handler, number, body):
        answer(fake, handler, number, body) if number < 3 else time.sleep(30)

    with Fake(behave) as fake:
        words = [sys.executable, "-m", "refusal_mi", "complete", "--run", str(run), "--endpoint", fake.url]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        part = run / "served/served-harmful.part"
        while not (part.is_file() and len(part.read_text().splitlines()) > 2) and process.poll() is None:
            time.sleep(0.02)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said and time.monotonic() - start < 15
    assert len(part.read_text().splitlines()) == 3
    assert REFUSAL not in said
