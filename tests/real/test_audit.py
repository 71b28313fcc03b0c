"""A real checkpoint of half a billion parameters: what was removed, from where, and the memory that telling takes."""

import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from refusal_mi.directions import Direction
from refusal_mi.export import export_adapter, export_checkpoint, load_adapter
from refusal_mi.interventions import Ablate
from tests.helpers.audit import audited_alone, changed, quantized, rows_kept
from tests.helpers.real import QWEN

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
WIDTH, N_BLOCKS, MORE_MIB = 896, 24, 500
"""Of the model; what an audit may need beyond the size of a shard."""
BAND = range(6, 18)
R = Direction.of(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), layer=13)


def whole_model(source, out):
    export_checkpoint(source, Ablate(R), out, verify="none")


def band(source, out):
    export_checkpoint(source, Ablate(R, layers=BAND), out, verify="none")


def merged_adapter(source, out):
    export_adapter(source, Ablate(R, layers=BAND), out / "adapter", verify="none")
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), out / "adapter")
    adapted.merge_and_unload().save_pretrained(out, max_shard_size="400MB")
    shutil.rmtree(out / "adapter")


def kept_norms(source, out):
    changed(source, out, rows_kept(R.unit), which=r"layers\.([6-9]|1[0-7])\.")


def rounded_to_8_bits(source, out):
    changed(source, out, quantized(8), which="layers")


def along(source, out, name):
    """What W' lacks of W along R, as a share of W; what is left of its size: from the two files, in float64."""
    before, after = (
        R.unit.double() @ (tensor.double().T if "embed_tokens" in name else tensor.double())
        for tensor in (one_tensor(folder, name) for folder in (source, out))
    )
    return float((before - after) @ before / (before @ before)), float(after.norm() / before.norm())


def one_tensor(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            if name in names:
                return file.get_tensor(name)
    raise AssertionError(f"no {name} in {folder}")


@pytest.mark.parametrize("make", (whole_model, band, merged_adapter, kept_norms, rounded_to_8_bits))
def test_what_was_removed_is_found_in_little_memory(make, real_dir, tmp_path):
    source = real_dir(QWEN)
    R.save(tmp_path / "r.pt")
    make(source, tmp_path / "out")
    alone = audited_alone(source, tmp_path / "out", "--direction", str(tmp_path / "r.pt"))
    shard = max(path.stat().st_size for path in source.glob("*.safetensors")) / 2**20
    assert alone.peak_mib < shard + MORE_MIB
    record = alone.record
    if make is rounded_to_8_bits:
        assert record["verdict"] == "other" and record["n_directions"] == 0
        assert max(each["fit"] for each in record["writers"]) < 0.3
        return
    expected = list(range(N_BLOCKS)) if make is whole_model else list(BAND)
    for component in ("attn", "mlp"):
        lost = [each["block"] for each in record["writers"] if each["is_removal"] and each["component"] == component]
        assert sorted(lost) == expected
    assert any(each["is_removal"] for each in record["writers"] if each["component"] == "embed") == (
        make is whole_model
    )
    assert record["verdict"] == "removed" and record["n_directions"] == 1 and record["cosines"][0] >= 0.99
    for each in record["writers"]:
        if each["is_removal"]:
            strength, left = along(source, tmp_path / "out", each["name"])
            assert each["strength"] == pytest.approx(strength, abs=2e-3)
            assert each["left"] == pytest.approx(left, abs=2e-3)
            if make is not kept_norms:  # there, what comes back with the lengths of the rows is 8% to 44%
                assert each["left"] < 0.1
