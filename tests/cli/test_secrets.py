"""Tokens and keys that lie in the environment through a whole run reach no file and no stream."""

import json
import os
import subprocess
import sys

from tests.helpers.judge import KEY, LONG, Fake, send

TOKEN = "hf_planted0123456789abcdefghijklmnop"


def test_a_whole_run_keeps_them_to_itself(tiny_dir, tmp_path):
    """With an endpoint that sends the key back in every answer, which is printed where it is no verdict."""

    def echo(fake, handler, number, body):
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        send(handler, f"unsafe\n{'S2 ' * 20}{key}" if number % 2 else f"{key} {key}")

    sides = {side: [f"{side} {n}" for n in range(24)] for side in ("harmful", "harmless")}
    for side, texts in sides.items():
        (tmp_path / f"{side}.json").write_text(json.dumps(texts))
    secrets = {name: TOKEN for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TOGETHER_API_KEY")}
    environment = os.environ | secrets | {"REFUSAL_MI_JUDGE_KEY": KEY, "REFUSAL_MI_CACHE": str(tmp_path / "cache")}
    sizes = ["--n-train=6", "--n-val=4", "--n-test=3", "--n-ce=4", "--max-new-tokens=16", "--kl-max=inf"]
    sizes += ["--induce-min=-inf", "--no-filter", "--refusal-tokens=40", f"--output-dir={tmp_path / 'run'}"]
    sets = [f"--{side}={tmp_path / side}.json" for side in sides]
    answers = [{"prompt": f"p{n}", "response": f"{LONG} {n}", "category": None} for n in range(2)]
    (tmp_path / "x_completions.json").write_text(json.dumps(answers))
    shown = ""
    with Fake(echo) as fake:
        commands = (
            ["run", str(tiny_dir("llama")), *sets, *sizes, "--judge", fake.url],
            ["judge", str(tmp_path / "x_completions.json"), "--judge", fake.url, "--debug"],
            ["run", "owner/name", "--debug"],
        )
        for words in commands:
            done = subprocess.run(
                [sys.executable, "-m", "refusal_mi", *words],
                env=environment | {"HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            shown += done.stdout + done.stderr
        assert fake.seen
    assert "report: " in shown and "Traceback" in shown and KEY not in shown and TOKEN not in shown
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and any(b"[key]" in content for content in written)  # it did come back, and was hidden
    assert not [content for content in written if KEY.encode() in content or TOKEN.encode() in content]
