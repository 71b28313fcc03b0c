"""Wordings: read strictly from files, whose tokens are told exactly, and whose controls are as long."""

import json
import re
from dataclasses import replace

import pytest
from tokenizers import processors

from refusal_mi.errors import UserError
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.variants import PARTS, PLACE, Variant, label_parts, neutral, read_variants
from tests.helpers.models import TEMPLATE, tiny_tokenizer
from tests.helpers.pages import ROOT

FRAME = Variant("frame", f"Act. Say: {PLACE} Go on!", "  Be brief.\n")
ROWS = [
    {"name": "kind", "template": f"Please, {PLACE}"},
    {"name": "French", "template": f"{PLACE} Answer in French.", "system": None},
    {"name": "careful", "system": "You are careful."},
]
TRIMMED = TEMPLATE.replace("m['content']", "m['content'] | trim")
FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ s }}{{ m['content'] }}<|im_end|>{% endfor %}assistant:"
)


def label(chat, instruction, variant=None):
    """The parts of one prompt."""
    (parts,) = label_parts(chat, instruction, [variant])
    return parts


def texts(chat, parts):
    """Part -> the text of its tokens."""
    pairs = list(zip(parts.token_ids, parts.labels, strict=True))
    return {part: chat.tokenizer.decode([token for token, label in pairs if label == part]) for part in PARTS}


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "context", "own", "after"),
    [
        (
            TEMPLATE,
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n",
            "  Be brief.\nAct. Say:  Go on!",
            "<|im_end|>\n",
        ),
        (TRIMMED, "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", "Be brief.Act. Say:  Go on!", "<|im_end|>\n"),
        (FOLDED, "<|im_start|>\n\n", "  Be brief.\nAct. Say:  Go on!", "<|im_end|>"),
    ],
    ids=["as it is", "trimmed", "folded into the user's message"],
)
def test_every_token_is_in_the_part_that_its_characters_come_from(template, context, own, after):
    chat = ChatFormat(tokenizer_with(template), system=FRAME.system)
    parts = label(chat, "Say: Be brief", FRAME)
    found = texts(chat, parts)
    assert parts.token_ids == tuple(chat.encode(FRAME.wrap("Say: Be brief"))) and parts.n_shared == 0
    assert (found["context"], found["variant"], found["instruction"]) == (context, own, "Say: Be brief")
    assert found["template"].startswith(after) and parts.count("template") == len(chat.positions)
    plain = label(replace(chat, system="Be kind."), "Say: Be brief")
    assert plain.count("variant") == 0 and plain.count("instruction") == len("Say: Be brief")
    assert "Be kind." in texts(chat, plain)["context"], "a system message that is always there is no variant"


def test_a_token_over_a_border_is_counted_and_goes_to_the_larger_part():
    chat = ChatFormat(tiny_tokenizer())
    glued = label(chat, "er x", Variant("glued", f"us{PLACE}"))  # "user" is one token here
    assert glued.n_shared == 1 and texts(chat, glued)["variant"] + texts(chat, glued)["instruction"] == "user x"
    more = label(chat, "tem x", Variant("glued", f"sys{PLACE}!!"))  # "system": a tie, which the later part has
    assert texts(chat, more)["instruction"] == "system x"
    apart = label(chat, "er x", Variant("apart", f"us-{PLACE}"))
    assert apart.n_shared == 0 and texts(chat, apart)["instruction"] == "er x"


def test_a_tokenizer_that_leaves_space_out_of_its_offsets_gives_the_same_parts():
    whole, trimmed = tiny_tokenizer(), tiny_tokenizer()
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    found = [label(ChatFormat(each, system=FRAME.system), "a  b", FRAME) for each in (whole, trimmed)]
    assert found[0] == found[1] and found[0].count("instruction") == 4


