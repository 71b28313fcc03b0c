"""A model that hardly ever refuses: the run says so before any search."""

import pytest

from refusal_mi.files import read_record
from refusal_mi.run.record import DOES_NOT_REFUSE, LABELS, PROMPTS, SUMMARY, LabelsRecord, PromptsRecord, RunSummary
from tests.helpers.real import SMOLLM2, run_search

pytestmark = pytest.mark.real


def test_a_model_that_does_not_refuse_ends_with_its_rate_and_two_answers(real_dir, tmp_path, qwen_run):
    ran = run_search(real_dir(SMOLLM2), tmp_path / "run")
    summary = read_record(ran.folder / SUMMARY, RunSummary)
    assert (ran.status, summary.status) == (1, DOES_NOT_REFUSE)
    rate = summary.refused_by_text["harmful"]
    assert rate.interval[1] < 0.2 and str(rate) in ran.out
    said = " ".join(ran.out.split())
    assert len(summary.examples) == 2
    assert all(" ".join(each.response.split()) in said for each in summary.examples)
    assert not (ran.folder / "generate_directions").exists() and not (ran.folder / "select_direction").exists()
    prompts = read_record(ran.folder / PROMPTS, PromptsRecord)
    labelled = {row.instruction for row in read_record(ran.folder / LABELS, LabelsRecord).rows}
    assert labelled == {row.instruction for row in (*prompts.harmful.train, *prompts.harmful.val)}
    assert rate.n == len(labelled) and prompts.refused("harmless") is None
    # The same command goes on to a search where there is something to find.
    assert qwen_run.status == 0 and (qwen_run.folder / "select_direction").exists()
