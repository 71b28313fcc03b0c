"""The figure of labels: every prompt once, in the row of its group and outcome, and both zeros."""

import pytest

from refusal_mi.figures.labels import plot_label_scores

SCORES = {"harmful": [0.5, -0.7, -2.0], "harmless": [-3.0, -0.9]}
REFUSED = {"harmful": [True, True, False], "harmless": [False, True]}


def points(figure):
    return {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data if trace.mode == "markers"}


def test_every_prompt_stands_in_the_row_of_its_outcome():
    figure = plot_label_scores(SCORES, REFUSED, zero_point=-0.8, model="a<b")
    found = points(figure)
    assert {name: x for name, (x, _) in found.items()} == {
        "harmful, refused": [-0.7, 0.5],
        "harmful, answered": [-2.0],
        "harmless, refused": [-0.9],
        "harmless, answered": [-3.0],
    }
    for row, (_, heights) in enumerate(found.values()):
        assert all(abs(height - row) < 0.5 for height in heights)
    assert figure.layout.yaxis.ticktext[0] == "harmful, refused<br>n = 2"
    assert "nats" in figure.layout.xaxis.title.text and "a&lt;b" in figure.layout.title.subtitle.text


@pytest.mark.parametrize(("zero", "expected"), [(-0.8, [0.0, -0.8]), (0.0, [0.0])])
def test_the_zeros_are_marked(zero, expected):
    figure = plot_label_scores(SCORES, REFUSED, zero_point=zero)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [trace.x[0] for trace in lines] == expected and all(trace.x[0] == trace.x[1] for trace in lines)


def test_a_label_is_needed_for_every_score():
    with pytest.raises(ValueError, match="shorter"):
        plot_label_scores(SCORES, {**REFUSED, "harmless": [True]})
