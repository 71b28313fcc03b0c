"""Vectors from other projects: read, compared, brought to one norm."""

import json
from pathlib import Path

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import load_direction
from refusal_mi.errors import UserError
from refusal_mi.model.points import layer_of_hook
from refusal_mi.vectors import LabelledVectors, compare, normalize_across, read_vectors

ROOT_HALF = 2**-0.5


def _save(path, value):
    torch.save(value, path)
    return path


def test_cosines_worked_out_by_hand(tmp_path):
    files = [
        _save(tmp_path / "a.pt", torch.tensor([[2.0, 0.0]]).half()),
        _save(tmp_path / "b.pt", torch.tensor([3.0, 3.0], dtype=torch.float64)),
        _save(tmp_path / "c.pt", torch.tensor([[0.0, -1.0], [0.0, 0.0]])),
    ]
    found = compare([read_vectors(file) for file in files])
    assert found.labels == ("a", "b", "c[0]", "c[1]")
    expected = torch.tensor([[1, ROOT_HALF, 0], [ROOT_HALF, 1, -ROOT_HALF], [0, -ROOT_HALF, 1]], dtype=torch.float64)
    assert torch.allclose(found.cosines[:3, :3], expected, atol=1e-12)
    assert found.norms.tolist() == pytest.approx([2, 18**0.5, 1, 0])
    assert found.describe()["cosines"][3] == [None] * 4
    json.dumps(found.describe(), allow_nan=False)


def test_a_list_of_directions_is_a_stack(tmp_path):
    path = _save(tmp_path / "directions.pt", [torch.ones(4), torch.zeros(4) + 2])
    assert read_vectors(path).rows.tolist() == [[1.0] * 4, [2.0] * 4]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(0), r"shape \[0\]"),
        (torch.tensor(1.0), r"shape \[\]"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        ({"a": {}}, "dict"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, "choose one with the layer"),
        ([torch.zeros(3), torch.zeros(4)], "different shapes"),
    ],
)
def test_what_is_no_vector_is_refused(tmp_path, value, problem):
    with pytest.raises(UserError, match=problem):
        read_vectors(_save(tmp_path / "x.pt", value))


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save(Trap(), tmp_path / "x.pt")
    with pytest.raises(UserError, match="plain tensors"):
        read_vectors(tmp_path / "x.pt")


def test_widths_and_counts(tmp_path):
    narrow, wide = LabelledVectors("n", torch.ones(1, 3).double()), LabelledVectors("w", torch.ones(1, 4).double())
    with pytest.raises(UserError, match="n has 3, w has 4"):
        compare([narrow, wide])
    with pytest.raises(UserError, match="at least two"):
        compare([narrow])


