"""The same work for many candidates: on processes or machines, with results that outlive a break.

Every result is kept on disk under the SHA-256 of what it was made from as soon as it is there. An
interrupted search, run again, continues; a damaged entry is computed anew. A result does not depend
on how many workers there are or in what order they finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DeviceUnreachable, ShoalError
from exporter.quantize.native_stderr import captured_native_stderr

Arrays = Mapping[str, NDArray[Any]]
"""A result: named arrays, no objects."""
Work = Callable[[Any, Any], Arrays]
"""(context, item) -> result. A module-level function, since it is sent to other processes."""
Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")

DASK_PIP_LINE = "pip install 'shoal[dask]'"
DASK_TIMEOUT_S = 20
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""What a worker's environment says before it loads TensorFlow: workers are the parallelism."""


@dataclass(eq=False)
class Workers:
    """Who works.

    As a context manager it keeps its processes from one `map_cached` to the next: each takes
    seconds to load TensorFlow.

    Attributes:
        processes: 1 = in this process; more = so many others. None = one per processor.
        dask_scheduler: Address such as `tcp://host:8786`; its workers then do all the work.
    """

    processes: int | None = None
    dask_scheduler: str | None = None
    _kept: bool = field(default=False, init=False, repr=False)
    _pool: ProcessPoolExecutor | None = field(default=None, init=False, repr=False)
    _others: frozenset[Any] = field(default=frozenset(), init=False, repr=False)

    def __enter__(self) -> Workers:
        """Keep processes, once they are needed."""
        self._kept = True
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._kept = False
        self._end()

    @property
    def most(self) -> int:
        """How many work at a time."""
        return self.processes or os.cpu_count() or 1

    @contextlib.contextmanager
    def pool(self) -> Iterator[ProcessPoolExecutor]:
        """Processes; on an error inside, they are ended at once."""
        if self._pool is None:
            self._others = frozenset(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                self.most,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
            )
        try:
            yield self._pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
            self._end()
            raise
        if not self._kept:
            self._end()

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def content_key(**inputs: Any) -> str:
    """The SHA-256 (64 hex digits) of inputs in one canonical form.

    Equal inputs give equal keys on every machine and in every order of keywords; any change of a
    value, type, array shape or dtype gives another.

    Args:
        inputs: None, bool, int, float, str, bytes, arrays, and lists, tuples, sets or mappings
            (with str keys) of these. Tuples and lists are the same.

    Raises:
        TypeError: another type: its text may not tell two values apart.
    """
    text = json.dumps(_canonical(inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        data = np.ascontiguousarray(value)
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        return {"array": [data.dtype.str, list(value.shape), digest]}
    if isinstance(value, (list, tuple)):
        return [_canonical(x) for x in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(json.dumps(_canonical(x), sort_keys=True) for x in value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"map": {key: _canonical(x) for key, x in value.items()}}
    raise TypeError(f"a {type(value).__name__} has no canonical form")


class ResultCache:
    """Results by key in a folder, one file each, written whole or not at all.

    A file is the SHA-256 of its key and body, then the body, an .npz. Whatever does not match is as
    good as absent.

    Args:
        folder: Made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def read(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The result of this key, None where there is none or it is damaged."""
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, body = data[:32], data[32:]
        if hashlib.sha256(key.encode() + body).digest() != digest:
            return None
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def write(self, key: str, result: Arrays) -> None:
        """Keep a result.

        Raises:
            ShoalError: a result that is not named plain arrays.
        """
        body = io.BytesIO()
        try:
            np.savez(body, allow_pickle=False, **_plain(result))
        except ValueError as error:
            raise ShoalError(f"result {key[:12]} cannot be kept: {error}") from None
        data = body.getvalue()
        handle, part = tempfile.mkstemp(dir=self._folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(key.encode() + data).digest() + data)
            os.replace(part, self._path(key))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.result"


def _plain(result: Arrays) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(array) for name, array in result.items()}


def map_cached(
    work: Work,
    context: Any,
    items: Sequence[Item],
    key: Callable[[Item], str],
    *,
    cache: ResultCache | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
    what: str = "evaluate",
) -> list[dict[str, NDArray[Any]]]:
    """`work(context, item)` for every item, in the order of the items.

    Args:
        work: A module-level function that depends on its arguments only.
        context: What all items share (base model's path, data). Sent to each worker once.
        items: One argument each. Items of one key are computed once.
        key: Canonical key of an item's result, `content_key` of all that the result depends on.
        cache: Where results are kept; written as each arrives, so that a break loses only what
            was being computed.
        workers: Who works; None: a process for every processor, for this call.
        progress: Told (what, done, total) at the start and after each new result.
        what: A word for that.

    Raises:
        ShoalError: what `work` raises; a worker that ended; dask.distributed is not installed.
        DeviceUnreachable: no dask scheduler at the address.
        KeyboardInterrupt: passed on, the workers being ended.
    """
    keys = [key(item) for item in items]
    results: dict[str, dict[str, NDArray[Any]]] = {}
    missing: dict[str, Item] = {}
    for each, item in zip(keys, items, strict=True):
        kept = cache.read(each) if cache is not None and each not in missing else None
        if kept is not None:
            results[each] = kept
        else:
            missing.setdefault(each, item)
    total = len(results) + len(missing)
    if progress is not None:
        progress(what, len(results), total)
    # Closing the generator, also on an error here, ends the workers.
    with contextlib.closing(_computed(work, context, missing, workers or Workers())) as computed:
        for each, result in computed:
            results[each] = _plain(result)
            if cache is not None:
                cache.write(each, results[each])
            if progress is not None:
                progress(what, len(results), total)
    return [results[each] for each in keys]


def _computed(
    work: Work, context: Any, items: Mapping[str, Any], workers: Workers
) -> Generator[tuple[str, Arrays], None, None]:
    if not items:
        return
    if workers.dask_scheduler is not None:
        yield from _by_dask(work, context, items, workers.dask_scheduler)
        return
    if min(workers.most, len(items)) > 1:
        yield from _by_processes(work, context, items, workers)
        return
    for key, item in items.items():
        yield key, work(context, item)


def _by_processes(
    work: Work, context: Any, items: Mapping[str, Any], workers: Workers
) -> Generator[tuple[str, Arrays], None, None]:
    with tempfile.TemporaryDirectory(prefix="shoal-work-") as folder, workers.pool() as pool:
        # By a file: a pipe that a process is slow to read would hold up the start of the next.
        shared = Path(folder) / "shared.pickle"
        shared.write_bytes(pickle.dumps((work, context)))
        futures: dict[Future[Arrays], str] = {
            pool.submit(_worker_computes, shared, item): key for key, item in items.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ShoalError(
                "a worker process ended before its work: mostly that is too little memory",
                "try fewer workers; what is done so far is kept in the cache",
            ) from None


def _start_worker() -> None:
    """Prepare a worker process: one thread, ended by Ctrl-C without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(ONE_THREAD)
    _one_thread()


def _one_thread() -> None:
    """Hold libraries that are loaded already to one thread (the environment comes too late)."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    threadpool_limits(1)


@lru_cache(maxsize=1)
def _shared(path: Path) -> tuple[Work, Any]:
    with captured_native_stderr():  # TensorFlow loads here, if the context holds a network
        work, context = pickle.loads(path.read_bytes())
    return work, context


def _worker_computes(shared: Path, item: Any) -> Arrays:
    work, context = _shared(shared)
    return _plain(work(context, item))


def _by_dask(
    work: Work, context: Any, items: Mapping[str, Any], scheduler: str
) -> Generator[tuple[str, Arrays], None, None]:
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise ShoalError("dask.distributed is not installed", DASK_PIP_LINE) from None
    try:
        client = distributed.Client(scheduler, timeout=DASK_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DeviceUnreachable(
            f"no dask scheduler at {scheduler}: {error}",
            "start one with `dask scheduler`, and workers with `dask worker ADDRESS` "
            "where shoal[exporter,dask] is installed",
        ) from None
    with client:
        shared = client.scatter(pickle.dumps((work, context)), broadcast=True, hash=False)
        futures = {
            client.submit(_dask_computes, shared, item, pure=False): key
            for key, item in items.items()
        }
        try:
            for future in distributed.as_completed(list(futures), loop=client.loop):
                yield futures[future], future.result()
        except BaseException:
            client.cancel(list(futures))
            raise


def _dask_computes(shared: bytes, item: Any) -> Arrays:
    work, context = _unpacked(shared)
    return _plain(work(context, item))


@lru_cache(maxsize=2)
def _unpacked(shared: bytes) -> tuple[Work, Any]:
    os.environ.update(ONE_THREAD)
    _one_thread()
    work, context = pickle.loads(shared)
    return work, context
