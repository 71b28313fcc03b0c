"""Prompt sets: formats, columns, splits, the bundled sets, bad input."""

import gzip
import json
import warnings

import pyarrow
import pyarrow.parquet
import pytest

from refusal_mi.errors import UserError
from refusal_mi.text.prompts import KNOWN_HUB_SETS, Prompt, PromptSet, load_prompts, load_splits

TEXTS = ["First, a comma", 'Second "quoted"', "Third ünïcode"]
ROWS = [{"id": str(i), "prompt": text, "Category": f"c{i}"} for i, text in enumerate(TEXTS)]


def write(folder, suffix, rows):
    path = folder / f"set.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
        path.write_text("\ufeff" + "\n".join([",".join(rows[0]), *quoted]) + "\n", encoding="utf-8")
    elif suffix == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif suffix == "txt":
        path.write_text("\n\n".join(row["prompt"] for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
def test_every_format_gives_the_same_prompts(tmp_path, suffix):
    found = load_prompts(write(tmp_path, suffix, ROWS))
    assert found.name == "set" and found.instructions == TEXTS
    categories = [None] * 3 if suffix == "txt" else ["c0", "c1", "c2"]
    assert [prompt.category for prompt in found.prompts] == categories


def test_a_json_list_of_strings_is_a_set(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    assert load_prompts(tmp_path / "a.json").instructions == TEXTS


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_the_column_can_be_chosen_and_a_wrong_one_is_named(tmp_path, suffix):
    path = write(tmp_path, suffix, ROWS)
    assert load_prompts(path, column="id").instructions == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"no column 'ask'; it has id, prompt, Category: choose with --column"):
        load_prompts(path, column="ask")


def test_a_file_with_unknown_columns_names_them(tmp_path):
    path = write(tmp_path, "json", [{"a": "x", "b": "y"}])
    with pytest.raises(UserError, match=r"it has a, b: use --column"):
        load_prompts(path)
    assert load_prompts(path, column="b").instructions == ["y"]


def test_published_and_foreign_column_names_are_known(tmp_path):
    for column in ("instruction", "Goal", "Behavior", "forbidden_prompt", "question"):
        assert load_prompts(write(tmp_path, "json", [{column: "x"}])).instructions == ["x"]


def test_answers_are_read_where_there_are_some(tmp_path):
    path = write(tmp_path, "json", [{"instruction": "Add 1 and 1", "output": "2"}, {"instruction": "Stop"}])
    assert load_prompts(path).prompts == (Prompt("Add 1 and 1", output="2"), Prompt("Stop"))


def test_repeats_and_blank_rows_are_dropped_in_order(tmp_path):
    path = write(tmp_path, "json", [{"prompt": text} for text in ("b", " a ", "", "b", "a", "c")])
    assert load_prompts(path).instructions == ["b", "a", "c"]
    assert load_prompts(path, limit=2).instructions == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "0 prompts"),
        ("a.json", '[""]', "0 prompts"),
        ("a.json", '[{"prompt": "  "}]', "0 prompts"),
        ("a.json", '{"x": {"y": [1]}, "z": 3}', "expected a list"),
        ("a.json", "{}", "holds a JSON object with nothing"),
        ("a.json", "3", "must hold a JSON list"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '{"a": ["x"], "b": ["x", "y"]}', "columns of equal length"),
        ("a.csv", 'prompt\n"open', "cannot be read as CSV"),
        ("a.csv", f"prompt\n{'x' * 200_000}", "cannot be read as CSV"),
        ("a.json.gz", b"\x1f\x8b\x08broken", "cannot be read as gzip"),
        ("a.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
        ("a.bin", "some text", "format unknown"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', "none of the columns"),
        ("a.json", '[{"messages": [{"role": "assistant", "content": "x"}]}]', "no chat with a user message"),
        ("a.json", "[1, 2]", "not text"),
        ("a.json", '[{"prompt": null}]', "not text"),
        ("a.json", "{", "cannot be read as JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{', "JSON Lines"),
        ("a.jsonl", "", "0 prompts"),
        ("a.csv", "", "0 prompts"),
        ("a.csv", "prompt\n", "0 prompts"),
        ("a.txt", "\n \n", "0 prompts"),
        ("a.parquet", "not parquet at all", "cannot be read as Parquet"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("a.csv", b"\xff\xfe\xfa", "UTF-8"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_csv_row_with_more_fields_than_the_header_names_its_line(tmp_path):
    (tmp_path / "a.csv").write_text(',prompt\n0,"First, quoted"\n1,Second, not quoted\n')
    with pytest.raises(UserError, match=r"a\.csv, line 3: .*quote the commas"):
        load_prompts(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(',prompt\n0,"First, quoted"\n')
    assert load_prompts(tmp_path / "a.csv").instructions == ["First, quoted"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_only_line_feeds_end_a_line(tmp_path, suffix):
    text = "One\u2028prompt\x85with odd breaks"
    row = {"jsonl": json.dumps({"prompt": text}, ensure_ascii=False), "csv": f"prompt\n{text}"}
    (tmp_path / f"a.{suffix}").write_text(row.get(suffix, text), encoding="utf-8")
    assert load_prompts(tmp_path / f"a.{suffix}").instructions == [text]


KINDS = {
    "byte order mark": ("a.json", "\ufeff" + json.dumps(ROWS)),
    "UTF-32": ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("utf-32")),
    "UTF-16": ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("utf-16")),
    "lines in .json": ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
    "a list in .jsonl": ("a.jsonl", json.dumps(ROWS, indent=2)),
    ".ndjson": ("a.ndjson", "\n".join(json.dumps(row) for row in ROWS)),
    "JSON in .txt": ("a.txt", json.dumps(ROWS)),
    "JSON in a file of no format": ("a", json.dumps(ROWS)),
    "data": ("a.json", json.dumps({"version": 1, "data": ROWS})),
    "the only list": ("a.json", json.dumps({"whatever": ROWS})),
    "columns": ("a.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]})),
    "pandas": ("a.json", json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]})),
    ".tsv": ("a.tsv", "\n".join(["id\tprompt", *(f"{row['id']}\t" + row["prompt"].replace('"', "'") for row in ROWS)])),
    "semicolons": (
        "a.csv",
        "\n".join(["id;prompt", *(f"{row['id']};" + row["prompt"].replace('"', "'") for row in ROWS)]),
    ),
    "gzip": ("a.jsonl.gz", gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode())),
    "gzip without the suffix": ("a.json", gzip.compress(json.dumps(ROWS).encode())),
    "a comma in the name": ("a, b.json", json.dumps(ROWS)),
    "OpenAI's chats": ("a.json", json.dumps([{"messages": [{"role": "user", "content": text}]} for text in TEXTS])),
    "ShareGPT's chats": (
        "a.json",
        json.dumps([{"conversations": [{"from": "human", "value": text}]} for text in TEXTS]),
    ),
}


@pytest.mark.parametrize(("name", "content"), KINDS.values(), ids=KINDS)
def test_what_a_file_holds_decides(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_prompts(tmp_path / name)
    assert [text.replace("'", '"') for text in found.instructions] == TEXTS and found.name == name.split(".")[0]


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    assert load_prompts(tmp_path / "a.jsonl").instructions == ["x"]


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("two\nthree")
    (tmp_path / "a.json").write_text('["one"]')
    (tmp_path / "README.md").write_text("not a prompt")
    (tmp_path / "empty").mkdir()
    assert load_prompts(tmp_path).instructions == ["one", "two", "three"]
    with pytest.raises(UserError, match="holds no file of a known format"):
        load_prompts(tmp_path / "empty")


def test_a_near_name_is_suggested(tmp_path):
    (tmp_path / "harmful_prompts.json").write_text('["x"]')
    with pytest.raises(UserError, match=r"no such file: .*; did you mean .*harmful_prompts\.json\?"):
        load_prompts(tmp_path / "harmfull_prompts.json")
    with pytest.raises(UserError, match="did you mean 'harmful'"):
        load_prompts("harmfull")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "Add these.", "input": "1, 2", "output": "3"}, "Add these.\n\n1, 2"),
        ({"Behavior": "Summarize it.", "ContextString": "Once."}, "Once.\n\n---\n\nSummarize it."),
        ({"goal": "Summarize it.", "context_string": "Once."}, "Once.\n\n---\n\nSummarize it."),
        ({"prompt": "Summarize it.", "context": "Once."}, "Once.\n\n---\n\nSummarize it."),
        ({"instruction": "Summarize it.", "context": "Once.", "response": "x"}, "Summarize it.\n\nOnce."),
    ],
)
def test_the_other_half_of_an_instruction_is_joined_and_counted(tmp_path, row, text):
    other = {
        key: "" if key in ("input", "ContextString", "context_string", "context") else f"Other {key}" for key in row
    }
    path = write(tmp_path, "json", [other, row, other | {"id": 3}])
    with pytest.warns(
        UserWarning, match=r"set: 1 of 3 rows have a '(input|ContextString|context_string|context)', which is joined"
    ):
        assert load_prompts(path).instructions[1] == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = next(each for key, each in other.items() if key in ("instruction", "Behavior", "prompt", "goal"))
        assert load_prompts(write(tmp_path, "csv", [other])).instructions == [alone]


