"""Vectors of one's own: from tensors and from files of every kind, ablated bare, and refused where places disagree."""

import json

import numpy
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig

from refusal_mi.directions import Direction, load_direction
from refusal_mi.errors import UserError
from refusal_mi.export.formats import write_gguf
from refusal_mi.export.plan import as_steps, describe_step
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import next_token_logits
from refusal_mi.text.chat import ChatFormat
from refusal_mi.vectors import compare, read_vectors
from tests.helpers.directions import random_direction
from tests.helpers.gguf import write_control_vector

VECTOR = torch.tensor([3.0, 0.0, 4.0])


def test_a_direction_of_a_tensor_an_array_and_a_list_is_the_same():
    for given in (VECTOR, VECTOR[None], VECTOR.numpy(), [3.0, 0.0, 4.0], torch.nn.Parameter(VECTOR)):
        found = Direction.of(given, layer=2, position=-1, provenance={"from": "probe"})
        assert torch.equal(found.vector, VECTOR) and not found.vector.requires_grad
        assert (found.layer, found.hook_name, found.position) == (2, "blocks.2.hook_resid_pre", -1)
        assert found.norm == 5 and found.provenance == {"from": "probe"}
    changed = VECTOR.clone()
    kept = Direction.of(changed, 2)
    changed += 1
    assert torch.equal(kept.vector, VECTOR)
    assert torch.equal(Direction.of([3, 0, 4], 2).vector, VECTOR), "whole numbers are numbers"


def test_a_hook_point_says_the_layer_as_well():
    assert Direction.of(VECTOR, hook_name="blocks.4.hook_resid_post").layer == 5
    assert Direction.of(VECTOR, 5, hook_name="blocks.4.hook_resid_post").hook_name == "blocks.4.hook_resid_post"


@pytest.mark.parametrize(
    "layer, hook_name", [(4, "blocks.4.hook_resid_post"), (3, "blocks.4.hook_resid_pre"), (0, "blocks.0.hook_out")]
)
def test_a_hook_point_that_contradicts_the_layer_is_refused(layer, hook_name):
    with pytest.raises(UserError, match="is not"):
        Direction(VECTOR, layer, hook_name)
    with pytest.raises(UserError, match="is not"):
        Direction.of(VECTOR, layer, hook_name=hook_name)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((VECTOR,), "say at which layer"),
        ((VECTOR, -1), "layers count from 0"),
        ((torch.ones(2, 3), 0), r"one vector of shape \[d_model\], not \[2, 3\]"),
        ((torch.ones(0), 0), "one vector of shape"),
        ((torch.tensor([1, 2]), 0), "vector of floats, not of torch.int64"),
        ((torch.zeros(3), 0), "must not be zero"),
        ((["a"], 0), "vector of numbers, not list"),
        ((None, 0), "vector of numbers, not NoneType"),
        (("mine.pt", 0), r"Direction\.load\('mine\.pt'\) reads one"),
        ((Direction.of(VECTOR, 1), 0), "a direction already"),
    ],
)
def test_what_is_no_direction_is_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        Direction.of(*arguments)
    with pytest.raises(UserError, match="a position counts from the end"):
        Direction.of(VECTOR, 1, position=3)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npy"])
def test_what_is_saved_is_loaded_and_so_is_its_run_folder(tmp_path, suffix):
    kept = Direction.of(VECTOR, 2, position=-1, provenance={"method": "mine"})
    path = tmp_path / f"direction{suffix}"
    kept.save(str(path))
    found = Direction.load(path)
    assert torch.equal(found.vector, VECTOR) and found.describe() == kept.describe()
    assert Direction.load(str(path)).layer == Direction.load(path, layer=2).layer == 2
    with pytest.raises(UserError, match="says itself where it was read, layer 2"):
        Direction.load(path, layer=3)
    if suffix == ".pt":
        assert Direction.load(tmp_path).layer == 2
    else:
        with pytest.raises(UserError, match=r"has no direction\.pt"):
            Direction.load(tmp_path)
    with pytest.raises(UserError, match=r"saved as \.pt, \.safetensors or \.npy"):
        kept.save(tmp_path / "direction.bin")


BARE = {
    "a.pt": lambda path: torch.save(VECTOR, path),
    "a.npy": lambda path: numpy.save(path, VECTOR.numpy()),
    "a.npz": lambda path: numpy.savez(path, r=VECTOR.numpy()),
    "a.safetensors": lambda path: safetensors.torch.save_file({"r": VECTOR[None].contiguous()}, path),
}


