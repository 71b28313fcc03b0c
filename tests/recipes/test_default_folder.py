"""Where the run of a model lies by default: the base name of a local folder, made unique only where two share it."""

import pytest

from refusal_mi.files import write_json
from refusal_mi.model.loading import resolve_source, unique_alias
from refusal_mi.recipes.options import default_folder


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
        (tmp_path / parent / "model" / "config.json").write_text("{}")
    return [resolve_source(tmp_path / parent / "model") for parent in ("a", "b")]


def record(source):
    return {"model": {"source": source}}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", record),
        ("harmless_refusal_vectors/run.json", record),
        ("model.json", record),
        ("caa/model.json", record),
        ("caa/vec_layer_3_model_metadata.json", lambda source: {"model": source}),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_a_second_model_of_the_same_name_gets_a_folder_of_its_own(models, file, content, quick):
    first, second = models
    plain = default_folder(first, quick=quick)
    assert plain.as_posix() == ("runs/model-quick" if quick else "runs/model")
    assert default_folder(second, quick=quick) == plain  # nothing is there yet
    write_json(plain / file, content(first))
    assert default_folder(first, quick=quick) == plain
    own = default_folder(second, quick=quick)
    assert own.name == unique_alias(second) + ("-quick" if quick else "") != plain.name
    write_json(own / "run.json", record(second))
    assert (default_folder(first, quick=quick), default_folder(second, quick=quick)) == (plain, own)


def test_a_folder_of_before_is_found(models):
    before = default_folder(models[0]).with_name(unique_alias(models[0]))
    write_json(before / "run.json", record(models[0]))
    assert default_folder(models[0]) == before


def test_no_local_folder_takes_the_place_of_the_embedded_model_or_of_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("organism", "owner--name"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
        assert default_folder(resolve_source(tmp_path / "models" / name)).name.startswith(f"{name}-")
    assert default_folder(resolve_source(None)).name == "organism"
    assert default_folder("owner/name").name == "owner--name"


def test_a_damaged_file_names_no_model(models):
    (plain := default_folder(models[0])).mkdir(parents=True)
    (plain / "run.json").write_text("{")
    assert default_folder(models[0]) == default_folder(models[1]) == plain