def test_the_shared_norm_is_the_mean_norm_row_by_row():
    a = LabelledVectors("a", torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64))
    b = LabelledVectors("b", torch.tensor([[0.0, 1.0], [0.0, 3.0]], dtype=torch.float64))
    first, second = normalize_across([a, b])
    assert torch.allclose(first.rows, torch.tensor([[1.8, 2.4], [2.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(second.rows, torch.tensor([[0.0, 3.0], [0.0, 2.0]], dtype=torch.float64))
    with pytest.raises(UserError, match="one shape"):
        normalize_across([a, LabelledVectors("c", b.rows[:1])])
    with pytest.raises(UserError, match="length 0"):
        normalize_across([a, LabelledVectors("c", 0 * b.rows)])


def test_hook_names_say_the_layer():
    assert layer_of_hook("blocks.13.hook_resid_post") == layer_of_hook("blocks.14.hook_resid_pre") == 14
    for bad in ("13", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "xblocks.1.hook_resid_pre"):
        with pytest.raises(UserError, match="not a point between blocks"):
            layer_of_hook(bad)


def test_the_published_vector(reference_data, tmp_path, capsys):
    path = reference_data / "caa/steering_vector_llama2_7b_layer13.pt"
    assert read_vectors(path).rows.shape == (1, 4096)
    with pytest.raises(UserError, match="say with --layer"):
        load_direction(path, 32)
    direction = load_direction(path, 32, 14)
    assert direction.layer == 14 and direction.vector.dtype == torch.float32
    mine = read_vectors(path).rows[0].float() * 1.7
    torch.save(mine, tmp_path / "mine.pt")
    assert exit_status(["compare", str(path), str(tmp_path / "mine.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cosines"][0][1] == pytest.approx(1.0)


def test_the_command(tmp_path, capsys):
    files = [str(_save(tmp_path / f"{name}.pt", torch.randn(9, 4))) for name in "ab"]
    assert exit_status(["compare", *files]) == 0
    assert "cosine of every layer with a" in capsys.readouterr().out
    assert exit_status(["compare", *files, "--normalize-across"]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert exit_status(["compare", *files, "--normalize-across", "--output-dir", str(tmp_path / "out")]) == 0
    norms = [torch.load(tmp_path / f"out/{name}.pt", weights_only=True).norm(dim=-1) for name in "ab"]
    assert torch.allclose(*norms)
    assert exit_status(["compare", files[0], str(tmp_path / "none.pt")]) == 2


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_shortened_however_many_files_and_layers_there_are(tmp_path, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["first", *(f"vectors_of_another_model_with_a_long_name_{n}" for n in range(6))]
    files = [str(_save(tmp_path / f"{name}.pt", torch.randn(9, 4))) for name in names]
    for given, n_rows in ((files, 9), ([*files[:1], files[1]], 9)):
        assert exit_status(["compare", *given, "--json"]) == 0
        cosines = torch.tensor(json.loads(capsys.readouterr().out)["cosines"])
        assert exit_status(["compare", *given]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines()[1:])) <= width
        cells = [line.strip("│").split("│") for line in shown.splitlines() if line.startswith("│")]
        found = {layer: [] for layer in range(n_rows)}
        for label, *row in cells:
            found[int(label)] += map(str.strip, row)
        for layer, row in found.items():
            expected = [cosines[layer, 9 * other + layer].item() for other in range(1, len(given))]
            assert row == [f"{value:.4f}" for value in expected]


def test_a_stack_of_fewer_layers_has_no_numbers_where_it_has_no_layer(tmp_path, capsys):
    a, b, c = (_save(tmp_path / f"{name}.pt", torch.randn(n, 4)) for name, n in (("a", 9), ("b", 7), ("c", 1)))
    assert exit_status(["compare", str(a), str(b), str(c)]) == 0
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [bool(row[1].strip()) for row in rows] == [True] * 7 + [False] * 2
    assert all(row[2].strip() for row in rows)  # one vector is compared with every layer


def test_a_run_folder_stands_for_its_vector(tmp_path, capsys):
    vectors = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        vectors[name] = torch.randn(4)
        _save(tmp_path / name / "direction.pt", vectors[name])
    (tmp_path / "c").mkdir()
    _save(tmp_path / "c" / "refusal_vector.pt", torch.stack([vectors["a"], vectors["b"]]))
    folders = [str(tmp_path / name) for name in "abc"]
    assert exit_status(["compare", *folders, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] == ["a", "b", "c[0]", "c[1]"] and found["cosines"][0][2] == pytest.approx(1)
    assert exit_status(["compare", folders[0], folders[2], "--normalize-across", "--output-dir", "out"]) == 2
    files = [str(tmp_path / name / "direction.pt") for name in "ab"]
    capsys.readouterr()
    assert exit_status(["compare", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["a/direction", "b/direction"]
    (tmp_path / "empty").mkdir()
    assert exit_status(["compare", folders[0], str(tmp_path / "empty")]) == 2
    assert "empty holds neither direction.pt nor refusal_vector.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("places", "labels"),
    [
        (["runs/m-v0.2", "runs/m-v0.3"], ["m-v0.2", "m-v0.3"]),
        (["a/x/direction.pt", "b/x/direction.pt"], ["a/x/direction", "b/x/direction"]),
        (["a/v.pt", "a/v.bin"], ["v.pt", "v.bin"]),
        (["a/v.pt", "a/v.pt"], ["v", "v"]),  # one file twice has one name, and two rows
        (["a/v.pt", "b/w.pt"], ["v", "w"]),
    ],
)
def test_every_vector_has_a_row_and_different_ones_have_different_names(tmp_path, monkeypatch, capsys, places, labels):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for place in map(Path, places):
        file = place if place.suffix in (".pt", ".bin") else place / "direction.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        _save(file, torch.randn(4))
    assert exit_status(["compare", *places, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == labels
    assert exit_status(["compare", *places]) == 0
    shown = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in shown] == labels
