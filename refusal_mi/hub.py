"""The hub, asked once: where it does not answer, its cache is read instead of trying again and again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock, Thread
from typing import Any

from .errors import UserError, cause

PATIENCE = 2.0
"""Seconds that the hub has for its first answer."""
_ONE_THREAD = RLock()


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of another library's module is `value`; a second thread waits, and finds it as it was."""
    with _ONE_THREAD:
        before = getattr(holder, name)
        try:
            setattr(holder, name, value)
            yield
        finally:
            setattr(holder, name, before)


@contextmanager
def no_hub() -> Iterator[None]:
    """Inside, the hub is not asked; what its cache has can be read."""
    from huggingface_hub import constants

    with replaced(constants, "HF_HUB_OFFLINE", True):
        yield


@contextmanager
def hub_or_cache() -> Iterator[bool]:
    """Inside, the hub's cache alone is read where the hub does not answer; its client would try for half a minute.

    Yields:
        whether the hub was there, or was not to be asked (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants

    with _ONE_THREAD:
        is_unwanted = constants.HF_HUB_OFFLINE
        is_there = is_unwanted or answers(constants.ENDPOINT)
        with replaced(constants, "HF_HUB_OFFLINE", is_unwanted or not is_there):
            yield is_there


def answers(url: str) -> bool:
    """Whether anything at all comes back; in a thread, because looking up a name has no time limit of its own."""
    from huggingface_hub import get_session

    statuses: list[int] = []

    def ask() -> None:
        try:
            statuses.append(get_session().head(url, timeout=PATIENCE).status_code)
        except Exception:  # foreign code: the transports have classes of their own, which differ between versions
            return

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(statuses)


def check_repository(name: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UserError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub takes NAME or OWNER/NAME: {cause(error)}") from None


def push(files: Mapping[str, Path | bytes], name: str, *, private: bool = True, mark: str, kept: Path) -> str:
    """Upload files as a model of the hub, in one commit that takes older weights away; return its address.

    Args:
        files: name in the repository -> file or its contents.
        name: NAME in your own space, or OWNER/NAME; a repository that is there gets another commit, and stays as
            visible as it is.
        private: of a new repository.
        mark: the file that a repository must have before its weights are replaced.
        kept: the folder of the files, which an error names.

    Raises:
        UserError: the hub does not answer, or does not let you, or the repository has weights and no mark; nothing
            of the folder is lost.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    try:
        hub = HfApi()
        made = hub.create_repo(name, private=private, exist_ok=True)
        there = hub.list_repo_files(made.repo_id)
        old = [each for each in there if _is_weights(each)]
        if old and mark not in there:
            raise UserError(
                f"{made.repo_id} has weights ({old[0]}) and no {mark}: it is no upload of this program and is not "
                f"replaced; choose another name for --push-to-hub; the export is in {kept}"
            )
        commit: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit += [CommitOperationDelete(each) for each in old if each not in files]
        hub.create_commit(made.repo_id, commit, commit_message="An export of refusal_mi")
    except UserError:
        raise
    except Exception as error:  # foreign code: the transports have classes of their own
        raise UserError(f"the hub did not take it ({cause(error)}); the export is in {kept}") from None
    return str(made)


def _is_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".index.json")) or path.rpartition("/")[2].startswith("adapter_")
