"""An option is said once: a dataclass field with its help. The command line and the line that repeats a run follow."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .errors import UserError

Quantization = Literal["bnb-4bit", "bnb-8bit"]
"""bitsandbytes, on CUDA."""
KLFormula = Literal["exact", "published"]
"""Σ p (ln p − ln q); or the one of the published code, Σ p (ln(p + 1e-6) − ln(q + 1e-6))."""
Positions = Literal["all", "prompt", "response"]
"""Where an intervention acts: everywhere; on the prompt; or from the last prompt token on (it writes the first
answer token) and on every generated token."""


LAYER_LIST = "3, 3,5, 3-7 (or 3..7), 3:8 (3 to 7)"
RANK_LIST = "0, 0-2 (ranks 0 and 2), 0..2 (0 to 2)"
MEANINGS: Mapping[str, str] = {
    "batch_size": "Prompts per forward pass, or auto: as many as fit. Default auto; in caa and responses eval 8, in "
    "caa ab 16.",
    "column": "Column that holds the prompt, in files and in other sets of the hub.",
    "direction": "A .pt file or a run folder, whose direction is ablated, in audit compared; default: none in chat and "
    "audit, in export the run of MODEL.",
    "hook": "Where a bare vector was read, such as blocks.13.hook_resid_post; --layer then says where it is added.",
    "images": "Figures as .png and .pdf beside the .html; needs Chromium.",
    "judge": "Who says whether the model complied: substring (default), evade (refuse, evade or comply, by rules), "
    "classifier:MODEL, llamaguard, the URL of an endpoint, refusal:URL, or strongreject: with a URL or MODEL.",
    "kl_max": "Largest KL on harmless prompts, in nats; inf: any. Default 0.1; in responses eval any.",
    "layer": "The stream entering this block, in caa the output of this block: where a bare vector was read, and where "
    "it is added.",
    "layers": f"all, or {LAYER_LIST}: blocks, in caa their outputs, in responses the streams entering them. Default "
    "all.",
    "max_new_tokens": "Of every answer. Default: in complete the run's; in caa 50; in responses, localize, "
    "compare-methods and variants 64; elsewhere 512, for run on the embedded model 64.",
    "multi": "How several directions are removed. span (default): their span; sequential: one after the other at every "
    "block's input and write, as published, which leaves some of the first (3-8% of its size on the embedded model) "
    "and cannot be exported.",
    "multipliers": "How often the vector is added, such as -1 0 1. Default 1,2,3 in caa test, which subtracts it as "
    "well; -1,0,1 in caa ab.",
    "n_ce": "At most this many texts of each CE set. Default 4096; in combos 256.",
    "n_prompts": "Prompts a side, at most. Default 128; in localize, compare-methods and variants 100.",
    "n_questions": "Only the first of the questions. Default all; in caa ab 40, and 0 chooses nothing.",
    "n_random": "Random controls of equal size beside the result. Default 1; in combos 3, in localize and "
    "compare-methods 5.",
    "output": "The file to write, whose ending says the format; default: beside what is read.",
    "output_dir": "The folder to write; default runs/{alias}, the run folder, or the command's own folder inside it, "
    "in study runs/{name}, in audit none.",
    "pairs": "A/B pairs: a file, or the name of a bundled set. Default: those for training in caa vectors, held-out "
    "ones in caa ab.",
    "positions": "Where the vector is added: all, prompt, or response (from the last prompt token on). Default all; in "
    "caa response.",
    "questions": "Open questions: a file, or the name of a bundled set.",
    "quick": "A run on small samples, marked as such in every file.",
    "refusal_tokens": "Token ids of the refusal score; default: discovered.",
    "seed": "Of every random draw. Default 42; of the controls of analyze and caa vectors 0.",
    "workers": "How many at a time: in complete requests, default 4; elsewhere copies of the model under ray, default: "
    "one a GPU, without GPUs 2.",
}
"""What an option means that several commands have, and its defaults where they differ: said once."""


@dataclass(frozen=True)
class Option:
    """How a field of a dataclass is said on the command line; where nothing is given, as its name and type say."""

    help: str
    flags: str | None = None
    """Such as "--filter/--no-filter"."""
    metavar: str | None = None
    takes: Any = None
    """What the command line takes; None is the field's own type."""
    read: Callable[[Any], Any] | None = None
    """From that to the field's value; a mistake is a UserError."""
    write: Callable[[Any], Any] | None = None
    """And back: a text, or a list of texts for an option that is given several times."""
    depends_on_model: bool = False
    """The command line's default is nothing, and the model decides."""
    own_default: bool = False
    """The commands that have it differ in the default: the command line's is nothing, and the help tells them."""
    off: Any = None
    """Of a field that is a dataclass: its value under --no-FIELD."""
    hidden: bool = False


