"""What was found with hooks, as a checkpoint of a real model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusal_mi.export.export import RECORD
from refusal_mi.export.verify import MAX_KL_RATIO, MAX_RELATIVE_DIFFERENCE
from refusal_mi.files import read_json
from refusal_mi.interventions import Ablate
from refusal_mi.measures import next_token_logits
from refusal_mi.run.folder import RunInputs
from tests.helpers.naive import logits, relative_error
from tests.helpers.real import QWEN, command

pytestmark = pytest.mark.real


@pytest.fixture
def export(real_dir, qwen_run, tmp_path):
    """`export(dtype)`: the folder of a checkpoint without the run's direction, and what its verification says."""

    def run(dtype):
        ran = command(
            "export", str(real_dir(QWEN)), "--direction", str(qwen_run.folder), "--dtype", dtype, "--verify", "full",
            folder=tmp_path / dtype,
        )  # fmt: skip
        assert ran.status == 0 and "within the limits" in ran.out
        return ran.folder, read_json(ran.folder / RECORD)["verification"]

    return run


def test_an_export_in_float32_is_the_hooked_model(export, qwen_run, qwen, plain_qwen):
    folder, check = export("float32")
    assert check["rule"] == "float32" and check["passed"] and check["same_greedy"] == 1
    limit = MAX_RELATIVE_DIFFERENCE * check["largest_logit"]
    assert check["max_logit_difference"] <= limit < 0.01 * check["max_effect"]
    run = RunInputs(qwen, qwen_run.folder)
    texts = run.prompts("harmful")[:3]
    hooked = next_token_logits(qwen, run.chat, texts, interventions=[Ablate(run.direction)])
    edited = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    of_edited, of_plain = (
        torch.stack([logits(model, run.chat.encode(text))[-1] for text in texts]) for model in (edited, plain_qwen)
    )
    assert relative_error(of_edited, hooked) < 1e-4 < 1e-2 < relative_error(of_plain, hooked)


def test_an_export_in_bfloat16_is_as_close_as_rounding_allows(export):
    _, check = export("bfloat16")
    assert check["rule"] == "half" and check["passed"]
    assert check["mean_kl_nats"] <= MAX_KL_RATIO * check["hooked_kl_nats"]
