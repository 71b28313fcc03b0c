"""What loading may not do: run a stranger's code, install packages, ask on stdin, wait for a hub that is not there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, cause
from ..hub import hub_or_cache, no_hub, replaced


@contextmanager
def guarded(source: str, *, trust_remote_code: bool = False, is_hub_asked: bool = True) -> Iterator[bool]:
    """Every call that reads a config, a tokenizer or weights with transformers is made in here.

    Args:
        source: directory, file or hub id; the hub is asked for the latter alone.
        trust_remote_code: whether Python files beside the model's may run.
        is_hub_asked: whether the hub is, or its cache alone read.

    Yields:
        False where the hub was asked and did not answer.
    """
    with ExitStack() as stack:
        is_there = True
        if is_hub_asked and not Path(source).exists():
            is_there = stack.enter_context(hub_or_cache())
        else:
            stack.enter_context(no_hub())
        if not trust_remote_code:
            stack.enter_context(no_remote_code())
        yield is_there


@contextmanager
def no_remote_code() -> Iterator[None]:
    """Inside, transformers refuses code that lies beside a model's files at once: by itself it asks on stdout.

    A call with `trust_remote_code=False` refuses as well; this reaches the calls that other libraries make.
    """
    from transformers import dynamic_module_utils as remote

    with replaced(remote, "TIME_OUT_REMOTE_CODE", 0):
        yield


@contextmanager
def no_processor() -> Iterator[None]:
    """Inside, TransformerLens loads no image or audio processor: for text none is needed, and it installs packages."""
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    with ExitStack() as stack:
        check = getattr(ArchitectureAdapter, "_check_required_libraries", None)  # none in TransformerLens 3
        if check is not None:

            def check_others(adapter: Any) -> None:
                if adapter.required_libraries != ["torchvision"]:  # the processor's alone
                    check(adapter)

            stack.enter_context(replaced(ArchitectureAdapter, "_check_required_libraries", check_others))
        try:
            from transformer_lens.model_bridge.sources.transformers import helpers
        except ImportError:  # TransformerLens 3 has no list of them
            from transformers import AutoProcessor

            stack.enter_context(replaced(AutoProcessor, "from_pretrained", lambda *_, **__: None))
        else:
            stack.enter_context(replaced(helpers, "_MODALITY_PROCESSOR_LOADERS", []))
        yield


def read_config(source: str | Path, revision: str | None = None) -> Any:
    """The HF config of a directory, hub id or GGUF file.

    Raises:
        UserError: there is none, or it cannot be read without running code of its own.
    """
    from transformers import AutoConfig

    file, where = Path(source), str(source) if revision is None else f"{source} at revision {revision}"
    place: dict[str, Any] = {"gguf_file": file.name} if file.is_file() else {}
    try:
        with guarded(str(source)):
            return AutoConfig.from_pretrained(
                file.parent if place else source, revision=revision, trust_remote_code=False, **place
            )
    except Exception as error:  # foreign code
        raise UserError(f"cannot read the config of {where}: {cause(error)}") from error
