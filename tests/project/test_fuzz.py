"""Damaged and odd files in every reader: what comes out is the content, or one line that says what is wrong.

REFUSAL_MI_FUZZ files per reader; `make long` reads many.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from refusal_mi.analysis.result import load_result
from refusal_mi.cli import app
from refusal_mi.cli.config import with_config
from refusal_mi.cli.shown import plain_command
from refusal_mi.directions import Direction, load_direction
from refusal_mi.errors import UserError
from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.files import write_record
from refusal_mi.model.provenance import ModelRecord
from refusal_mi.recipes.caa import load_vectors
from refusal_mi.recipes.options import load_config
from refusal_mi.run.directions import read_directions
from refusal_mi.run.folder import RunRecord, load_evaluations, load_grid, load_scores, models_of
from refusal_mi.run.methods import AtStrength, ControlRow, MethodRow, MethodsResult
from refusal_mi.run.stages import RunFolder
from refusal_mi.run.variants import VariantsResult
from refusal_mi.search.methods import Matched
from refusal_mi.stats import Rate
from refusal_mi.text.pairs import load_pairs
from refusal_mi.text.prompts import load_prompts
from refusal_mi.text.variants import read_variants
from refusal_mi.vectors import read_vectors
from tests.helpers.directions import direction_of
from tests.helpers.figures import worded
from tests.helpers.runs import make_run

N_FILES = int(os.environ.get("REFUSAL_MI_FUZZ", "30"))
ODD = (None, True, -1, 0, 3, 1e308, float("nan"), 10**400, "", "x", "blocks.9.hook_z", [], {}, [[]], [1, "a"], {"a": 1})
ODD_TENSORS = (
    torch.zeros(0),
    torch.tensor(3.0),
    torch.ones(2, 3, 4),
    torch.ones(4, dtype=torch.int64),
    torch.ones(4, dtype=torch.complex64),
    torch.full((4,), torch.nan),
    torch.zeros(4),
    torch.eye(4).to_sparse(),
    [torch.ones(4), torch.ones(3)],
    {"vector": torch.ones(4)},
    [],
    {},
    "text",
    7,
    torch.nn.Parameter(torch.ones(4)),
)


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield from nodes(entry, (*path, key))


def odd_json(value: Any, rng: random.Random) -> Any:
    """A value with one to three places replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *parents, last = rng.choice(list(nodes(value))) or (None,)
        if last is None:
            return copy.deepcopy(rng.choice(ODD))
        place = value
        for key in parents:
            place = place[key]
        change = rng.randrange(4)
        if change == 0 and isinstance(place, dict):
            del place[last]
        elif change == 1 and isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        else:
            place[last] = copy.deepcopy(rng.choice(ODD))
    return value


def odd_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes that were flipped, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[at : at + rng.choice((1, 8, len(data)))]
        elif change == 2:
            data[at:at] = rng.choice((b"\x00", b"\xff\xfe", b"[" * 2000, b'"', b"\n", b"\x1f\x8b", "\u202e".encode()))
        else:
            data[at:at] = data[at : at + 64]
    return bytes(data)