@dataclass(frozen=True)
class Said:
    """A field, its type without annotations, and how it is said."""

    field: "Field[Any]"
    kind: Any
    option: Option

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        """The option's name, of a switch the one that turns it on."""
        return (self.option.flags or f"--{self.name.replace('_', '-')}").partition("/")[0]

    @property
    def default(self) -> Any:
        """The field's default."""
        factory = self.field.default_factory
        return self.field.default if not callable(factory) else factory()


def said(kind: type) -> Iterator[Said]:
    """The fields of a dataclass that are options; the others have no `Option` in their annotation."""
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        annotation = hints[each.name]
        if get_origin(annotation) is Annotated:
            bare, *extras = get_args(annotation)
            for option in extras:
                if isinstance(option, Option):
                    yield Said(each, bare, option)


def words(options: Any) -> list[str]:
    """The command-line words for every option that is not at its default, or whose default depends on the model."""
    line: list[str] = []
    for each in said(type(options)):
        value = getattr(options, each.name)
        if is_dataclass(value):
            is_off = each.option.off is not None and value == each.option.off
            line += [f"--no-{each.name}"] if is_off else words(value)
        elif value == each.default and not each.option.depends_on_model:
            continue
        elif each.kind is bool:
            on, _, off = (each.option.flags or each.flag).partition("/")
            line.append(on if value else off)
        elif each.option.write is not None:
            written = each.option.write(value)
            for text in written if isinstance(written, list) else [written]:
                line += [each.flag, text]
        else:
            line += [each.flag, str(value)]
    return line


def numbers(option: str) -> Callable[[str], tuple[float, ...]]:
    """Reads finite numbers separated by commas or spaces."""

    def read(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.replace(",", " ").split())
        except ValueError:
            values = ()
        if not values or not all(map(math.isfinite, values)):
            raise UserError(f"{option} takes numbers such as 0 0.5 1, not {text!r}")
        return values

    return read


_LONGEST_RANGE = 10_000


def _whole_numbers(option: str, text: str, usage: str, *, hyphen_joins: bool) -> list[int]:
    """The numbers of a list: N..M holds both ends, N:M not the last, and N-M is either N..M or the two numbers."""
    found: list[int] = []
    if re.search(r"(^|,)\s*(,|$)", text):
        raise UserError(f"{option} takes {usage}, not {text!r}")
    for part in text.replace(",", " ").split():
        if hyphen_joins and re.fullmatch("[0-9]+(-[0-9]+)+", part):
            found += map(int, part.split("-"))
            continue
        match = re.fullmatch(r"([0-9]+)(?:(-|\.\.|:)([0-9]+))?", part)
        if match is None:
            raise UserError(f"{option} takes {usage}, not {text!r}")
        first, last = int(match[1]), int(match[3] or match[1]) - (match[2] == ":")
        if not 0 <= last - first < _LONGEST_RANGE:
            raise UserError(f"{option} {part!r} {'counts down or is empty' if last < first else 'is too long'}")
        found += range(first, last + 1)
    return found


def layer_numbers(text: str | None) -> tuple[int, ...] | None:
    """Layers such as 3,5-7 or 3..7, or 3:8 without the last; None or "all" is all of them.

    Raises:
        UserError: it is no such list.
    """
    if text is None or text == "all":
        return None
    usage = f"all, or numbers and ranges such as {LAYER_LIST}"
    return tuple(sorted(set(_whole_numbers("--layers", text, usage, hyphen_joins=False))))


