"""A run folder read back: with and without format numbers, and damaged."""

import shlex

import pytest

from refusal_mi.errors import UserError
from refusal_mi.files import read_json, write_json
from refusal_mi.model.provenance import ModelRecord
from refusal_mi.run.folder import RunRecord
from refusal_mi.run.options import RunOptions, command_line
from tests.helpers.runs import make_run


def files_with(folder, key):
    contents = {path: read_json(path) for path in sorted(folder.rglob("*.json"))}
    return [path for path, content in contents.items() if isinstance(content, dict) and key in content]


def test_a_folder_of_before_there_were_formats_reads_the_same(tmp_path):
    make_run(tmp_path)
    now = RunRecord.load(tmp_path)
    numbered = files_with(tmp_path, "format")
    assert {path.name for path in numbered} >= {"run.json", "summary.json", "prompts.json"}
    for path in numbered:
        write_json(path, {key: value for key, value in read_json(path).items() if key != "format"})
    assert files_with(tmp_path, "format") == []
    assert RunRecord.load(tmp_path) == now


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_later_format_and_a_missing_part_are_one_line_that_names_the_file(tmp_path, name):
    make_run(tmp_path)
    saved = read_json(tmp_path / name)
    for changed, line in (
        ({**saved, "format": 99}, f"{name} is of format 99"),
        ({"format": 1}, f"{name} is damaged, or of another version"),
    ):
        write_json(tmp_path / name, changed)
        with pytest.raises(UserError, match=line) as raised:
            RunRecord.load(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_command_to_copy_quotes_whatever_an_option_holds():
    model = ModelRecord("some/model", None, None, "llama", 2, 8, 16, "float32", "cpu")
    system = "--- be nice; echo $HOME"
    command = command_line(model, RunOptions(system=system))
    said = shlex.split(command.replace("\\\n", " "))
    assert said[said.index("--system") + 1] == system
    assert said[:3] == ["refusal-mi", "run", "some/model"]
