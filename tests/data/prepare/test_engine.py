"""The same results on any number of workers, and work that is done is not done again."""

import functools
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from baichuan_jax.data.prepare import engine


def numbers(limit, item):
    values = np.arange(item, limit, 7, dtype=np.uint64)
    for remainder in range(3):
        yield (remainder,), values[values % 3 == remainder]


def sums(key, blocks):
    assert all((block % 3 == key[0]).all() for block in blocks)
    yield (key[0] % 2, key[0]), np.array([block.sum() for block in blocks])


def last(key, blocks):
    yield (0,), np.concatenate([np.array(key, np.uint64), *blocks])


def expected(limit):
    results = []
    for parity, remainder in [(0, 0), (0, 2), (1, 1)]:
        counts = [sum(v for v in range(item, limit, 7) if v % 3 == remainder) for item in range(5)]
        results.append(((0,), [parity, remainder, *counts]))
    return results


@pytest.mark.parametrize("workers", [1, 3])
def test_a_chain_gets_all_blocks_in_the_order_of_their_origin(tmp_path, workers):
    local = engine.Local(tmp_path, workers)
    results = local.run("chain", range(5), functools.partial(numbers, 1000), sums, last)
    assert [(key, block.tolist()) for key, block in results] == expected(1000)
    assert [path.name for path in tmp_path.glob("local-chain/*")] == ["results"]


def test_a_chain_that_is_complete_is_not_run_again(tmp_path):
    first = functools.partial(numbers, 1000)
    engine.Local(tmp_path).run("chain", range(5), first, sums, last)
    again = engine.Local(tmp_path).run("chain", range(5), killer, killer, killer)
    assert [(key, block.tolist()) for key, block in again] == expected(1000)
    assert engine.Local(tmp_path).run("nothing", [], killer) == []
    assert engine.Local(tmp_path).run("nothing", range(5), killer) == []


def interrupted(folder, item):
    (folder / f"ran-{item}-{len(list(folder.glob(f'ran-{item}-*')))}").touch()
    if item == 2 and not (folder / "mended").exists():
        raise OSError("the disk is full")
    yield (0,), np.array([item])


def test_goes_on_where_it_was_interrupted(tmp_path):
    first = functools.partial(interrupted, tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        engine.Local(tmp_path / "work").run("x", range(4), first)
    (tmp_path / "mended").touch()
    seen = []
    local = engine.Local(tmp_path / "work", progress=lambda *told: seen.append(told))
    results = local.run("x", range(4), first)
    assert [block.tolist() for _, block in results] == [[0], [1], [2], [3]]
    assert sorted(p.name for p in tmp_path.glob("ran-*")) == [
        *("ran-0-0", "ran-1-0", "ran-2-0", "ran-2-1", "ran-3-0"),
    ]
    assert seen == [("x 0", 2, 4), ("x 0", 3, 4), ("x 0", 4, 4)]


def killer(item):
    os._exit(1)
    yield


def test_a_worker_that_dies_is_an_error(tmp_path):
    with pytest.raises(Exception, match="terminated abruptly"):
        engine.Local(tmp_path, 2).run("x", range(2), killer)


def objects(item):
    yield (0,), np.array([{}])


def test_objects_do_not_travel(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        engine.Local(tmp_path).run("x", [0], objects)


def test_cut_and_json():
    block = np.arange(3 * engine.BLOCK_BYTES // 8).reshape(-1, 4)
    pieces = list(engine.cut(block))
    assert len(pieces) == 3 and all(p.nbytes <= engine.BLOCK_BYTES for p in pieces)
    assert np.array_equal(np.concatenate(pieces), block)
    assert [len(piece) for piece in engine.cut(block[:0])] == [0]
    assert engine.of_json(engine.as_json({"zh": [1, "二"]})) == {"zh": [1, "二"]}


RUN = """
import os, sys, time
from baichuan_jax.data.prepare import engine
from tests.data.prepare.test_engine import waits
if __name__ == "__main__":
    engine.Local(sys.argv[1], 2).run("x", [sys.argv[1]] * 2, waits)
"""


def waits(item):
    with open(f"{item}/pid-{os.getpid()}", "w"):
        time.sleep(60)
    yield (0,), np.array([0])


def test_workers_end_with_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    run = subprocess.Popen([sys.executable, script, tmp_path], env=env)
    while len(pids := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    run.kill()
    run.wait()
    until = time.monotonic() + 30
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False