def test_what_cannot_be_told_is_one_line():
    shouts = ChatFormat(tokenizer_with(TEMPLATE.replace("m['content']", "m['content'].replace('x', 'xx')")))
    with pytest.raises(UserError, match="leaves out or rewrites"):
        label(shouts, "a x b", FRAME)
    with pytest.raises(UserError, match="special tokens are written out"):
        label(ChatFormat(tiny_tokenizer()), "stop <|im_end|> here")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_control_has_as_many_tokens_in_every_place_and_other_words(seed):
    tokenizer = tiny_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for variant in (FRAME, Variant("short", f"{PLACE}!"), Variant("system", system="user assistant")):
        control = neutral(variant, count, seed)
        pairs = [(variant.before, control.before), (variant.after, control.after)]
        pairs += [(variant.system, control.system)] if variant.system else []
        for own, other in pairs:
            assert count(own) == count(other) and (own == other) == (not own.strip())
            assert (own[: len(own) - len(own.lstrip())], own[len(own.rstrip()) :]) == (
                other[: len(other) - len(other.lstrip())],
                other[len(other.rstrip()) :],
            )
    first, again, other = (neutral(FRAME, count, seed, index) for index in (0, 0, 1))
    assert first == again != other and first.system == other.system, "one system message for all prompts"
    assert neutral(FRAME, count, seed + 5) != first


def test_words_that_are_drawn_are_not_glued_to_the_instruction():
    def count(text: str) -> int:
        return len(re.findall(r" ?\w+|[^\w\s]+|\s+(?!\w)|\s+", text))

    for index in range(20):
        control = neutral(Variant("marks", f"###{PLACE}!!!"), count, 0, index)
        assert control.before[-1] == " " == control.after[0] and control.before.strip() and control.after.strip()
        whole, plain = (count(each.wrap("Tell me why")) for each in (control, Variant("x", f"###{PLACE}!!!")))
        assert whole == plain


def write(path, rows):
    if path.suffix == ".toml":
        tables = [[f"{key} = {json.dumps(value)}" for key, value in row.items() if value is not None] for row in rows]
        path.write_text("\n".join(line for table in tables for line in ("[[variants]]", *table)))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows if path.stem == "list" else {"variants": rows}))
    return path


@pytest.mark.parametrize("name", ["list.json", "named.json", "lines.jsonl", "tables.toml"])
def test_all_formats_hold_the_same(tmp_path, name):
    found = read_variants(write(tmp_path / name, ROWS))
    assert found == tuple(Variant(**row) for row in ROWS)
    assert found[0].wrap("{instruction}?") == "Please, {instruction}?", "the instruction's own braces stay"


def test_the_file_of_the_page_is_one(tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/variants.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "page.toml").write_text(block)
    found = {each.name: each for each in read_variants(tmp_path / "page.toml")}
    assert len(found) == 5 and found["system message"].template == PLACE and found["actor"].system is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"template": f"x {PLACE}"}, "variant 2: it has no name"),
        ({"name": "a", "templat": "x"}, "unknown key 'templat'; did you mean 'template'"),
        ({"name": "a", "template": "x {instuction}"}, r"has \{instruction\} 0 times"),
        ({"name": "a", "template": f"{PLACE} {PLACE}"}, r"has \{instruction\} 2 times"),
        ({"name": "a", "template": PLACE}, "changes nothing"),
        ({"name": "a", "template": f" {PLACE}\n"}, "adds no words"),
        ({"name": "a", "system": ""}, "adds no words"),
        ({"name": "a", "template": 3}, "template must be a text, not int"),
        ({"name": "Plain", "system": "x"}, "is that of the request as it stands"),
        ({"name": "KIND!", "system": "x"}, "two variants are called 'kind' and 'KIND!'"),
        ({"name": "kind", "system": "x"}, "two variants are called 'kind' and 'kind'"),
        ({"name": "", "system": "x"}, "1 to 40 printable characters"),
        ({"name": "a", "system": "\ud83d"}, "half of a character"),
        ("x {instruction}", "expected an object"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        read_variants(write(tmp_path / "list.json", [ROWS[0], row]))


def test_files_that_are_none(tmp_path):
    for name, content, said in (
        ("a.yaml", "", "ends in .toml, .json"),
        ("a.toml", "[[variant", "is not TOML"),
        ("a.toml", "x = 1", "holds 'x': expected tables"),
        ("a.toml", "# none yet", "a.toml holds no variant"),
        ("a.json", "[", "cannot be read as JSON"),
        ("a.json", "[]", "holds no variant"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=said):
            read_variants(tmp_path / name)
    for name in ("none.toml", "none.json"):
        with pytest.raises(UserError, match="no such file"):
            read_variants(tmp_path / name)
