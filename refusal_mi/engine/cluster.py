"""The engine that is Ray: workers on this machine or on a cluster, each with a copy of the model."""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..errors import UserError, cause
from ..model.points import HookedModel
from .jobs import ItemsFailed, Job
from .same import SameModel

N_WORKERS = 2
"""Where the cluster has no GPU."""
MOST_LOST = 3
"""Workers that may end in a row before they are ready."""
CONNECT_SECONDS = 5.0


class Worker:
    """Lives in a process of its own: loads the model once, and serves one job after the other."""

    def __init__(self, same: SameModel, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        self.same = same
        self.model: HookedModel | None = None
        self.work: Callable[[Any], Any] | None = None

    def start(self, job: Sequence[Any]) -> None:
        """Get ready for a job, whose reference comes in a list so that it is fetched here."""
        self.work = None
        if self.model is None:
            self.model = self.same.load()
        self.work = _ray().get(job[0]).start(self.model)

    def do(self, item: Any) -> Any:
        """One item of that job."""
        assert self.work is not None
        return self.work(item)


class RayEngine:
    """Workers that Ray starts, replaces when they die, and ends with the with block (or `close`).

    Each has its own copy of the model, on one thread or one GPU: with as many workers as cores, all of a machine is
    used, and a worker gives the numbers of a process with one thread. An item whose worker dies, or that fails, is
    done again, at most `n_tries` times in all; it then fails alone.

    Args:
        address: of a cluster's client server, ray://HOST:PORT. None is the cluster that RAY_ADDRESS names or that runs
            on this machine, else one that is started here and ends with the engine.
        n_workers: copies of the model; None is one for each of the cluster's GPUs where the model is on a GPU, else 2.
        n_tries: how often an item is tried.
        n_threads: of every worker.
        n_gpus: of every worker, for a model on a GPU: a fraction shares one.

    Raises:
        UserError: Ray is not installed, nothing answers at the address, or other versions run there.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        n_workers: int | None = None,
        n_tries: int = 2,
        n_threads: int = 1,
        n_gpus: float = 1.0,
    ) -> None:
        for name, value in (("n_workers (--workers)", n_workers), ("n_tries", n_tries), ("n_threads", n_threads)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not n_gpus > 0:
            raise UserError(f"n_gpus must be above 0, not {n_gpus}")
        self.n_workers, self.n_tries, self.n_threads, self.n_gpus = n_workers, n_tries, n_threads, n_gpus
        self._ray = _ray()
        self._is_ours = _connect(self._ray, address)
        self._forget()

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the connection where this engine made it."""
        if self._ray.is_initialized():
            for worker in [*self._idle, *self._starting.values()]:
                self._ray.kill(worker)
            if self._is_ours:
                self._ray.shutdown()
        self._forget()

    def run(self, job: Job, model: HookedModel, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Index and result of every item, as they are done, in any order.

        Raises:
            UserError: what an item raises as one; or the workers do not get ready: they have other versions or other
                weights, or the object store is full.
            ItemsFailed: at the end, where some items failed as often as they may be tried.
        """
        self._serve(job, model)
        waiting, failed, n_tried = deque(range(len(items))), dict[int, str](), Counter[int]()
        doing: dict[Any, tuple[Any, int]] = {}
        n_lost = 0
        try:
            while waiting or doing:
                while waiting and self._idle:
                    worker, index = self._idle.pop(), waiting.popleft()
                    n_tried[index] += 1
                    doing[worker.do.remote(items[index])] = (worker, index)
                (done,), _ = self._ray.wait([*doing, *self._starting], num_returns=1)
                if done in self._starting:
                    n_lost = 0 if self._is_ready(done, n_lost) else n_lost + 1
                    continue
                worker, index = doing.pop(done)
                try:
                    result = self._ray.get(done)
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(worker)
                    if isinstance(error.cause, UserError | torch.OutOfMemoryError):
                        raise error.cause from None
                    why = f"{type(error.cause).__name__}: {cause(error.cause)}"
                except self._ray.exceptions.RayError as error:
                    why = f"its worker ended ({_ending(error)})"
                    self._replace(worker)
                else:
                    self._idle.append(worker)
                    n_lost = 0
                    yield index, result
                    continue
                if n_tried[index] < self.n_tries:
                    waiting.append(index)
                else:
                    failed[index] = why
        finally:  # where it ends early
            for worker, _ in doing.values():
                self._ray.kill(worker)
        if failed:
            named = "; ".join(f"{items[index]}: {why}" for index, why in sorted(failed.items()))
            raise ItemsFailed(f"{len(failed)} of {len(items)} items failed, tried {self.n_tries} times each: {named}")

    def _forget(self) -> None:
        self._job: Job | None = None
        self._same: SameModel | None = None
        self._job_reference: Any = None
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        """What is waited for -> the worker that gets ready."""

    def _serve(self, job: Job, model: HookedModel) -> None:
        """Have all workers get ready for this job, with copies of this model."""
        same = SameModel.of(model)  # every time: an edit in place leaves model and job the same objects
        if same != self._same:
            for worker in [*self._idle, *self._starting.values()]:
                self._ray.kill(worker)
            self._forget()
            self._same = same
            self._n = self._number(str(model.cfg.device).partition(":")[0] == "cuda")
        if self._job is not job:
            self._job_reference, self._job = self._put(job), job
            workers, self._idle, self._starting = [*self._idle, *self._starting.values()], [], {}
            for worker in workers:
                self._start(worker)
        for _ in range(self._n - len(self._idle) - len(self._starting)):
            self._start(self._new())

    def _number(self, on_gpu: bool) -> int:
        """How many workers there are to be."""
        there = self._ray.cluster_resources()
        self._each = {"num_cpus": self.n_threads, "num_gpus": self.n_gpus if on_gpu else 0}
        most = min(int(there.get(kind, 0) / self._each[key]) for kind, key in _KINDS.items() if self._each[key])
        n = self.n_workers or (most if on_gpu else min(N_WORKERS, most))
        if not 1 <= n <= most:
            asked = f"{max(n, 1)} workers of {self.n_threads} threads{f' and {self.n_gpus:g} GPUs' if on_gpu else ''}"
            has = f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
            raise UserError(f"Ray has {has}, too few for {asked}: ask for fewer (--workers), or start more nodes")
        return n

    def _new(self) -> Any:
        return self._ray.remote(Worker).options(max_restarts=0, **self._each).remote(self._same, self.n_threads)

    def _start(self, worker: Any) -> None:
        self._starting[worker.start.remote([self._job_reference])] = worker

    def _replace(self, worker: Any) -> None:
        self._ray.kill(worker)
        self._start(self._new())

    def _is_ready(self, started: Any, n_lost: int) -> bool:
        """Take a worker that got ready, or replace it where it died meanwhile; one that says why it cannot ends all."""
        worker = self._starting.pop(started)
        try:
            self._ray.get(started)
        except self._ray.exceptions.RayTaskError as error:
            self._ray.kill(worker)
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise UserError(f"a worker cannot start: {type(error.cause).__name__}: {cause(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            if n_lost + 1 == MOST_LOST:
                raise UserError(f"{MOST_LOST} workers ended while they loaded the model: {_ending(error)}") from error
            self._replace(worker)
            return False
        self._idle.append(worker)
        return True

    def _put(self, value: Any) -> Any:
        """A constant that all workers read, in the object store once."""
        full = self._ray.exceptions.ObjectStoreFullError, self._ray.exceptions.OutOfDiskError
        try:
            return self._ray.put(value)
        except full as error:
            raise UserError(
                f"Ray's object store is full: give it more memory (ray start --object-store-memory) or end what "
                f"else runs there ({cause(error)})"
            ) from error


_KINDS = {"CPU": "num_cpus", "GPU": "num_gpus"}


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'refusal_mi[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None) -> bool:
    """Connect to a cluster, or start one; whether that was done here."""
    if ray.is_initialized() and address is None:
        return False
    named = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = named.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # Ray itself tries for minutes, and may end this process
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {named}: {error.strerror or error}") from error
    elif address is not None:
        raise UserError(f"a Ray cluster's address is ray://HOST:PORT, not {address!r}")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # foreign code: other versions there, no cluster at all, an address that is none
        raise UserError(f"cannot use Ray{f' at {named}' if named else ''}: {cause(error)}") from error
    return True


def _ending(error: BaseException) -> str:
    """Why a worker ended, as far as Ray says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "cause" in line.lower() or "exit" in line.lower()), cause(error))[:300]
