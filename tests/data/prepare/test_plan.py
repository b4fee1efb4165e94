"""The plan beside figures worked out by hand, and how it grows."""

import dataclasses
import os
import subprocess
import sys

import pytest

from baichuan_jax.data.prepare.plan import (
    ACCELERATORS,
    PAPER_REMOVED,
    Assumptions,
    Rates,
    lines,
    plan,
)


def rows(tokens=1e12, **options):
    return {row.name: row for row in plan(tokens, **options).rows}


RATES = dataclasses.replace(
    Rates(**{field.name: 50 for field in dataclasses.fields(Rates)}),
    **{"group": 1e7, "verify": 1e6, "components": 2e6, "compare": 5e10},
)


def test_by_hand():
    """10^12 tokens: 4.2 · 10^6 MB raw, and the shares of Figure 2 are left stage by stage."""
    found = rows(rates=RATES)
    assert found["ingest"].core_hours == pytest.approx(23.333, abs=0.001)  # 4.2e6 / 50 / 3600
    assert found["exact"].core_hours == pytest.approx(23.333, abs=0.001)
    assert found["exact"].shuffle == pytest.approx(4.2e12 / 4667 * 24)  # 22 GB
    # 29.89 % is gone after exact deduplication, 1.77 % after the filters, 3.06 %, 14.47 %, 19.13 %.
    assert found["language"].text == pytest.approx(4.2e12)
    assert found["filters, privacy"].text == pytest.approx(4.2e12 * 0.7011)
    assert found["sentence quality"].text == pytest.approx(4.2e12 * 0.6834)
    assert found["sentences, paragraphs"].text == pytest.approx(4.2e12 * 0.6528)
    assert found["near-duplicate documents"].text == pytest.approx(4.2e12 * 0.5081)
    assert found["tokens, packing"].text == pytest.approx(4.2e12 * 0.3168)
    # Two stages in a row: 2.945 · 10^6 MB, and 1.331 · 10^6 MB.
    assert found["filters, privacy"].core_hours == pytest.approx(2 * 16.359, abs=0.001)
    assert found["tokens, packing"].core_hours == pytest.approx(2 * 7.392, abs=0.001)
    # 4.57 · 10^10 sentences of 21 bytes.
    assert found["sentences, paragraphs"].shuffle == pytest.approx(0.96e12, rel=0.01)
    # 4.57 · 10^8 documents: 20 keys of 16 bytes, two pairs of 160.
    documents = 4.2e12 * 0.5081 / 4667
    assert found["near-duplicate documents"].shuffle == pytest.approx(documents * 640)
    hours = 4.2e6 * 0.5081 / 50 / 3600 + documents * (20 / 1e7 + 2 / 1e6 + 2 / 2e6) / 3600
    assert found["near-duplicate documents"].core_hours == pytest.approx(hours)  # 12.49
    # 2.85 · 10^8 documents of 512 tokens at 10^8 FLOP, on 40 % of 989 TFLOP/s.
    hours = 4.2e12 * 0.3168 / 4667 * 512 * 1e8 / (0.4 * 989e12) / 3600
    assert found["perplexity *"].accelerator_hours == pytest.approx(hours)  # 10.2
    assert found["embeddings by a model *"].accelerator_hours == pytest.approx(0.6 * hours)


def test_every_rate_counts():
    """A core that does half of something makes the plan longer, whatever it is."""
    hours = plan(1e12).total("core_hours")
    for field in dataclasses.fields(Rates):
        slower = dataclasses.replace(Rates(), **{field.name: getattr(Rates(), field.name) / 2})
        assert plan(1e12, rates=slower).total("core_hours") > hours, field.name


def test_clusters_by_hand():
    """A million documents: a thousand clusters, and nothing is lost on the way."""
    assumptions = Assumptions(
        bytes_per_token=1, document_bytes=1_000, kept=1, dimensions=100, iterations=10
    )
    found = rows(1e9, assumptions=assumptions, rates=RATES)["embeddings, clusters"]
    flop = 10 * 256e3 * 2 * 1e3 * 100 + 1e6 * 2 * 1e3 * 100
    assert found.accelerator_hours == pytest.approx(flop / (0.4 * 989e12) / 3600)
    seconds = 1e3 / 50 + 1e6 * 1e3 * 100 / 5e10
    assert found.core_hours == pytest.approx(seconds / 3600)
    assert found.shuffle == 1e6 * 236
    # The sample: 256 documents for each of a thousand clusters, 100 numbers of 2 bytes, twice.
    assert plan(1e9, assumptions).sample == pytest.approx(256e3 * 100 * 2 * 2)
    # Of few documents all are the sample: 100 of them, for 10 clusters.
    few = plan(1e5, dataclasses.replace(assumptions, dimensions=50))
    assert few.sample == pytest.approx(100 * 50 * 2 * 2)
    few = {row.name: row for row in few.rows}["embeddings, clusters"]
    flop = 10 * 100 * 2 * 10 * 50 + 100 * 2 * 10 * 50
    assert few.accelerator_hours == pytest.approx(flop / (0.4 * 989e12) / 3600)


