"""Beam gives what `Local` gives, on its own runner and on Dask with two workers."""

import functools

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="needs the extra `beam`")

from baichuan_jax.data.prepare import beam, engine, pipeline
from tests.data.prepare import test_engine as chain
from tests.data.prepare.small import config_of, contents, same


@pytest.fixture(params=["direct", "dask"])
def options(request):
    if request.param == "direct":
        yield "direct", []
        return
    distributed = pytest.importorskip("dask.distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as it:
        yield "dask", [f"--dask_client_address={it.scheduler_address}"]


def test_a_chain(tmp_path, options):
    results = beam.Beam(tmp_path, *options).run(
        "chain", range(5), functools.partial(chain.numbers, 1000), chain.sums, chain.last
    )
    assert [(key, block.tolist()) for key, block in results] == chain.expected(1000)
    assert [path.name for path in tmp_path.glob("*/*")] == ["results"]
    again = beam.Beam(tmp_path, *options).run("chain", range(5), chain.killer)
    assert [(key, block.tolist()) for key, block in again] == chain.expected(1000)


def fails(key, blocks):
    if key == (1,):
        raise OSError("the disk is full")
    return chain.sums(key, blocks)


def test_another_engine_goes_on_after_a_failure(tmp_path):
    first = functools.partial(chain.numbers, 1000)
    engines = [engine.Local(tmp_path), beam.Beam(tmp_path, "direct")]
    for each in engines:
        with pytest.raises(Exception, match="the disk is full"):
            each.run("chain", range(5), first, fails, chain.last)
    for each in engines[::-1]:
        results = each.run("chain", range(5), first, chain.sums, chain.last)
        assert [(key, block.tolist()) for key, block in results] == chain.expected(1000)


def big(item):
    yield (item % 2,), np.arange(item * engine.BLOCK_BYTES // 4, dtype=np.int64)


def whole_blocks(key, blocks):
    yield (0,), np.array([len(block) for block in blocks])
    yield (0,), np.array([block.sum() for block in blocks])


def test_the_whole_system(raw, prepared, tmp_path, options):
    runner, more = options
    pipeline.prepare(config_of(raw), tmp_path, lambda f: beam.Beam(f, runner, more))
    same(contents(tmp_path), contents(prepared))


def test_large_blocks_arrive_whole(tmp_path):
    results = beam.Beam(tmp_path, "direct").run("big", range(4), big, whole_blocks)
    assert results[0][1].tolist() == [0, 2 * engine.BLOCK_BYTES // 4]
    expected = engine.Local(tmp_path).run("big", range(4), big, whole_blocks)
    assert [block.tolist() for _, block in results] == [block.tolist() for _, block in expected]


def test_an_unknown_runner(tmp_path):
    with pytest.raises(ValueError, match="--runner=ray should be one of local, direct"):
        beam.Beam(tmp_path, "ray")
