"""Files and folders that something is wrong with, for the table of bad input."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .directions import random_direction

_PARTS = {"half.safetensors": b"\xff" * 8 + b"{}", "half.gguf": b"GGUF\x03", "half.parquet": b"PAR1" + bytes(20)}
_BYTES = {
    **_PARTS,
    "half.gz": b"\x1f\x8b\x08" + bytes(5),
    "image.csv": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "binary.json": bytes(range(256)),
}
_TEXTS = {
    "file": "text",
    "empty": "",
    "half.json": '["a", "b',
    "numbers.json": "[1, 2]",
    "no_rows.json": "[]",
    "blank.json": '["  ", "", "\\n"]',
    "object.json": '{"a": 1}',
    "nested.json": '[["a"], ["b"]]',
    "other.csv": "a,b\n1,2\n",
    "one.json": '["only one"]',
    "long.json": json.dumps([f"{n} " + "word " * 2000 for n in range(4)]),
    "queries.json": json.dumps([f"Say {n}" for n in range(24)]),
    "grid.json": '{"scores": []}',
    "rows.json": '[{"position": 0}]',
    "bad.yaml": "a: [1",
    "unknown.yaml": "behaviour: x\n",
    "no_answers.json": '[{"prompt": "a"}]',
    "answers.json": '[{"prompt": "a", "response": "b"}]',
    "pairs.json": '[{"question": "a"}]',
    "twice.csv": "prompt,prompt\na,b\n",
    "nul.txt": "a\0b\0c\n",
    "half_character.json": '["\\ud800 hello"]',
    "run/run.json": "{",
    "held/refusal_mi.json": '{"kind": "checkpoint"}',
    "odd_run/run.json": '{"format": 99}',
    "no_run/note.txt": "nothing",
}
_TENSORS: dict[str, Any] = {
    "bare.pt": torch.ones(32),
    "other.pt": torch.ones(32),
    "meta.pt": torch.ones(32, device="meta"),
    "wide.pt": torch.ones(33),
    "nan.pt": torch.full((32,), float("nan")),
    "zero.pt": torch.zeros(32),
    "matrix.pt": torch.ones(3, 32),
    "dict.pt": {"a": 1},
    "ints.pt": torch.ones(32, dtype=torch.int64),
    "complex.pt": torch.ones(32, dtype=torch.complex64),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "zero_heads": {"n_head": 0},
    "unheard_of": {"model_type": "unheard_of"},
    "no_such_dtype": {"dtype": "nosuch"},
    "more_layers": {"n_layer": 9},
    "wide_as_text": {"n_embd": "wide"},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "compressed": {"quantization_config": {"quant_method": "compressed-tensors"}},
}
_BROKEN = ("bad_config", "bad_tokenizer", "no_weights", "bad_weights", "no_template", "pickled")


class Bomb:
    """Leaves a folder "ran" where its pickle is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


def make_bad_files(root: Path, model: Path) -> None:
    """Make them all in `root`; `model` is a checkpoint folder that nothing is wrong with."""
    for name, text in _TEXTS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    for name, content in _BYTES.items():
        (root / name).write_bytes(content)
    for name, held in _TENSORS.items():
        torch.save(held, root / name)
    for name in ("read.pt", "after.pt", "number.pt", "held/direction.pt"):
        random_direction(1).save(root / name)
    for name, said in {"after": {"pos": 0}, "number": {"model": {"source": "/m", "fingerprint": 5}}}.items():
        there = json.loads((root / f"{name}_metadata.json").read_text())
        (root / f"{name}_metadata.json").write_text(json.dumps(there | said))
    torch.save(Bomb(), root / "bomb.pt")
    (root / "half.pt").write_bytes((root / "bare.pt").read_bytes()[:200])
    (root / "folder").mkdir()
    for name in (*_CONFIGS, *_BROKEN):
        shutil.copytree(model, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | _CONFIGS.get(name, {})))
    (root / "bad_config" / "config.json").write_text("{")
    (root / "bad_tokenizer" / "tokenizer.json").write_text("{")
    (root / "bad_weights" / "model.safetensors").write_bytes(b"\x10" + bytes(40))
    (root / "no_template" / "chat_template.jinja").unlink()
    for name in ("no_weights", "pickled"):
        (root / name / "model.safetensors").unlink()
    torch.save(Bomb(), root / "pickled" / "pytorch_model.bin")