def test_storage_by_hand():
    """Of 4.2 TB, 70.11 % are left after exact deduplication; of these 7 % are stored again."""
    storage = plan(1e12).storage
    assert storage["documents"] == pytest.approx(4.2e12 / 2.5)
    assert storage["edited texts"] == pytest.approx(0.07 * 4.2e12 * 0.7011 / 2.5)
    twice = plan(1e12, Assumptions(edited=0.14)).storage
    assert twice["edited texts"] == pytest.approx(2 * storage["edited texts"])


def test_ten_times_the_tokens():
    small, large = plan(1e11), plan(1e12)
    for before, after in zip(small.rows, large.rows, strict=True):
        assert after.memory == before.memory
        assert after.text == pytest.approx(10 * before.text)
        assert after.shuffle == pytest.approx(10 * before.shuffle)
        if after.name == "embeddings, clusters":  # comparing grows with the power of 1.5
            assert 10 < after.core_hours / before.core_hours < 10**1.5
            assert 10 < after.accelerator_hours / before.accelerator_hours < 10**1.5
        else:
            assert after.core_hours == pytest.approx(10 * before.core_hours)
            assert after.accelerator_hours == pytest.approx(10 * before.accelerator_hours)
    assert large.driver == pytest.approx(10 * small.driver)
    assert large.sample == pytest.approx(10**0.5 * small.sample)
    assert large.storage == pytest.approx({k: 10 * size for k, size in small.storage.items()})


def test_the_funnel_is_the_papers():
    assert sum(PAPER_REMOVED.values()) == pytest.approx(100 - 31.68)
    # One that keeps everything has each stage read everything.
    found = rows(assumptions=Assumptions(kept=1.0))
    assert {row.text for row in found.values()} == {0, 4.2e12}


def test_wall_time_and_other_machines():
    found = plan(1e12)
    hours = found.total("core_hours") / 1_000 + found.total("shuffle") / 30e6 / 1_000 / 3600
    assert found.hours(1_000, 30) == pytest.approx(hours)
    assert found.hours(2_000, 30) == pytest.approx(hours / 2)
    slow = plan(1e12, rates=dataclasses.replace(Rates(), tokens=Rates().tokens / 2))
    more = 4.2e6 * 0.3168 / Rates().tokens / 3600
    assert slow.total("core_hours") - found.total("core_hours") == pytest.approx(more)
    for name, peak in ACCELERATORS.items():
        other = plan(1e12, accelerator=name).total("accelerator_hours")
        assert other == pytest.approx(found.total("accelerator_hours") * 989 / peak)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"tokens": 0}, "tokens=0 must be a positive number"),
        ({"tokens": float("nan")}, "tokens=nan must"),
        ({"assumptions": Assumptions(kept=0)}, "kept=0 must be above 0 and at most 1"),
        ({"assumptions": Assumptions(kept=1.1)}, "kept=1.1 must be above 0"),
        ({"assumptions": Assumptions(edited=7.0)}, "edited=7.0 must be above 0 and at most 1"),
        ({"assumptions": Assumptions(document_bytes=0)}, "document_bytes=0 must be positive"),
        ({"assumptions": Assumptions(compression=-1)}, "compression=-1 must be positive"),
        ({"accelerator": "abacus"}, "accelerator='abacus' must be one of a100, h100"),
        ({"cores": 0}, "cores=0 must be positive"),
    ],
)
def test_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        list(lines(**{"tokens": 1e12} | arguments))


def command(*flags):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    call = [sys.executable, "-m", "experiments.plan", "--what=data", *flags]
    return subprocess.run(
        call, env=environment, capture_output=True, encoding="utf-8", timeout=60, check=False
    )


def test_command():
    before = os.times().children_user
    done = command("--tokens=1e12", "--accelerator=v5p", "--cores=500", "--kept=0.5")
    spent = os.times().children_user - before
    assert done.returncode == 0, done.stderr
    assert spent < 1  # second of a processor: it imports nothing large
    table = done.stdout
    assert "1,000,000,000,000 raw tokens = 4.20 TB of text" in table and "kept 50.00%" in table
    assert "v5p-hours" in table and "On 500 cores" in table
    for field in dataclasses.fields(Assumptions):
        assert f"  {field.name} " in table
    for field in dataclasses.fields(Rates):
        assert f"{field.name} {getattr(Rates(), field.name):g} " in table.replace("\n  ", " ")
    assert max(map(len, table.splitlines())) <= 160


def test_command_refuses():
    done = command("--kept=2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "ValueError: --kept=2.0 must be above 0 and at most 1."
