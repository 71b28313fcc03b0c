"""Fixtures: tiny models on disk and loaded, read-only and shared by the whole session."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# A job started in the background ignores interrupts, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_dir(family)`: the directory of a saved tiny model."""
    from tests.helpers.models import save_tiny

    root, made = tmp_path_factory.mktemp("tiny"), {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, root / family)
        return made[family]

    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_dir):
    """`tiny_model(family, dtype)`: a loaded model; tests never change it."""
    from refusal_mi.model.loading import load_model

    made = {}

    def model(family: str, dtype: str = "float32"):
        if (family, dtype) not in made:
            made[family, dtype] = load_model(tiny_dir(family), device="cpu", dtype=dtype)
        return made[family, dtype]

    return model


@pytest.fixture(scope="session")
def plain_model(tiny_dir):
    """`plain_model(family, dtype)`: the same weights as a plain transformers model, without TransformerLens."""
    from transformers import AutoModelForCausalLM

    made = {}

    def model(family: str, dtype: str = "float32"):
        if (family, dtype) not in made:
            found = AutoModelForCausalLM.from_pretrained(
                tiny_dir(family), dtype=getattr(torch, dtype), attn_implementation="eager"
            )
            made[family, dtype] = found.eval()
        return made[family, dtype]

    return model


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of published files that are not part of the repository; tests that need it skip where it is absent.

    The published score grids are: tests/data/published.
    """
    folder = os.environ.get("REFUSAL_MI_REFERENCE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs published files: REFUSAL_MI_REFERENCE_DATA names no folder")
    return Path(folder)


@pytest.fixture
def own_model(tiny_dir):
    """A model that a test may change."""
    from refusal_mi.model.loading import load_model

    return load_model(tiny_dir("llama"), device="cpu")
