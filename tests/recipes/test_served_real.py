"""The commands of docs/serving.md, against `transformers serve` on the exported embedded model."""

import json
import shlex
from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.files import read_json, read_record
from refusal_mi.generation import generate
from refusal_mi.loaded import load_run
from refusal_mi.model.loading import ORGANISM, load_model, load_tokenizer
from refusal_mi.recipes.served import complete
from refusal_mi.recipes.server import Server
from refusal_mi.run.served import ServedRecord
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from tests.helpers.pages import ROOT
from tests.helpers.transformers_serve import MISSING, WHY, free_port, transformers_serve

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=WHY)]

N, TOKENS = 20, 16
SMALL = [f"--n-test={N}", f"--max-new-tokens={TOKENS}", "--n-train=16", "--n-val=8", "--n-random=0", "--device=cpu"]
SMALL += ["--steps=directions,selection,completions"]


def commands() -> list[list[str]]:
    """The words of every command that the page says to run, in its order."""
    blocks = (ROOT / "docs/serving.md").read_text("utf-8").split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.partition("```")[0].splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def responses(folder: Path, side: str, label: str) -> dict[str, str]:
    rows = read_json(folder / f"completions/{side}_{label}_completions.json")
    return {row["prompt"]: row["response"] for row in rows}


def test_the_page_from_run_to_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REFUSAL_MI_SERVER_KEY", raising=False)
    install, run, export, serve, ask, judge = commands()
    assert install == ["pip", "install", "refusal_mi[serving]"] and serve[:3] == ["transformers", "serve", "edited"]
    assert exit_status([*run[1:], *SMALL]) == 0 and exit_status(export[1:]) == 0
    folder, port = tmp_path / "runs/organism", free_port()
    assert "8000" in serve and "http://localhost:8000/v1" in ask  # a free port instead
    serve, ask = ([word.replace("8000", str(port)) for word in words] for words in (serve, ask))
    with transformers_serve(serve[1:], tmp_path, port) as address:
        assert exit_status(ask[1:]) == 0
        shown = capsys.readouterr()
        rendered = complete(
            RunFolder(folder),
            Server(address, "edited", "completions"),
            label="rendered",
            chat=ChatFormat(load_tokenizer(str(ORGANISM))),
        )
        assert exit_status([*ask[1:], "--model-name", "other", "--label", "x"]) == 2
        assert "(HTTP status 400: Server is pinned to 'edited'; requested 'other'.)" in capsys.readouterr().err
    assert exit_status([*ask[1:], "--timeout=2", "--label", "x"]) == 2  # the server has ended
    assert "no server answers at" in capsys.readouterr().err
    assert f"of {N}: baseline" in shown.out and "report: " in shown.out

    edited = load_model("edited", device="cpu")
    record = read_record(folder / "served/served.json", ServedRecord)
    for side in ("harmful", "harmless"):
        served = responses(folder, side, "served")
        local = generate(edited, ChatFormat(edited.tokenizer), list(served), max_new_tokens=TOKENS, batch_size=1)
        assert list(served.values()) == [answer.text for answer in local] and len(served) == N
        assert served == responses(folder, side, "rendered") == responses(folder, side, "ablation")
        rows = read_json(folder / f"completions/{side}_served_completions.json")
        assert [row["finish_reason"] == "stop" for row in rows] == [answer.is_finished for answer in local]
        assert record.sets[side].same_text["ablation"] == rendered.sets[side].same_text["ablation"] == N
    assert record.sets["harmful"].same_text["baseline"] < N / 2  # the control: the plain model refuses

    effects = load_run(folder).rates["harmful"]
    assert effects.find("served").refusal == effects.find("ablation").refusal != effects.find("baseline").refusal
    assert exit_status(judge[1:]) == 0
    agreement = json.loads((folder / "judged/agreement.json").read_text())
    assert agreement["judges"] == ["substring_matching", "evade"]
    assert (folder / "judged/harmful_served_evaluations.json").is_file()
    text = next(text for text in responses(folder, "harmless", "served").values() if len(text) > 20)
    assert text[:20] in (folder / "report.html").read_text("utf-8")