def test_an_input_that_is_no_half_of_an_instruction_stays_out(tmp_path):
    path = write(tmp_path, "json", [{"prompt": "Say it.", "input": "stdin"}, {"prompt": "Do.", "input": ""}])
    with pytest.warns(UserWarning, match=r"1 of 2 rows have a 'input' beside their 'prompt', which is not used"):
        assert load_prompts(path).instructions == ["Say it.", "Do."]


def test_the_first_turn_of_a_chat_is_the_prompt_and_what_is_left_out_is_counted(tmp_path):
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    path = write(tmp_path, "json", [{"messages": turns}, {"messages": [{"role": "user", "content": "x"}]}])
    with pytest.warns(UserWarning) as caught:
        assert load_prompts(path).prompts == (Prompt("u", output="a"), Prompt("x"))
    said = sorted(str(each.message) for each in caught)
    assert [line.split(",")[0] for line in said] == [
        "set: 1 of 2 rows have messages before the first user message",
        "set: 1 of 2 rows have several user messages",
    ]


def test_commas_in_the_names_of_three_files(tmp_path):
    names = ["a,b.json", "c.json", "d, e.json"]
    for index, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps([f"{index}{n}" for n in range(3)]))
    found = load_splits(",".join(str(tmp_path / name) for name in names), n_train=2, n_val=2, n_test=2, seed=0)
    assert [{text[0] for text in part.instructions} for part in found.parts.values()] == [{"0"}, {"1"}, {"2"}]


