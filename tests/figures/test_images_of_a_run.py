"""`run --images`: the published score plots as PNG and PDF beside their HTML, or one line before any work."""

import struct

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.loaded import load_run
from tests.helpers.browser import find_chromium

WORDS = [
    *("--n-train=6", "--n-val=3", "--n-test=3", "--no-filter", "--refusal-tokens=5,40", "--no-thresholds"),
    *("--steps=directions,selection", "--quick"),
]


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no chromium on PATH")
def test_score_plots_are_drawn_beside_their_pages(tiny_dir, tmp_path):
    out = tmp_path / "run"
    assert exit_status(["run", str(tiny_dir("llama")), *WORDS, "--images", f"--output-dir={out}"]) == 0
    for stem in ("ablation_scores", "actadd_scores", "kl_div_scores"):
        page, png, pdf = (out / "select_direction" / f"{stem}.{kind}" for kind in ("html", "png", "pdf"))
        assert page.is_file() and pdf.read_bytes().startswith(b"%PDF")
        data = png.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width == 2400 and 400 < height < 2400
    before = (out / "select_direction/kl_div_scores.png").read_bytes()
    assert exit_status(["run", str(tiny_dir("llama")), *WORDS, f"--output-dir={out}"]) == 0
    assert (out / "select_direction/kl_div_scores.png").read_bytes() == before, "a run without it leaves them"


@pytest.mark.slow
def test_a_run_without_scores_draws_none_and_ends_well(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", lambda *_, **__: b"an image")
    for steps, n_drawn in (("directions", 0), ("directions,selection", 6)):
        words = [*WORDS[:-2], "--quick", f"--steps={steps}", f"--output-dir={tmp_path / steps}"]
        assert exit_status(["run", str(tiny_dir("llama")), *words, "--images"]) == 0
        assert len([*tmp_path.glob(f"{steps}/select_direction/*.p[nd][gf]")]) == n_drawn
        figures = load_run(tmp_path / steps).figures
        assert ("kl" in figures) is bool(n_drawn) and "no such figure" not in figures


def test_without_a_browser_it_says_so_before_any_work(tiny_dir, tmp_path, monkeypatch, capsys):
    def no_browser(*_, **__):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", no_browser)
    out = tmp_path / "run"
    assert exit_status(["run", str(tiny_dir("llama")), *WORDS, "--images", f"--output-dir={out}"]) == 2
    assert "Chromium on PATH" in capsys.readouterr().err and not (out / "run.json").exists()
