"""Left padding and batching."""

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.text.batches import TokenBatch, batches_by_length, left_pad


def test_left_pad_keeps_every_row_at_the_right_edge():
    rows = [[5, 6, 7], [8], [9, 9]]
    batch = left_pad(rows, pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 9]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert [batch.tokens[i][batch.mask[i].bool()].tolist() for i in range(3)] == rows


def test_positions_count_from_each_rows_first_real_token():
    batch = left_pad([[5, 6, 7], [8]], pad_id=0)
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_pad_id_inside_a_row_is_not_masked():
    assert left_pad([[0, 1, 0], [2]], pad_id=0).mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_left_pad_refuses_nothing_to_pad(rows):
    with pytest.raises(ValueError, match="at least one row"):
        left_pad(rows, 0)


def test_batches_hold_every_row_once_longest_first():
    rows = [[0] * n for n in (3, 9, 1, 7, 7, 2)]
    batches = batches_by_length(rows, 4)
    assert [len(batch) for batch in batches] == [4, 2]
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(6))
    assert [len(rows[index]) for index in order] == [9, 7, 7, 3, 2, 1]


def test_batch_size_zero_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        batches_by_length([[1]], 0)


def test_shapes_are_checked_in_the_test_run():
    """The runtime checker is on: a mask of one dimension is not a batch."""
    with pytest.raises(Exception, match="mask"):
        TokenBatch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def test_batches_hold_at_most_so_many_tokens_and_a_longer_row_is_alone():
    rows = [[0] * n for n in (3, 9, 4, 5, 20, 2)]
    batches = batches_by_length(rows, 3, most_tokens=10)
    assert batches == [[4], [1], [3, 2], [0, 5]]
    assert batches_by_length(rows, 3) == [[4, 1, 3], [2, 0, 5]]