def test_the_column_is_not_that_of_the_named_sets():
    assert load_prompts("harmful", column="category") == load_prompts("harmful")


def test_a_missing_file_and_an_unknown_name_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_prompts(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"no such prompt set: 'harmfull' .*; expected one of harmful, .*advbench"):
        load_prompts("harmfull")


def test_a_hub_set_without_a_network_is_a_user_error():
    for name in ("someone/prompts", "advbench"):
        with pytest.raises(UserError, match="without a network use a local file") as caught:
            load_prompts(name)
        assert "\n" not in str(caught.value)


def test_the_published_sets_have_names():
    expected = {"advbench", "harmbench", "jailbreakbench", "strongreject", "maliciousinstruct", "alpaca", "pile"}
    expected |= {"xstest", "xstest-unsafe", "or-bench", "or-bench-80k", "or-bench-toxic"}
    assert set(KNOWN_HUB_SETS) == expected


def test_one_set_is_split_into_disjoint_seeded_parts(tmp_path):
    path = write(tmp_path, "json", [{"prompt": f"p{i}"} for i in range(30)])
    sizes = {"n_train": 12, "n_val": 8, "n_test": 10}
    splits = load_splits(str(path), **sizes, seed=1)
    parts = [set(part.instructions) for part in splits.parts.values()]
    assert [len(part) for part in parts] == [12, 8, 10]
    assert len(set.union(*parts)) == 30
    assert load_splits(str(path), **sizes, seed=1) == splits
    assert load_splits(str(path), **sizes, seed=2) != splits


def test_three_sets_that_overlap_still_give_disjoint_splits(tmp_path):
    names = []
    for name, numbers in (("train", range(20)), ("val", range(10, 25)), ("test", range(15, 30))):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"p{i}" for i in numbers]))
        names.append(str(tmp_path / f"{name}.json"))
    splits = load_splits(", ".join(names), n_train=10, n_val=5, n_test=15, seed=0)
    assert {*splits.test.instructions} == {f"p{i}" for i in range(15, 30)}
    assert {*splits.val.instructions} == {f"p{i}" for i in range(10, 15)}
    assert {*splits.train.instructions} == {f"p{i}" for i in range(10)}
    with pytest.raises(UserError, match="val has 5 prompts, but 6 were asked for"):
        load_splits(",".join(names), n_train=10, n_val=6, n_test=15, seed=0)


def test_too_few_prompts_says_what_would_fit(tmp_path):
    path = write(tmp_path, "json", [{"prompt": f"p{i}"} for i in range(26)])
    with pytest.raises(UserError, match=r"26 prompts, but 128 \+ 32 \+ 100.*--n-train 12 --n-val 3 --n-test 10"):
        load_splits(str(path), n_train=128, n_val=32, n_test=100, seed=0)
    load_splits(str(path), n_train=12, n_val=3, n_test=10, seed=0)


