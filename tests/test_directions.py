"""Directions and grids: signs, norms, places, files."""

import json

import pytest
import torch

from refusal_mi.directions import ActivationMeans, Direction, DirectionGrid, cosine, difference_in_means
from refusal_mi.errors import UserError
from tests.helpers.directions import direction_of


def means(values: torch.Tensor, n: int = 4) -> ActivationMeans:
    return ActivationMeans(values.double(), tuple(range(-values.shape[0], 0)), n)


@pytest.fixture
def grid() -> DirectionGrid:
    torch.manual_seed(0)
    return difference_in_means(means(torch.randn(2, 3, 8), 5), means(torch.randn(2, 3, 8), 6))


def test_the_direction_points_from_harmless_to_harmful():
    grid = difference_in_means(means(torch.full((1, 2, 4), 3.0)), means(torch.ones(1, 2, 4)))
    assert torch.equal(grid.vectors, torch.full((1, 2, 4), 2.0, dtype=torch.float64))
    assert grid.direction(-1, 1).norm == pytest.approx(4.0)
    assert torch.allclose(grid.direction(-1, 1).unit, torch.full((4,), 0.5, dtype=torch.float64))


def test_rounding_error_is_not_a_direction():
    base = torch.randn(1, 2, 8, dtype=torch.float64)
    other = base.clone()
    other[0, 0] += 1e-9
    other[0, 1] += 1e-3
    grid = difference_in_means(means(other), means(base))
    assert grid.is_degenerate == ((True, False),)
    with pytest.raises(UserError, match="do not differ"):
        grid.direction(-1, 0)


def test_each_candidate_knows_its_place(grid):
    direction = grid.direction(-2, 1)
    assert (direction.position, direction.layer, direction.hook_name) == (-2, 1, "blocks.1.hook_resid_pre")
    assert torch.equal(direction.vector, grid.vectors[0, 1].float())
    assert direction.provenance["n_harmful"] == 5 and direction.provenance["n_harmless"] == 6
    assert grid.candidates() == [(-2, 0), (-2, 1), (-2, 2), (-1, 0), (-1, 1), (-1, 2)]


@pytest.mark.parametrize(("position", "layer"), [(0, 0), (-3, 0), (-1, 3), (-1, -1)])
def test_there_are_no_other_candidates(grid, position, layer):
    with pytest.raises(UserError, match=r"positions are -2..-1, layers 0..2"):
        grid.direction(position, layer)


def test_save_and_load_are_exact_and_small(tmp_path, grid):
    direction = grid.direction(-1, 2)
    direction.save(tmp_path / "direction.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direction.pt", "direction_metadata.json"]
    assert (tmp_path / "direction.pt").stat().st_size < 4096
    loaded = Direction.load(tmp_path / "direction.pt")
    assert torch.equal(loaded.vector, direction.vector) and loaded.describe() == direction.describe()
    metadata = json.loads((tmp_path / "direction_metadata.json").read_text())
    assert (metadata["pos"], metadata["layer"], metadata["hook_name"]) == (-1, 2, "blocks.2.hook_resid_pre")
    assert metadata["norm"] == pytest.approx(direction.vector.norm().item())


def test_files_that_are_not_a_direction_are_refused(tmp_path, grid):
    torch.save(grid.vectors, tmp_path / "grid.pt")
    torch.save(torch.ones(4), tmp_path / "bare.pt")
    torch.save(torch.ones(4), tmp_path / "placeless.pt")
    (tmp_path / "placeless_metadata.json").write_text('{"pos": -1}')
    for name, message in (
        ("grid", "one vector"),
        ("bare", "bare_metadata.json"),
        ("placeless", "which layer"),
        ("none", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            Direction.load(tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="expected a tensor of floats of shape"):
        DirectionGrid.load(tmp_path / "bare.pt")


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 0.0]])
def test_zero_and_unfinite_vectors_are_refused(values):
    with pytest.raises(ValueError, match="direction must"):
        Direction(torch.tensor(values), 0, "blocks.0.hook_resid_pre")


def test_the_random_control_has_the_same_norm_and_place_and_is_seeded(grid):
    direction = grid.direction(-1, 1)
    state = torch.get_rng_state()
    control = direction.random_like(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert control.norm == pytest.approx(direction.norm, rel=1e-6)
    assert (control.layer, control.position, control.vector.dtype) == (1, -1, torch.float32)
    assert torch.equal(control.vector, direction.random_like(0).vector)
    assert abs(cosine(control, direction.random_like(1))) < 0.99


def test_the_unit_is_normalized_in_float64():
    vector = torch.tensor([3e-3, 4e-3], dtype=torch.bfloat16)
    unit = Direction(vector, 0, "blocks.0.hook_resid_pre").unit
    assert unit.dtype == torch.float64 and abs(unit.norm().item() - 1) < 1e-15


def test_cosine_against_numbers_by_hand():
    a, b = (Direction(torch.tensor(values), 0, "blocks.0.hook_resid_pre") for values in ([3.0, 4.0], [4.0, 3.0]))
    assert cosine(a, b) == pytest.approx(24 / 25) and cosine(a, a) == pytest.approx(1)


def test_classes_read_at_different_places_are_refused():
    with pytest.raises(ValueError, match="different positions"):
        difference_in_means(means(torch.ones(1, 2, 4)), means(torch.ones(2, 2, 4)))


@pytest.mark.parametrize(("run", "shape"), [("gemma-2b-it", (5, 18, 2048)), ("qwen-1_8b-chat", (5, 24, 2048))])
def test_published_tensors_load_and_agree(reference_data, run, shape):
    folder = reference_data / "reference_runs" / run
    grid = DirectionGrid.load(folder / "generate_directions" / "mean_diffs.pt")
    assert tuple(grid.vectors.shape) == shape and grid.vectors.dtype == torch.float64
    published = Direction.load(folder / "direction.pt")
    metadata = json.loads((folder / "direction_metadata.json").read_text())
    assert (published.position, published.layer) == (metadata["pos"], metadata["layer"])
    ours = grid.direction(published.position, published.layer)
    assert torch.equal(ours.vector, published.vector.float())
    assert cosine(ours, published) == pytest.approx(1, abs=1e-7)
    assert published.hook_name == ours.hook_name == f"blocks.{metadata['layer']}.hook_resid_pre"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "3"}, "must be whole numbers"),
        ({"layer": True}, "must be whole numbers"),
        ({"layer": -1}, "must be whole numbers"),
        ({"layer": None}, "must be whole numbers"),
        ({"pos": "last"}, "must be whole numbers"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, "contradicts itself"),
        ({"hook_name": 7}, "contradicts itself"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "contradicts itself"),
        ({"hook_name": "attn.hook_z"}, "is no hook point of a block"),
        ({"norm": 1.0}, "names the norm 1.0"),
        ({"norm": "long"}, "names the norm 'long'"),
        ([1, 2], "does not say which layer"),
        ("text", "does not say which layer"),
    ],
)
def test_metadata_that_do_not_hold_are_one_line(changes, message, tmp_path):
    direction_of(torch.ones(4) * 3).save(tmp_path / "d.pt")
    beside = tmp_path / "d_metadata.json"
    assert Direction.load(tmp_path / "d.pt").layer == 2
    known = json.loads(beside.read_text())
    beside.write_text(json.dumps(known | changes if isinstance(changes, dict) else changes))
    with pytest.raises(UserError, match=message) as caught:
        Direction.load(tmp_path / "d.pt")
    assert "\n" not in str(caught.value)
