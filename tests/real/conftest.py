"""Real chat models, and one run that the tests share. `REFUSAL_MI_REAL_MODELS` names the folder of the models."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.real import QWEN, Ran, run_search


@pytest.fixture(scope="session", autouse=True)
def all_cores() -> Iterator[None]:
    """Nothing else runs beside these tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_dir() -> Callable[[str], Path]:
    """`real_dir(name)`: the folder of a model."""
    return lambda name: Path(os.environ["REFUSAL_MI_REAL_MODELS"]) / name


@pytest.fixture(scope="session")
def qwen_run(real_dir, tmp_path_factory) -> Ran:
    """The run of the model that refuses about half of harmful prompts."""
    return run_search(real_dir(QWEN), tmp_path_factory.mktemp("run") / "qwen")


@pytest.fixture(scope="session")
def qwen(real_dir):
    from refusal_mi.model.loading import load_model

    return load_model(real_dir(QWEN), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def plain_qwen(real_dir):
    """The same weights in plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(real_dir(QWEN), dtype=torch.float32, attn_implementation="eager").eval()