@pytest.mark.parametrize(("source", "n", "message"), [("a,b", 1, "TRAIN,VAL,TEST"), ("harmful", 0, "at least 1")])
def test_impossible_splits_are_refused(source, n, message):
    with pytest.raises(UserError, match=message):
        load_splits(source, n_train=1, n_val=n, n_test=1, seed=0)


def test_the_bundled_sets_are_large_disjoint_and_one_line():
    harmful, harmless = load_prompts("harmful"), load_prompts("harmless")
    assert len(harmful) >= 300 and len(harmless) >= 300
    assert not set(harmful.instructions) & set(harmless.instructions)
    assert not any("\n" in text for text in harmful.instructions + harmless.instructions)
    assert all(prompt.category for prompt in harmful.prompts)
    for side in ("harmful", "harmless"):
        load_splits(side, n_train=128, n_val=32, n_test=100, seed=42)


def test_the_bundled_loss_sets_have_text_and_answers():
    answered, plain = load_prompts("instructions"), load_prompts("plain_text")
    assert all(prompt.output for prompt in answered.prompts)
    assert len(plain) >= 50 and min(map(len, plain.instructions)) > 100


def test_set_operations_leave_the_set_as_it_is():
    whole = PromptSet("s", tuple(Prompt(text) for text in "abcd"))
    assert whole.without(whole.where([True, False, False, True])).instructions == ["b", "c"]
    assert sorted(whole.sample(4, seed=3).instructions) == list("abcd")
    assert whole.instructions == list("abcd")
    with pytest.raises(UserError, match="4 prompts, but 5"):
        whole.sample(5, seed=0)
    assert whole.sha256 != whole.where([True, True, True, False]).sha256
    assert whole.sha256 == PromptSet("other name", whole.prompts).sha256


def test_published_splits_load(reference_data):
    counts = {"harmful_train": 260, "harmful_val": 39, "harmful_test": 562}
    for name, count in counts.items():
        assert len(load_prompts(reference_data / "splits" / f"{name}.json")) == count


def test_a_category_is_text_whatever_the_file_holds(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"instruction": "a", "category": 3}, {"instruction": "b", "category": None}]))
    assert [prompt.category for prompt in load_prompts(path).prompts] == ["3", None]


def test_the_parts_of_a_message_are_its_text(tmp_path):
    def chat(*parts):
        return {"messages": [{"role": "user", "content": list(parts)}]}

    said = {"type": "text", "text": "Why?"}
    assert load_prompts(write(tmp_path, "json", [chat(said, {"type": "text", "text": "Now."})])).instructions == [
        "Why?\nNow."
    ]
    for other in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}):
        with pytest.raises(UserError, match="no chat with a user message"):
            load_prompts(write(tmp_path, "json", [chat(said), chat(said, other)]))


def test_an_over_refusal_set_is_its_safe_rows_and_the_other_set_the_rest(monkeypatch):
    rows = [
        {"id": n, "prompt": f"Ask {n}", "type": f"t{n % 2}", "label": ("safe", "unsafe", "safe")[n % 3]}
        for n in range(12)
    ]
    asked = []

    class Rows(list):
        def to_list(self):
            return list(self)

    def load_dataset(path, config, *, split, streaming=False):
        asked.append((path, config, split, streaming))
        return Rows(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    safe, unsafe = load_prompts("xstest"), load_prompts("XSTest-unsafe")
    assert safe.instructions == [f"Ask {n}" for n in range(12) if n % 3 != 1] and len(safe) == 8
    assert unsafe.instructions == ["Ask 1", "Ask 4", "Ask 7", "Ask 10"]
    assert not set(safe) & set(unsafe) and safe.prompts[1].category == "t0" and safe.name == "xstest"
    assert load_prompts("xstest-unsafe", limit=2).instructions == ["Ask 1", "Ask 4"]  # of the set, not of the dataset
    assert asked[0] == ("walledai/XSTest", None, "test", False) and asked[-1][3]
    load_prompts("or-bench")
    assert asked[-1] == ("bench-llm/or-bench", "or-bench-hard-1k", "train", False)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows([{"prompt": "x"}]))
    with pytest.raises(UserError, match="walledai/XSTest has no column 'label'; it has prompt"):
        load_prompts("xstest")


def test_an_over_refusal_set_without_a_network_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match="cannot load the dataset walledai/XSTest from the hub") as caught:
        load_prompts("xstest")
    assert "\n" not in str(caught.value) and "use a local file" in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'xstest'"):
        load_prompts("xtest")
