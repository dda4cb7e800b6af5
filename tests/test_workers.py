from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent.protocol.errors import DeviceUnreachable, ShoalError
from exporter.workers import ResultCache, Workers, content_key, map_cached

ROOT = Path(__file__).resolve().parent.parent


def power_table(base, exponent):
    """Cheap work with floating point in it; leaves a mark where it ran."""
    values = np.sqrt(np.arange(1, 50, dtype=np.float64)) ** exponent
    return {"sum": np.float64(values.sum() * base), "values": values, "pid": np.int64(os.getpid())}


def slow_first(context, item):
    deadline = time.monotonic() + 20
    while item == 0 and time.monotonic() < deadline and not Path(context).exists():
        time.sleep(0.01)
    if item == 1:
        Path(context).touch()
    return {"item": np.int64(item)}


def marks_folder(folder, item):
    (Path(folder) / str(item)).touch()
    return {"item": np.int64(item)}


def endless(folder, item):
    (Path(folder) / str(item)).touch()
    while item:
        time.sleep(0.05)
    return {"item": np.int64(item)}


def fails(context, item):
    raise ShoalError(f"class {item} cannot be pruned", "keep more of it")


def dies(context, item):
    os._exit(3)


def key_of(item):
    return content_key(item=item)


def without_pid(results):
    return [{k: v.tobytes() for k, v in r.items() if k != "pid"} for r in results]


