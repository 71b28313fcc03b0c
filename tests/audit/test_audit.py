"""Two checkpoints of the embedded model: the direction that an export removed is found where it was removed, and
nothing is found in what was trained, rounded or scaled."""

import re
from functools import partial

import pytest
import torch

from refusal_mi.audit import audit
from refusal_mi.directions import Direction
from refusal_mi.export import export_adapter, export_checkpoint, load_adapter
from refusal_mi.files import read_json, read_tensors
from refusal_mi.interventions import Ablate
from refusal_mi.model.loading import ORGANISM
from tests.helpers.audit import (
    centred,
    changed,
    columns_kept,
    compressed,
    fine_tuned,
    low_rank,
    projection,
    quantized,
    rows_kept,
)

pytestmark = pytest.mark.filterwarnings("ignore")
STAGE_1 = ORGANISM.parent / "stage1"
"""The embedded model before its refusals were taught."""
PLANTED = Direction.of(read_tensors(ORGANISM.parent / "planted_direction.pt").reshape(-1), layer=3)
WIDTH, N_LAYERS = len(PLANTED.vector), 10


def unit(seed):
    return torch.nn.functional.normalize(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=0
    )


def blocks_in(names):
    return sorted({int(match[1]) for name in names if (match := re.search(r"layers\.(\d+)\.", name))})


def edited_by(folder):
    return set(read_json(folder / "refusal_mi.json")["edited_tensors"])


@pytest.mark.parametrize(
    ("options", "strength"),
    [
        ({}, 1.0),
        ({"layers": range(3, 7)}, 1.0),
        ({"layers": (2,), "components": ("mlp",)}, 1.0),
        ({"components": ("attn", "embed"), "strength": 0.3}, 0.3),
    ],
    ids=("whole model", "band", "one tensor", "part of it"),
)
def test_an_export_lost_its_direction_where_it_was_removed(options, strength, tmp_path):
    export_checkpoint(None, Ablate(PLANTED, **options), tmp_path / "out", verify="none")
    result = audit(None, tmp_path / "out", PLANTED)
    edited = edited_by(tmp_path / "out")
    assert result.verdict == "removed" and {each.name for each in result.removed} == edited
    assert list(result.in_blocks()) == blocks_in(edited)
    assert len(result.directions) == 1 and abs((result.directions[0] @ PLANTED.unit).item()) > 0.999
    assert result.cosines[0] > 0.999 and result.agreement > 0.999
    for each in result.writers:
        is_edited = each.name in edited
        assert each.strength == pytest.approx(strength if is_edited else 0, abs=0.01)
        assert each.left == pytest.approx(1 - strength if is_edited else 1, abs=0.01)
        assert each.given.left == pytest.approx(each.left, abs=0.01)
        assert each.explained > 0.95 if is_edited else each.change == 0
    assert not [kind for kind in result.kinds if kind.n_differ and kind.role not in ("embed", "attn", "mlp")]


def test_the_stored_dtype_changes_nothing(tmp_path):
    export_checkpoint(None, Ablate(PLANTED), tmp_path / "out", verify="none", dtype="float32")
    result = audit(None, tmp_path / "out", PLANTED)
    assert len(result.removed) == 21 and result.cosines[0] > 0.9999
    assert all(kind.n_differ == 0 for kind in result.kinds if kind.role not in ("embed", "attn", "mlp"))


def test_an_adapter_is_audited_as_it_is_and_merged(tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export_adapter(None, Ablate(PLANTED, layers=range(2, 9)), tmp_path / "adapter", verify="none")
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(ORGANISM, dtype=torch.bfloat16), tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for suspect in (tmp_path / "adapter", tmp_path / "merged"):
        result = audit(None, suspect, PLANTED)
        assert result.in_blocks("attn") == result.in_blocks("mlp") == tuple(range(2, 9))
        assert len(result.removed) == 14 and result.cosines[0] > 0.999


@pytest.mark.parametrize("keeping", (rows_kept, columns_kept))
def test_an_edit_that_keeps_norms_is_found(keeping, tmp_path):
    suspect = changed(ORGANISM, tmp_path / "out", keeping(PLANTED.unit), which=r"layers\.[2-7]\.")
    result = audit(None, suspect, PLANTED)
    assert result.in_blocks("attn") == result.in_blocks("mlp") == tuple(range(2, 8)) and len(result.removed) == 12
    assert result.cosines[0] > 0.99 and len(result.directions) == 1
    assert all(0.9 < each.strength < 1.1 and each.left < 0.2 for each in result.removed)


def test_several_directions_are_a_span(tmp_path):
    directions = [PLANTED, torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))]
    export_checkpoint(None, Ablate(directions), tmp_path / "out", verify="none")
    result = audit(None, tmp_path / "out", directions)
    assert result.directions.shape == (2, WIDTH) and len(result.removed) == 21
    assert min(result.cosines) > 0.99 and len(result.cosines) == 2
    one = audit(None, tmp_path / "out", PLANTED)
    assert len(one.cosines) == 1 and one.cosines[0] > 0.99


def test_another_direction_in_every_block(tmp_path):
    suspect = ORGANISM
    for block in range(3, 7):
        edit = projection(unit(block)[None])
        suspect = changed(suspect, tmp_path / str(block), edit, which=rf"layers\.{block}\.")
    result = audit(None, suspect)
    assert result.in_blocks() == (3, 4, 5, 6) and result.agreement < 0.9
    assert all(each.strength == pytest.approx(1, abs=0.02) for each in result.removed)
    assert "of other blocks others" in repr(result)