def damage(path: Path, rng: random.Random) -> None:
    """Write something else into a file."""
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_text(json.dumps(odd_json(json.loads(content), rng)))
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(odd_json(json.loads(content[8 : 8 + length]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    elif path.suffix == ".pt" and rng.random() < 0.5:
        torch.save(rng.choice(ODD_TENSORS), path)
    else:
        path.write_bytes(odd_bytes(content, rng))


def whole_run(folder: Path) -> None:
    record = RunRecord.load(folder)
    for name in (
        "prompts",
        "scores",
        "selection",
        "direction",
        "norms",
        "sides",
        "losses",
        "combination",
        "thresholds",
    ):
        getattr(record, name)


def stages(folder: Path) -> None:
    run = RunFolder(folder)
    run.seconds(), run.peak_mib(), run.before("s")
    run.stage("s", {"a": 1}, ["out.json"], lambda: (folder / "out.json").write_text("1"))


MODEL = ModelRecord("m", None, None, "llama", 4, 16, 100, "float32", "cpu")


def options_of_files(folder: Path) -> None:
    for name in ("o.toml", "o.yaml"):
        for command in (["run"], ["caa", "ab"]):
            with_config([*command, "--config", str(folder / name)], plain_command(app))


def claimed(folder: Path) -> None:
    RunFolder(folder).claim(MODEL)
    models_of(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_dir) -> Path:
    """One whole file or folder for every reader."""
    root = tmp_path_factory.mktemp("fuzz")
    make_run(root / "run", n_test=4)
    (root / "run/generate_directions").mkdir(exist_ok=True)
    torch.save(torch.randn(5, 8, 16).double(), root / "run/generate_directions/mean_diffs.pt")
    evaluations = root / "run/select_direction/direction_evaluations.json"
    shutil.copy(evaluations, evaluations.with_name("direction_evaluations_filtered.json"))
    folder = RunFolder(root / "stages")
    folder.stage("s", {"a": 1}, ["out.json"], lambda: (root / "stages/out.json").write_text("1"))
    direction_of(torch.ones(4)).save(root / "direction" / "d.pt")
    torch.save(torch.ones(3, 4), root / "direction" / "bare.pt")
    torch.save(torch.ones(1, 4), root / "direction" / "one.pt")
    (root / "rows").mkdir()
    rows = [{"instruction": f"Say {n}", "input": "", "category": "c", "output": str(n)} for n in range(4)]
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}] * 2
    (root / "rows/a.json").write_text(json.dumps(rows))
    (root / "rows/chat.json").write_text(json.dumps({"data": chats}))
    (root / "rows/b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "rows/c.csv").write_text('id,prompt\n1,One\n2,"Two, and"\n')
    (root / "rows/d.txt").write_text("One\nTwo\n")
    pair = {"question": "Is it?\n\nChoices:\n(A) No.\n(B) Yes.", "answer_matching_behavior": "(A)"}
    (root / "pairs").mkdir()
    (root / "pairs/p.json").write_text(json.dumps([pair | {"answer_not_matching_behavior": "(B)"}] * 2))
    (root / "config").mkdir()
    (root / "config/c.yaml").write_text("model_path: m\ndata_path:\n  generation: a.json\ntarget_layer: 3\n")
    (root / "options").mkdir()
    (root / "options/o.toml").write_text('device = "cpu"\n[run]\nseed = 3\n[caa.ab]\nbatch-size = "4"\n')
    (root / "options/o.yaml").write_text("device: cpu\nrun:\n  seed: 3\ncaa ab:\n  multipliers: [1, 2]\n")
    at = AtStrength(1.0, Rate(1, 4), Rate(2, 4), (0.1, 0.0, 0.2))
    row = MethodRow(
        "peel:2", 2, 3, -1, (at,), Matched(1.0, 0.1, (1.0, None, 2.0)), (0.9, 0.8, 1.0), 1.0, Rate(1, 4), Rate(0, 4),
        {"n": 4, "difference": 0.5}, 0.1,
    )  # fmt: skip
    control = ControlRow("random", 2, 0, 0.9, 0.01)
    found = MethodsResult(MODEL, 1, 0.0, 4, 4, Rate(4, 4), 0.05, (row,), (control,), ((1.0,),), 16, {"rdo:1": "none"})
    write_record(root / "methods/methods.json", found)
    write_record(root / "worded/variants.json", worded())
    wordings = [{"name": "kind", "template": "Please: {instruction}"}, {"name": "careful", "system": "Be careful."}]
    (root / "wordings").mkdir()
    (root / "wordings/w.json").write_text(json.dumps(wordings))
    (root / "wordings/w.toml").write_text('[[variants]]\nname = "kind"\ntemplate = "Please: {instruction}"\n')
    RunFolder(root / "signed").sign(MODEL)
    (root / "vector").mkdir()
    writer = GGUFWriter(root / "vector/v.gguf", "controlvector")
    writer.add_tensor("direction.1", torch.ones(4).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    shutil.copytree(tiny_dir("llama"), root / "checkpoint")
    return root


READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "run": ("run", "*.json", whole_run),
    "score grid": (
        "run",
        "select_direction/direction_evaluations.json",
        lambda run: load_evaluations(run / "select_direction/direction_evaluations.json", 8),
    ),
    "scores": ("run", "select_direction/*", load_scores),
    "grid": ("run", "generate_directions/*", load_grid),
    "ranked directions": ("run", "**/*.*", lambda run: read_directions(run, 8, "0-1")),
    "stage records": ("stages", ".stages/*.json", stages),
    "direction": ("direction", "d*", lambda folder: Direction.load(folder / "d.pt")),
    "vectors": ("direction", "bare.pt", lambda folder: read_vectors(folder / "bare.pt")),
    "bare direction": (
        "direction",
        "one.pt",
        lambda folder: load_direction(folder / "one.pt", 5, 1),
    ),
    "CAA vectors": ("direction", "d*", lambda folder: load_vectors(folder / "d.pt", "model", 5)),
    "prompts": ("rows", "*", lambda folder: [load_prompts(path) for path in sorted(folder.iterdir())]),
    "pairs": ("pairs", "*", lambda folder: load_pairs(folder / "p.json")),
    "CAA config": ("config", "*", lambda folder: load_config(folder / "c.yaml")),
    "checkpoint": ("checkpoint", "*.safetensors", open_checkpoint),
    "options": ("options", "*", options_of_files),
    "methods": ("methods", "*.json", MethodsResult.load),
    "variants": ("worded", "*.json", VariantsResult.load),
    "wordings": ("wordings", "*", lambda folder: [read_variants(path) for path in sorted(folder.iterdir())]),
    "model of a folder": ("signed", "model.json", claimed),
    "control vector": ("vector", "v.gguf", lambda folder: read_vectors(folder / "v.gguf")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_says_what_is_wrong_in_one_line(name, made, tmp_path):
    folder, pattern, read = READERS[name]
    read(shutil.copytree(made / folder, tmp_path / "whole"))
    rng, refused = random.Random(name), 0
    for n in range(N_FILES):
        place = shutil.copytree(made / folder, tmp_path / str(n))
        files = sorted(path for path in place.glob(pattern) if path.is_file() and path.name != "lock")
        damage(rng.choice(files), rng)
        kept = [path.read_bytes() for path in files]
        try:
            read(place)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) > 12, error
        except Exception as error:
            error.add_note(f"{name}: {[content[:600] for content in kept]}")
            raise
        shutil.rmtree(place)
    assert refused > N_FILES / 10


def test_a_damaged_result_of_an_analysis_is_one_line(made, tmp_path):
    for content in ([], {"kind": "pca"}, {"kind": 3, "format": 1}, "x"):
        (tmp_path / "r.json").write_text(json.dumps(content))
        with pytest.raises(UserError):
            load_result(tmp_path / "r.json")