def rank_numbers(text: str, option: str = "--directions") -> tuple[int, ...]:
    """Ranks in the order in which they are written: 0-2 is ranks 0 and 2 (the published form), 0..2 is 0, 1 and 2.

    Raises:
        UserError: it is no such list, or names a rank twice.
    """
    ranks = tuple(_whole_numbers(option, text, f"ranks such as {RANK_LIST}", hyphen_joins=True))
    if len(set(ranks)) < len(ranks):
        raise UserError(f"{option} {text} names a rank twice")
    return ranks


def in_words(ranks: Sequence[int]) -> str:
    """ "rank 0", "ranks 0 and 2", "ranks 0, 1 and 2"."""
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def check_choice(option: str, value: object, names: Iterable[str]) -> None:
    """Refuse a value that an option does not take, and say the near one.

    Raises:
        UserError: it is none of the names.
    """
    known = list(names)
    if value in known:
        return
    near = get_close_matches(str(value).lower(), known, n=1, cutoff=0.5)
    *most, last = known
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{option} takes {', '.join(most)} or {last}, not {value!r}{hint}")


def position_scope(text: str) -> Positions:
    """all, prompt or response."""
    check_choice("--positions", text, get_args(Positions))
    return text  # type: ignore[return-value]


def number_or_auto(text: str | None) -> int | None:
    """A positive number; None for auto and where nothing was given."""
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size takes auto or a positive number, not {text!r}")
    return int(text)


def texts_by_key(pairs: "list[str] | None") -> dict[str, Any]:
    """K=V texts; true, false and numbers become values of their type."""
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--template-kwargs takes K=V, not {pair!r}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def token_ids(text: str | None) -> tuple[int, ...] | None:
    """Comma-separated token ids."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--refusal-tokens takes token ids such as 40,2121, not {text!r}")
    return tuple(map(int, parts))


Layers = Annotated[
    tuple[int, ...] | None,
    Option(MEANINGS["layers"], takes=str | None, read=layer_numbers),
]
RefusalTokens = Annotated[
    tuple[int, ...] | None,
    Option(
        MEANINGS["refusal_tokens"],
        takes=str | None,
        read=token_ids,
        write=lambda tokens: ",".join(map(str, tokens)),
    ),
]
ResponsePrefix = Annotated[str | None, Option("Text that every answer begins with; default: found by generating.")]
System = Annotated[str | None, Option("System message; default: what the template does without one.")]
TemplateKwargs = Annotated[
    Mapping[str, Any],
    Option(
        "Passed to the chat template; repeatable.",
        flags="--template-kwargs",
        metavar="K=V",
        takes=list[str] | None,
        read=texts_by_key,
        write=lambda pairs: [f"{key}={json.dumps(value)}" for key, value in pairs.items()],
    ),
]
AllowSpecialTokens = Annotated[
    bool,
    Option(
        "Special tokens written out in a prompt act as such; default: they are text.", flags="--allow-special-tokens"
    ),
]
JUDGE_METAVAR = "NAME|URL"
JudgeName = Annotated[str, Option(MEANINGS["judge"], flags="--judge", metavar=JUDGE_METAVAR, own_default=True)]
JudgeModel = Annotated[str | None, Option("Model name that the judge's endpoint is asked for.")]
JudgeLabels = Annotated[
    str | None,
    Option(
        "What a classifier's labels mean: refuse, evade or comply; default: by their names.",
        metavar="LABEL=CLASS,...",
    ),
]
BATCH_SIZE = Option(
    MEANINGS["batch_size"],
    takes=str,
    own_default=True,
    read=number_or_auto,
    write=lambda size: "auto" if size is None else str(size),
)
BatchSize = Annotated[int | None, BATCH_SIZE]
Seed = Annotated[int, Option(MEANINGS["seed"], own_default=True)]
NRandom = Annotated[int, Option(MEANINGS["n_random"], own_default=True)]
NewTokens = Annotated[int, Option(MEANINGS["max_new_tokens"], own_default=True)]
Column = Annotated[str | None, Option(MEANINGS["column"])]
NTexts = Annotated[int, Option(MEANINGS["n_ce"], own_default=True)]