@pytest.mark.parametrize("name", BARE)
def test_a_bare_vector_needs_its_layer_in_python_and_in_commands(tmp_path, name):
    path = tmp_path / name
    BARE[name](path)
    for found in (Direction.load(path, layer=2), load_direction(path, 5, 2)):
        assert torch.equal(found.vector, VECTOR) and found.layer == 2 and found.provenance["source"] == str(path)
    with pytest.raises(UserError, match="nothing beside"):
        Direction.load(path)
    with pytest.raises(UserError, match="say with --layer"):
        load_direction(path, 5)


@pytest.mark.parametrize("names", ["{}", "layer_{}", "layers.{}", "blocks.{}.hook_resid_pre"])
def test_of_vectors_by_layer_the_layer_chooses(tmp_path, names):
    table = {names.format(layer): torch.full((3,), layer + 1.0) for layer in range(4)}
    safetensors.torch.save_file(table, tmp_path / "by.safetensors")
    torch.save({int(layer): row for layer, row in enumerate(table.values())}, tmp_path / "by.pt")
    for path in (tmp_path / "by.safetensors", tmp_path / "by.pt"):
        assert Direction.load(path, layer=2).vector.tolist() == load_direction(path, 5, 2).vector.tolist() == [3.0] * 3
        with pytest.raises(UserError, match="holds 4 tensors"):
            Direction.load(path)
        with pytest.raises(UserError, match="holds 0 tensors of layer 5"):
            Direction.load(path, layer=5)


