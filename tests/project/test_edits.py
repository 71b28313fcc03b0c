"""The edits of benchmarks/edits: what each keeps of a matrix, what each leaves along r, and that it ends."""

import pytest
import torch

from benchmarks.edits import (
    EDITS,
    Vectors,
    columns_kept,
    edited,
    orthogonal,
    rows_kept,
    rows_kept_then_orthogonal,
    tilted,
    without,
    writers_of,
)
from refusal_mi.interventions import Ablate
from refusal_mi.measures import next_token_logits
from refusal_mi.text.chat import ChatFormat
from tests.helpers.naive import ASKS


@pytest.fixture
def matrix():
    """Rows of very different lengths, and a unit vector."""
    drawn = torch.Generator().manual_seed(0)
    scales = torch.linspace(-2, 2, 12).exp()[:, None]
    r = torch.randn(12, generator=drawn, dtype=torch.float64)
    return torch.randn(12, 20, generator=drawn, dtype=torch.float64) * scales, r / r.norm()


def left(r, before, after):
    return ((r @ after).norm() / (r @ before).norm()).item()


def test_what_each_edit_keeps_and_leaves(matrix):
    w, r = matrix
    found = {name: edit(w, r) for name, edit in EDITS.items()}
    rows, columns = w.norm(dim=1), w.norm(dim=0)
    plain, by_row, again, by_column = found.values()
    assert torch.allclose(by_row.norm(dim=1), rows) and torch.allclose(by_column.norm(dim=0), columns)
    assert left(r, w, by_row) > 0.05, "rescaled rows have the direction again"
    assert max(left(r, w, each) for each in (plain, again, by_column)) < 1e-12
    for each in (plain, again):
        assert not torch.allclose(each.norm(dim=0), columns) and not torch.allclose(each.norm(dim=1), rows)
    assert not torch.allclose(by_column.norm(dim=1), rows)
    assert torch.allclose(orthogonal(plain, r), plain), "once is enough"


def test_rows_of_one_length_keep_nothing_of_the_direction_but_what_rescaling_brings(matrix):
    w, r = matrix
    even, dense = torch.nn.functional.normalize(w, dim=1), torch.full_like(r, len(r) ** -0.5)
    single = torch.eye(len(r), dtype=r.dtype)[0]
    assert left(dense, even, rows_kept(even, dense)) < left(dense, w, rows_kept(w, dense))
    assert (columns_kept(w, single)[0] == 0).all() and (rows_kept_then_orthogonal(w, single)[0].abs() < 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_half_comes_back_where_the_longest_row_is_seven_times_the_shortest(seed):
    """The number of docs/export.md; with rows of one length, the control, it is a few percent."""
    drawn = torch.Generator().manual_seed(seed)
    r = torch.nn.functional.normalize(torch.randn(192, generator=drawn, dtype=torch.float64), dim=0)
    rows, scales = torch.randn(192, 400, generator=drawn, dtype=torch.float64), torch.linspace(-1, 1, 192).exp()
    w = rows * scales[:, None]
    assert 0.4 < left(r, w, rows_kept(w, r)) < 0.6
    even = torch.nn.functional.normalize(rows, dim=1)
    assert left(r, even, rows_kept(even, r)) < 0.05


def test_biprojected_is_orthogonal_to_both_means_even_where_they_are_one(matrix):
    w, r = matrix
    means = w.T[:2]
    assert (means @ without(r, means)).abs().max() < 1e-10 < (means @ r).abs().max()
    assert torch.allclose(without(r, means[[0, 0]]), r - means[0] * (means[0] @ r) / means[0].square().sum())
    turned = tilted(r, means[0] / means[0].norm(), 0.7)
    assert turned.norm().item() == pytest.approx(1) and (turned @ r).item() == pytest.approx(0.7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_edited_as_the_hooks_do_it_and_then_is_what_it_was(tiny_model, family):
    model = tiny_model(family)
    chat, r = ChatFormat(model.tokenizer), torch.eye(model.cfg.d_model, dtype=torch.float64)[3]
    before = next_token_logits(model, chat, ASKS[:3])
    embedding = Ablate(r, components=("embed",))
    with edited(model, orthogonal, Vectors("", {-1: r})) as matrices:
        by_weights = next_token_logits(model, chat, ASKS[:3], interventions=embedding)
        assert len(matrices) == 2 * model.cfg.n_layers
    assert (by_weights - next_token_logits(model, chat, ASKS[:3], interventions=Ablate(r))).abs().max() < 1e-4
    assert (by_weights - next_token_logits(model, chat, ASKS[:3], interventions=embedding)).abs().max() > 1e-3
    assert torch.equal(next_token_logits(model, chat, ASKS[:3]), before)
    with pytest.raises(RuntimeError, match="stop"), edited(model, rows_kept, Vectors("", {-1: r})):
        raise RuntimeError("stop")
    assert torch.equal(next_token_logits(model, chat, ASKS[:3]), before)


def test_matrices_behind_a_norm_are_refused(tiny_model):
    with pytest.raises(SystemExit, match="matrices that write into the stream by themselves"):
        writers_of(tiny_model("gemma2"))