def still_at_work(group):
    """Processes of a process group that have not ended (a zombie has)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_results_come_in_the_order_of_the_items_whoever_finishes_first(tmp_path):
    results = map_cached(
        slow_first, str(tmp_path / "go"), [0, 1], key_of, workers=Workers(processes=2)
    )

    assert [int(r["item"]) for r in results] == [0, 1]


def test_processes_give_the_bytes_that_one_process_gives():
    items = [3, 1, 2, 5]

    alone = map_cached(power_table, 2.5, items, key_of, workers=Workers(processes=1))
    shared = map_cached(power_table, 2.5, items, key_of, workers=Workers(processes=2))

    assert without_pid(alone) == without_pid(shared)
    assert {int(r["pid"]) for r in alone} == {os.getpid()}
    assert os.getpid() not in {int(r["pid"]) for r in shared}


def test_dask_workers_give_the_bytes_that_processes_give(tmp_path):
    distributed = pytest.importorskip("distributed")
    cache = ResultCache(tmp_path)
    items = [3, 1, 2, 5]
    expected = map_cached(power_table, 2.5, items, key_of, workers=Workers(processes=1))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        scheduler = Workers(dask_scheduler=cluster.scheduler_address)
        results = map_cached(power_table, 2.5, items, key_of, cache=cache, workers=scheduler)
        with pytest.raises(ShoalError, match="class 7 cannot be pruned") as failure:
            map_cached(fails, None, [7], key_of, workers=scheduler)

    assert without_pid(results) == without_pid(expected)
    assert os.getpid() not in {int(r["pid"]) for r in results}
    assert all(cache.read(key_of(item)) is not None for item in items)
    assert failure.value.hint == "keep more of it"


def test_missing_dask_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(ShoalError, match="pip install 'shoal\\[dask\\]'"):
        map_cached(
            power_table, 1.0, [1], key_of, workers=Workers(dask_scheduler="tcp://127.0.0.1:1")
        )


def test_absent_scheduler_is_unreachable(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("exporter.workers.DASK_TIMEOUT_S", 0.2)

    with pytest.raises(DeviceUnreachable, match="no dask scheduler at"):
        map_cached(
            power_table, 1.0, [1], key_of, workers=Workers(dask_scheduler="tcp://127.0.0.1:1")
        )


def test_cached_results_are_not_computed_again(tmp_path):
    cache, folder = ResultCache(tmp_path / "cache"), tmp_path / "marks"
    folder.mkdir()
    one = Workers(processes=1)
    first = map_cached(marks_folder, str(folder), [1, 2], key_of, cache=cache, workers=one)
    for mark in folder.iterdir():
        mark.unlink()

    again = map_cached(marks_folder, str(folder), [2, 1, 3, 3], key_of, cache=cache, workers=one)

    assert [int(r["item"]) for r in again] == [2, 1, 3, 3]
    assert without_pid(again[:2]) == without_pid(first[::-1])
    assert [mark.name for mark in folder.iterdir()] == ["3"]


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b + b"x", lambda b: b"", None])
def test_damaged_entry_is_computed_again(tmp_path, damage):
    cache = ResultCache(tmp_path)
    key, other = key_of(1), key_of(2)
    cache.write(key, {"x": np.arange(3)})
    cache.write(other, {"x": np.arange(4)})
    path = tmp_path / f"{key}.result"
    if damage is None:  # a whole entry, but of another key
        path.write_bytes((tmp_path / f"{other}.result").read_bytes())
    else:
        path.write_bytes(damage(path.read_bytes()))

    assert cache.read(key) is None
    [result] = map_cached(power_table, 1.0, [1], key_of, cache=cache, workers=Workers(processes=1))
    assert set(result) == {"sum", "values", "pid"}
    assert cache.read(key)["values"].shape == (49,)


@pytest.mark.parametrize("offset", range(0, 400, 37))
def test_any_flipped_bit_is_noticed(tmp_path, offset):
    cache = ResultCache(tmp_path)
    cache.write(key_of(1), {"x": np.arange(30)})
    path = tmp_path / f"{key_of(1)}.result"
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 4
    path.write_bytes(bytes(data))

    assert cache.read(key_of(1)) is None


def test_objects_are_not_kept(tmp_path):
    with pytest.raises(ShoalError, match="cannot be kept"):
        ResultCache(tmp_path).write(key_of(1), {"x": np.array([{}], object)})

    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_finished_results_and_ends_the_workers(tmp_path):
    cache, folder = ResultCache(tmp_path / "cache"), tmp_path / "marks"
    folder.mkdir()

    def interrupt(what, done, total):
        if done == 1:
            deadline = time.monotonic() + 20  # until both workers are at work
            while len(list(folder.iterdir())) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_cached(
            endless,
            str(folder),
            [0, 1, 2],
            key_of,
            cache=cache,
            workers=Workers(processes=2),
            progress=interrupt,
        )

    assert cache.read(key_of(0)) is not None
    assert cache.read(key_of(1)) is None
    assert multiprocessing.active_children() == []
    assert list((tmp_path / "cache").glob("*.part")) == []


def test_ctrl_c_in_the_terminal_ends_all_processes_and_keeps_the_cache(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from exporter.workers import ResultCache, Workers, map_cached\n"
        "from test_workers import endless, key_of\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[1])\n"
        "    map_cached(endless, str(folder), [0, 1, 2], key_of,\n"
        "               cache=ResultCache(folder / 'cache'), workers=Workers(processes=2))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    entry = tmp_path / "cache" / f"{key_of(0)}.result"
    deadline = time.monotonic() + 60
    while not (entry.exists() and (tmp_path / "1").exists() and (tmp_path / "2").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)

    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)

    assert b"KeyboardInterrupt" in errors
    assert ResultCache(tmp_path / "cache").read(key_of(0)) is not None
    while still_at_work(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_failure_in_a_worker_reaches_the_caller_with_its_hint():
    with pytest.raises(ShoalError, match=r"class [45] cannot be pruned") as failure:
        map_cached(fails, None, [4, 5], key_of, workers=Workers(processes=2))

    assert failure.value.hint == "keep more of it"


def test_a_worker_that_dies_is_reported():
    with pytest.raises(ShoalError, match="a worker process ended before its work"):
        map_cached(dies, None, [1, 2], key_of, workers=Workers(processes=2))


def test_progress_counts_cached_results_as_done(tmp_path):
    cache, told = ResultCache(tmp_path), []
    cache.write(key_of(1), {"x": np.arange(1)})

    map_cached(
        power_table,
        1.0,
        [1, 2, 3],
        key_of,
        cache=cache,
        workers=Workers(processes=1),
        progress=lambda *step: told.append(step),
        what="prune",
    )

    assert told == [("prune", 1, 3), ("prune", 2, 3), ("prune", 3, 3)]


def test_equal_inputs_have_one_key():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    key = content_key(classes=(1, 2), base=b"x", data=array, options={"a": 1, "b": 0.5})

    assert key == content_key(
        options={"b": 0.5, "a": 1}, data=array.copy(order="F"), base=b"x", classes=[1, 2]
    )
    assert len(key) == 64
    int(key, 16)


def test_any_difference_of_inputs_gives_another_key():
    array = np.arange(6, dtype=np.float32)
    values = [
        None, True, 1, 1.0, "1", b"1", 0, -0.0, 0.0, math.nan, [], [1], [[1]], {"1": 1}, {1}, "",
        array, array.reshape(2, 3), array.astype(np.float64), array + 1, array[:5], np.float32(1),
    ]  # fmt: skip

    keys = {content_key(value=value) for value in values}

    assert len(keys) == len(values)


def test_values_without_a_canonical_form_are_refused():
    for value in (object(), np.array([object()]), {1: 2}):
        with pytest.raises(TypeError, match="no canonical form"):
            content_key(value=value)


def test_entered_workers_keep_their_processes_from_one_call_to_the_next():
    with Workers(processes=2) as workers:
        first = map_cached(power_table, 2.5, [1, 2, 3], key_of, workers=workers)
        processes = set(multiprocessing.active_children())
        second = map_cached(power_table, 1.5, [1, 2, 3], key_of, workers=workers)
        assert set(multiprocessing.active_children()) == processes != set()

    assert {int(r["pid"]) for r in second} <= {process.pid for process in processes}
    assert float(second[0]["sum"]) != float(first[0]["sum"])
    assert multiprocessing.active_children() == []