def test_the_output_of_a_block_is_the_next_layer(tmp_path):
    table = {f"blocks.{block}.hook_resid_post": torch.full((3,), block + 1.0) for block in range(3)}
    safetensors.torch.save_file(table, tmp_path / "by.safetensors")
    assert Direction.load(tmp_path / "by.safetensors", layer=2).vector.tolist() == [2.0] * 3


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match="no such file"):
        Direction.load(path, layer=1)
    for data in (b"", b"no tensors at all", b"\x93NUMPY\x01\x00", b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"is no \.\w+ file of plain tensors"):
            Direction.load(path, layer=1)
    if suffix == ".npy":
        numpy.save(path, numpy.array([{"code": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(UserError, match=r"is no \.npy file of plain tensors"):
            Direction.load(path, layer=1)


def test_a_json_beside_any_file_says_the_place(tmp_path):
    BARE["a.npy"](tmp_path / "a.npy")
    (tmp_path / "a_metadata.json").write_text(json.dumps({"layer": 3, "pos": -2}))
    found = Direction.load(tmp_path / "a.npy")
    assert (found.layer, found.position, found.hook_name) == (3, -2, "blocks.3.hook_resid_pre")


def test_bare_vectors_are_ablated_as_directions_are(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    a, b, c = (random_direction(seed) for seed in range(3))

    def logits(*given, **options):
        return next_token_logits(model, chat, ["tell me", "why?"], interventions=Ablate(*given, **options))

    assert torch.equal(logits(a.vector), logits(a))
    assert torch.equal(logits(torch.stack([a.vector, b.vector, c.vector])), logits([a, b, c]))
    assert torch.equal(logits([a, b.vector, c.vector]), logits((a, b, c)))
    assert torch.equal(logits(torch.nn.Parameter(a.vector[None])), logits(a))
    assert torch.allclose(logits(7 * a.vector), logits(a), atol=1e-5)
    assert torch.equal(logits(a.vector.numpy()), logits(a)) and torch.equal(logits(a.vector.tolist()), logits(a))
    assert torch.equal(logits(torch.stack([a.vector, b.vector]).numpy()), logits([a, b]))
    assert not torch.equal(logits(a.vector), logits([a, b]))  # what is left out shows
    assert torch.equal(logits(a.vector, constants=[1.0]), logits(a, constants=[1.0]))


@pytest.mark.parametrize(
    "given, said",
    [
        (torch.zeros(4), "must not be zero"),
        (torch.tensor([1.0, float("nan")]), "must be finite"),
        (torch.ones(2, 2, 2), "one vector of shape"),
        ([], "at least one direction"),
        (torch.ones(0, 4), "at least one direction"),
        (torch.tensor([1, 2]), "vector of floats"),
        (torch.ones(()), "one vector of shape"),
        ("mine.pt", r"Direction\.load\('mine\.pt'\) reads one"),
        (["mine.pt"], r"Direction\.load\('mine\.pt'\) reads one"),
    ],
)
def test_what_cannot_be_ablated_is_one_line(given, said):
    with pytest.raises(UserError, match=said):
        Ablate(given)
    with pytest.raises(UserError, match="of different widths"):
        Ablate([torch.ones(3), torch.ones(4)]).basis  # noqa: B018


def test_an_export_records_bare_vectors_as_such():
    direction = Direction.of(VECTOR, 2)
    bare, placed = (describe_step(as_steps(Ablate(each))[0])["directions"][0] for each in (VECTOR, direction))
    assert bare == {"pos": None, "layer": None, "hook_name": None, "norm": 5.0, "sha256": placed["sha256"]}
    assert placed["layer"] == 2 and describe_step(Add(direction))["directions"] == [placed]


def test_the_only_tensor_of_a_file_is_not_moved_from_the_layer_that_it_is_named_after(tmp_path):
    path = tmp_path / "one.pt"
    torch.save({"blocks.3.hook_resid_pre": VECTOR}, path)
    assert load_direction(path, 5, 3).layer == 3
    with pytest.raises(UserError, match=r"of layer 3 by its name 'blocks\.3\.hook_resid_pre', not 2"):
        load_direction(path, 5, 2)
    torch.save({"vector": VECTOR}, path)
    assert load_direction(path, 5, 2).layer == 2, "the control: a name that says no layer"


def test_a_control_vector_of_llama_cpp_is_read_where_it_is_added(tmp_path):
    by_block = {block: torch.full((3,), block + 0.5) for block in (1, 2, 3)}
    write_control_vector(tmp_path / "many.gguf", by_block)
    write_control_vector(tmp_path / "one.gguf", {2: VECTOR})
    for layer in (2, 3, 4):
        for found in (Direction.load(tmp_path / "many.gguf", layer), load_direction(tmp_path / "many.gguf", 5, layer)):
            assert torch.equal(found.vector, by_block[layer - 1]) and found.layer == layer
    for found in (Direction.load(tmp_path / "one.gguf"), load_direction(tmp_path / "one.gguf", 5)):
        assert torch.equal(found.vector, VECTOR) and found.layer == 3
    with pytest.raises(UserError, match="holds 3 tensors"):
        Direction.load(tmp_path / "many.gguf")
    with pytest.raises(UserError, match="layer 3 by its name"):
        Direction.load(tmp_path / "one.gguf", 2)


def test_what_is_exported_as_a_control_vector_is_read_back(tmp_path, tiny_dir):
    direction = random_direction(layer=3)
    write_gguf(tmp_path / "v.gguf", Add(direction, -2.0), AutoConfig.from_pretrained(tiny_dir("llama")))
    found = Direction.load(tmp_path / "v.gguf")
    assert torch.equal(found.vector, -2 * direction.vector) and found.layer == 3


def test_other_gguf_files_are_one_line(tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(UserError, match="no such file"):
        Direction.load(path)
    write_control_vector(path, {1: VECTOR}, "llama")
    with pytest.raises(UserError, match="a GGUF file of 'llama', not of a control vector"):
        Direction.load(path)
    for data in (b"", b"GGUF", b"GGUF" + bytes(40), b"no tensors"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"is (no \.gguf file of plain tensors|a GGUF file of None)"):
            Direction.load(path)


def test_vectors_by_layer_are_compared_row_by_row(tmp_path):
    rows = torch.eye(3) + 0.1
    write_control_vector(tmp_path / "a.gguf", {block: rows[block] for block in (2, 0, 1)})
    torch.save({str(layer + 1): row for layer, row in enumerate(rows)}, tmp_path / "b.pt")
    found = compare([read_vectors(tmp_path / name) for name in ("a.gguf", "b.pt")])
    assert found.labels == tuple(f"{name}[layer {layer}]" for name in "ab" for layer in (1, 2, 3))
    assert torch.allclose(found.cosines[:3, 3:].diag(), torch.ones(3).double()) and found.cosines[0, 4] < 0.5
    torch.save({"x": rows[0], "y": rows[1]}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="holds 2 tensors"):
        read_vectors(tmp_path / "c.pt")
