"""A classifier as a judge: its labels are plain transformers' own, their meaning is said, nothing foreign runs."""

import json
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from refusal_mi.errors import UserError
from refusal_mi.judges.classifier import ClassifierJudge, read_labels
from refusal_mi.judges.named import identify, judge_named
from refusal_mi.judges.protocol import ClassJudge

WORDS = [f"w{index}" for index in range(60)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NAMED = {0: "REFUSAL", 1: "partial_refusal", 2: "full-compliance"}
MEANT = {"REFUSAL": "refuse", "partial_refusal": "evade", "full-compliance": "comply"}
LONGEST = 32


def save_tokenizer(folder, longest=LONGEST):
    vocabulary = {name: index for index, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    limit = {} if longest is None else {"model_max_length": longest}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **limit).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random classifier whose weights are large enough that its labels vary."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(10)
    labels = {"id2label": NAMED, "label2id": {name: index for index, name in NAMED.items()}}
    config = BertConfig(vocab_size=64, max_position_embeddings=40, initializer_range=1.0, **SMALL, **labels)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def texts(n: int, longest: int = 25, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(n)]


def plain_labels(folder, given) -> list[str]:
    """One text at a time, through the Auto classes, without this package."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = [model(**tokenizer(text, return_tensors="pt", truncation=True)).logits for text in given]
    return [model.config.id2label[int(each.argmax())] for each in outputs]


def test_labels_are_plain_transformers_own_whatever_the_batch(bert):
    given = texts(60)
    expected = [MEANT[name] for name in plain_labels(bert, given)]
    assert set(expected) == {"refuse", "evade", "comply"}
    for size in (1, 7, 64):
        assert ClassifierJudge(str(bert), batch_size=size)(given) == expected
    shuffled = given[::-1]
    assert ClassifierJudge(str(bert))(shuffled) == expected[::-1]
    judge = judge_named(f"classifier:{bert}")
    assert isinstance(judge, ClassJudge) and judge.name == "classifier_tiny-bert"
    assert judge.complied(given, given) == [label == "comply" for label in expected]
    assert judge([f"<think>{given[1]}</think>{given[0]}"]) == expected[:1] and judge([]) == []


@pytest.mark.parametrize("padding", [None, 5])
def test_a_decoder_is_read_at_its_last_token_whatever_its_tokenizer_pads_with(tmp_path, padding):
    """Without a padding token one text at a time; with one that the tokenizer does not know of, with that."""
    torch.manual_seed(3)
    named = {"id2label": NAMED, "label2id": {name: index for index, name in NAMED.items()}}
    ids = {"pad_token_id": padding, "bos_token_id": 2, "eos_token_id": 3}
    config = GPT2Config(
        vocab_size=64, n_positions=40, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0, **named, **ids
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    given = [text for text in texts(40) if WORDS[1] not in text.split()]  # w1 is the padding
    expected = [MEANT[name] for name in plain_labels(tmp_path, given)]
    assert len(set(expected)) > 1
    for size in (1, 7, 64):
        assert ClassifierJudge(str(tmp_path), batch_size=size)(given) == expected


def test_a_model_of_another_kind_is_no_classifier(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no classifier of texts, but a GPT2LMHeadModel"):
        ClassifierJudge(str(tmp_path))(["w1"])


def test_other_weights_are_another_judge(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "again")
    judge = ClassifierJudge(str(folder))
    before = identify(judge)
    assert before == identify(ClassifierJudge(str(folder))), "the control"
    model = BertForSequenceClassification.from_pretrained(folder)
    model.classifier.bias.data += 1
    model.save_pretrained(folder)
    assert identify(judge) != before and identify(judge)["model"] == before["model"]


def test_a_long_answer_is_read_to_its_limit_and_that_is_said(bert, recwarn):
    tail = " ".join(WORDS[:40])
    long = [f"{' '.join(text.split()[:1] * 30)} {tail}" for text in texts(8)]
    judge = ClassifierJudge(str(bert))
    assert not recwarn.list and judge(texts(3)) and not [each for each in recwarn.list if "longer" in str(each.message)]
    with pytest.warns(UserWarning, match="8 of 9 answers are longer than its 32 tokens"):
        found = judge([*long, "w1"])
    assert found[:8] == judge([" ".join(text.split()[:30]) for text in long])  # with [CLS] and [SEP] 32
    assert found[:8] == [MEANT[name] for name in plain_labels(bert, long)]


def test_the_table_of_positions_is_a_limit_too(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64, max_position_embeddings=24, pad_token_id=0, id2label={0: "NORMAL", 1: "REJECTION"}, **SMALL
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, None)
    with pytest.warns(UserWarning, match="1 of 2 answers are longer than its 23 tokens"):
        assert set(ClassifierJudge(str(tmp_path))(["w1 " * 100, "w2"])) <= {"refuse", "comply"}


def renamed(bert, folder, names):
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: index for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_what_labels_mean_is_said_or_asked(bert, tmp_path):
    given = texts(20)
    named = renamed(bert, tmp_path / "other", ["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(UserError, match=r"LABEL_0, LABEL_1, LABEL_2 is not clear.*--judge-labels LABEL_0=refuse"):
        ClassifierJudge(named)(given)
    judge = judge_named(f"classifier:{named}", labels="LABEL_0=refuse, LABEL_1=evade,LABEL_2=comply")
    assert judge(given) == ClassifierJudge(str(bert))(given)
    two = judge_named(f"classifier:{named}", labels="LABEL_0=refuse,LABEL_1=comply,LABEL_2=comply")
    assert two(given) == ["comply" if label == "evade" else label for label in judge(given)]
    assert identify(two)["labels"] == "LABEL_0=refuse,LABEL_1=comply,LABEL_2=comply"
    with pytest.raises(UserError, match=r"has no label 'LABL_0'; did you mean 'LABEL_0'"):
        judge_named(f"classifier:{named}", labels="LABL_0=refuse")(given)
    with pytest.raises(UserError, match=r"unknown class 'refused'; did you mean 'refuse'"):
        read_labels("LABEL_0=refused")
    for bad in ("LABEL_0", "=refuse", ""):
        with pytest.raises(UserError, match="takes LABEL=CLASS"):
            read_labels(bad)


def test_what_is_no_whole_classifier_is_refused(bert, tmp_path):
    torch.manual_seed(0)
    bare = tmp_path / "bare"
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=40, **SMALL)).save_pretrained(bare)
    save_tokenizer(bare)
    with pytest.raises(UserError, match="is no classifier of texts, but a BertModel"):
        ClassifierJudge(str(bare))(["w1"])
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(UserError, match="is no whole classifier: classifier"):
        judge_named(f"classifier:{bare}", labels="LABEL_0=comply,LABEL_1=refuse")(["w1"])
    pickled = tmp_path / "pickled"
    shutil.copytree(bert, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(BertForSequenceClassification.from_pretrained(bert).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load the classifier .*pickled"):
        judge_named(f"classifier:{pickled}")(["w1"])
    one = renamed(bert, tmp_path / "one", ["SCORE"])
    with pytest.raises(UserError, match="at least two labels"):
        judge_named(f"classifier:{one}")(["w1"])
    with pytest.raises(UserError, match="cannot read the config of"):
        judge_named(f"classifier:{tmp_path / 'nowhere'}")(["w1"])


def test_code_beside_a_classifier_does_not_run(bert, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot read the config"):
        judge_named(f"classifier:{folder}")(["w1"])
    assert not (tmp_path / "ran").exists()