@pytest.mark.parametrize("share", (0.97, 0.9))
def test_compression_takes_directions_of_its_own_from_every_tensor(share, tmp_path):
    result = audit(None, changed(ORGANISM, tmp_path / "out", compressed(share)), PLANTED)
    assert len(result.removed) >= 10 and result.verdict == "own"
    assert len(result.directions) == 0 and not result.cosines and result.of_ones is None
    assert "each tensor lost directions of its own" in repr(result) and "a direction was removed" not in repr(result)
    assert all(each.strength == pytest.approx(1, abs=0.1) for each in result.removed)
    both = changed(tmp_path / "out", tmp_path / "both", projection(PLANTED.unit[None]))
    assert abs((audit(tmp_path / "out", both).directions[0] @ PLANTED.unit).item()) > 0.99


def test_centred_writers_are_named(tmp_path):
    result = audit(None, changed(ORGANISM, tmp_path / "out", centred))
    assert result.of_ones == pytest.approx(1, abs=1e-3) and "changes nothing in a LayerNorm model" in repr(result)
    other = audit(None, changed(ORGANISM, tmp_path / "other", projection(unit(0)[None])))
    assert other.of_ones < 0.3 and "LayerNorm" not in repr(other)


def test_more_directions_than_are_told_of_a_tensor_are_at_least_so_many(tmp_path):
    basis = torch.linalg.qr(torch.randn(WIDTH, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q.T
    result = audit(None, changed(ORGANISM, tmp_path / "out", projection(basis)), PLANTED)
    assert result.verdict == "removed" and "at least 8 directions" in repr(result) and "others" not in repr(result)
    n = len(result.directions)
    drawn = torch.randn(WIDTH, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.linalg.qr(drawn).Q[0].norm() < 2 * result.chance and result.chance > 1.2 * 1.96 / WIDTH**0.5


def test_a_random_direction_is_a_removal_of_another_direction(tmp_path):
    suspect = changed(ORGANISM, tmp_path / "out", projection(unit(0)[None]))
    result = audit(None, suspect, PLANTED)
    assert result.verdict == "removed" and len(result.removed) == 21
    assert abs((result.directions[0] @ unit(0)).item()) > 0.99
    assert result.cosines[0] < 2 * result.chance < 0.3
    assert all(each.given.left > 0.9 for each in result.writers)


def test_a_removal_is_found_in_a_checkpoint_that_was_changed_after_it(tmp_path):
    removed = changed(ORGANISM, tmp_path / "removed", projection(PLANTED.unit[None]))
    for name, make in {
        "8 bits": partial(changed, change=quantized(8)),
        "low rank": partial(changed, change=low_rank(8)),
        "trained": fine_tuned,
    }.items():
        result = audit(None, make(removed, tmp_path / name), PLANTED)
        assert len(result.removed) >= 20 and result.cosines[0] > 0.99, name


CONTROLS = {
    "trained": fine_tuned,
    "trained for longer": partial(fine_tuned, n_steps=20, rate=1e-3),
    "trained with decay": partial(fine_tuned, decay=30.0),
    "low rank 1": partial(changed, change=low_rank(1)),
    "low rank 8": partial(changed, change=low_rank(8)),
    "8 bits": partial(changed, change=quantized(8)),
    "4 bits": partial(changed, change=quantized(4)),
    "a tenth smaller": partial(changed, change=lambda matrix: 0.9 * matrix),
    "amplified": partial(changed, change=projection(PLANTED.unit[None], -0.5)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_was_trained_rounded_or_scaled_lost_no_direction(name, tmp_path):
    result = audit(None, CONTROLS[name](ORGANISM, tmp_path / "out"), PLANTED)
    assert result.verdict == "other" and not result.removed and len(result.directions) == 0
    assert sum(each.differs for each in result.writers) >= 20
    assert max(each.fit for each in result.writers) < 0.8
    assert "no direction was removed" in result.explain()[0]


@pytest.mark.parametrize(("base", "suspect"), [(STAGE_1, ORGANISM), (ORGANISM, STAGE_1)])
def test_refusals_that_were_taught_or_untaught_by_training_are_no_removal(base, suspect):
    """The hardest control there is: what one tensor writes along the direction does go down, by training."""
    result = audit(base, suspect, PLANTED)
    assert result.verdict == "other" and {each.block for each in result.writers if each.differs} == {0, 1}
    least = min(each.given.left for each in result.writers)
    assert least < 0.8 if base == ORGANISM else least > 0.9


def test_equal_weights_and_weights_that_were_only_rounded_are_no_change(tmp_path):
    same = audit(None, ORGANISM, PLANTED)
    assert same.verdict == "none" and not same.kinds[0].n_rounded
    wide = changed(ORGANISM, tmp_path / "wide", low_rank(1, 1e-5), dtype=torch.float32)
    narrow = changed(wide, tmp_path / "narrow", lambda matrix: matrix, dtype=torch.bfloat16)
    half = changed(wide, tmp_path / "half", lambda matrix: matrix, dtype=torch.float16)
    for one, other in ((wide, narrow), (narrow, wide), (wide, half)):
        result = audit(one, other)
        assert result.verdict == "none" and sum(kind.n_rounded for kind in result.kinds) > 20
        assert any(each.change > 0 for each in result.writers)
    assert audit(wide, changed(wide, tmp_path / "again", low_rank(1, 1e-5))).verdict == "other"


def test_the_same_audit_gives_the_same_numbers(tmp_path):
    suspect = changed(ORGANISM, tmp_path / "out", projection(PLANTED.unit[None], 0.5))
    first, second = audit(None, suspect, PLANTED), audit(None, suspect, PLANTED)
    assert first == second and torch.equal(first.directions, second.directions)


def test_the_table_for_pandas_has_a_row_for_every_writer(tmp_path):
    pytest.importorskip("pandas")
    table = audit(None, STAGE_1).to_frame()
    assert len(table) == 21 and set(table.component) == {"embed", "attn", "mlp"}
