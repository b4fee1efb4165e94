import dataclasses
import itertools
import re
import tempfile
import types

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from baichuan_jax.data import shards
from baichuan_jax.data.prepare import mixture, safety, tokens
from baichuan_jax.data.prepare.corpus import DOCUMENT_SCHEMA, Corpus, write_parquet
from baichuan_jax.data.prepare.engine import Local
from baichuan_jax.data.prepare.mixture import MixtureConfig
from baichuan_jax.data.prepare.tokens import TokensConfig

N = 2_000


@pytest.fixture(scope="module")
def scores():
    """Documents of two sets and what the stages said of them; one in ten is dropped."""
    rng = np.random.default_rng(0)
    return {
        "text": ["字" * n for n in rng.integers(1, 200, N)],
        "source": [["news", "books"][n] for n in rng.integers(0, 2, N)],
        "reason": [None if keep else "exact duplicate" for keep in rng.random(N) < 0.9],
        "quality": rng.random(N),
        "cluster_size": rng.choice([1, 1, 1, 2, 7, 100, 5_000], N),
        "copies": rng.choice([None, 1, 3], N),
        "repeated_share": rng.choice([None, 0, 0.5, 1], N),
    }


def corpus(folder, scores, shards=1, without=()):
    bounds = np.linspace(0, N, shards + 1).astype(int)
    found = Corpus(str(folder)).after("scores")
    for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
        size = stop - start
        texts, names = scores["text"][start:stop], scores["source"][start:stop]
        table = [texts, names, ["zh"] * size, ["x"] * size]
        write_parquet(found.document_path(shard), pa.table(table, schema=DOCUMENT_SCHEMA))
        types = {"reason": pa.string(), "cluster_size": pa.uint32(), "copies": pa.uint32()}
        attributes = {
            name: pa.array(values[start:stop], types.get(name, pa.float32()))
            for name, values in scores.items()
            if name not in ("text", "source", *without)
        }
        found.write("scores", shard, np.arange(size), pa.table(attributes))
    return found


def run(found, config=None, seed=0, workers=1):
    with tempfile.TemporaryDirectory() as scratch:  # a finished chain is not run again
        engine = Local(scratch, workers)
        return mixture.run(found, "mixture", engine, config or MixtureConfig(), seed)


def drawn(found):
    after = found.after("mixture")
    shards = [
        after.read(n, "text", "source", "weight", "count").combine_chunks()
        for n in range(found.num_shards())
    ]
    return pa.concat_tables(shards).drop_columns("row")


def test_counts_are_within_one_of_the_weights():
    rng = np.random.default_rng(0)
    weights = rng.exponential(1.0, 10_000)
    found = mixture.counts(weights, 0.3)
    assert np.abs(found - weights).max() < 1
    assert found.sum() == np.floor(0.3 + weights.sum())
    cut = 1_234  # the second part goes on with the sum of the first
    parts = [
        mixture.counts(weights[:cut], 0.3),
        mixture.counts(weights[cut:], 0.3 + weights[:cut].sum()),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), found)
    draws = [mixture.counts(weights[:200], offset) for offset in np.linspace(0, 1, 999)]
    np.testing.assert_allclose(np.mean(draws, axis=0), weights[:200], atol=2e-3)


@pytest.mark.parametrize("total", [0.05, 0.7, 1.0, 2.5, 4.0])
def test_scale_keeps_the_sum_below_the_limit(total):
    rng = np.random.default_rng(1)
    weights, sizes = rng.exponential(1.0, 500) + 0.01, rng.integers(1, 900, 500)
    s = mixture.scale(weights, sizes, total * sizes.sum(), 4.0)
    assert np.minimum(s * weights, 4) @ sizes == pytest.approx(total * sizes.sum(), rel=1e-9)


def test_factors():
    def of(config=None, **scores):
        arrays = {name: np.array(values) for name, values in scores.items()}
        size = len(next(iter(arrays.values())))
        return mixture.factors(arrays, size, config or MixtureConfig()).tolist()

    assert of(quality_decile=np.array([0, 9, 255], np.uint8)) == [0.5, 2, 1]
    assert of(cluster_size=[1, 3, np.nan, 50, 9_999]) == [1, 1.5, 1, 2.5, 1]
    assert of(cluster_size=[1, 3], copies=[np.nan, 2.0]) == [1, 2]  # 3 + 2 - 1 documents
    assert of(copies=[2, 5]) == [1.5, 2]
    assert of(repeated_share=[0, 0.25, np.nan, 1]) == [1, 0.75, 1, pytest.approx(0.1)]
    squared = MixtureConfig(uniqueness=2)
    assert of(squared, repeated_share=[0.5]) == [0.25]
    off = MixtureConfig(quality="", cluster_size="", uniqueness=0)
    assert of(off, quality_decile=[0], cluster_size=[9], repeated_share=[0.5]) == [1]
    assert mixture.factors({}, 3, MixtureConfig()).tolist() == [1, 1, 1]


@pytest.mark.parametrize("epochs", [0.5, 1.0, 3.0])
def test_the_corpus_is_sampled_by_its_scores(scores, tmp_path, epochs):
    found = corpus(tmp_path, scores, shards=3)
    told = run(found, MixtureConfig(epochs=epochs))
    table = drawn(found)
    counts, weights = table["count"].to_numpy(), table["weight"].to_numpy()
    assert table.schema.field("count").type == pa.uint8()
    assert table.schema.field("weight").type == pa.float32()
    assert len(table) == scores["reason"].count(None)
    assert np.abs(counts - weights.astype(float)).max() < 1 + 1e-6
    assert counts.max() <= 4 and weights.max() <= 4
    sizes = np.array([len(text.encode()) for text in table["text"].to_pylist()])
    for name in ("news", "books"):
        mine = np.array(table["source"].to_pylist()) == name
        assert weights[mine] @ sizes[mine] == pytest.approx(epochs * sizes[mine].sum(), rel=1e-5)
        of_set = told["sets"][f"{name}.zh"]
        assert of_set["documents"] == mine.sum() and of_set["bytes"] == sizes[mine].sum()
        assert of_set["kept"] == (counts[mine] > 0).sum()
        assert of_set["repeated"] == (counts[mine] > 1).sum()
        assert of_set["effective_bytes"] == counts[mine] @ sizes[mine]
        assert of_set["effective_bytes"] == pytest.approx(epochs * of_set["bytes"], rel=0.05)
    assert told["counts"] == np.bincount(counts, minlength=5).tolist()
    assert sum(documents for _, documents in told["weights"]) == len(table)
    # All factors at once, by hand.
    kept = np.array([reason is None for reason in scores["reason"]])
    quality = scores["quality"][kept]
    tenths = np.minimum(10 * np.argsort(np.argsort(quality)) / len(quality), 9).astype(int)
    expected = mixture.factors(
        {
            "quality_decile": tenths,
            **{
                name: np.array(scores[name][kept], float)
                for name in ("cluster_size", "copies", "repeated_share")
            },
        },
        len(quality),
        MixtureConfig(),
    )
    mine = (np.array(scores["source"])[kept] == "news") & (weights < 4)
    ratio = weights[mine] / expected[mine]
    middle = np.median(ratio)
    # Documents at the edge of a tenth may be told to the next one.
    assert (np.abs(np.log2(ratio / middle)) < 1 / 31).mean() > 0.97


def test_shards_and_workers_change_nothing(scores, tmp_path):
    one = corpus(tmp_path / "one", scores)
    told = run(one)
    for name, workers in (("two", 1), ("three", 2)):
        many = corpus(tmp_path / name, scores, shards=5)
        assert run(many, workers=workers) == told
        assert drawn(many).equals(drawn(one))


def test_the_draw_depends_on_seed_and_epoch(scores, tmp_path):
    found = corpus(tmp_path, scores)
    draws = []
    for config, seed in [({}, 0), ({}, 0), ({}, 1), ({"epoch": 1}, 0)]:
        run(found, MixtureConfig(**config), seed)
        draws.append(drawn(found))
    assert draws[0].equals(draws[1])
    for other in draws[2:]:
        assert not other["count"].equals(draws[0]["count"])
        assert other["weight"].equals(draws[0]["weight"])


def test_without_scores_every_document_counts_once(scores, tmp_path):
    every = ("quality", "cluster_size", "copies", "repeated_share")
    found = corpus(tmp_path, scores, without=every)
    run(found)
    assert set(drawn(found)["count"].to_pylist()) == {1}
    run(found, MixtureConfig(epochs=2.0))
    assert set(drawn(found)["count"].to_pylist()) == {2}


def test_a_decile_of_another_stage_goes_before_the_score(scores, tmp_path):
    found = corpus(tmp_path, scores)
    unknown = np.arange(N) % 2 == 0  # the best of the others, as `quality` does not have it
    tenths = pa.array(np.full(N, 9, np.uint8), mask=unknown)
    found.write("tenths", 0, np.arange(N), pa.table({"quality_decile": tenths}))
    run(found.after("tenths"), MixtureConfig(cluster_size="", uniqueness=0))
    table = found.after("mixture").read(0, "source", "weight")
    for source in ("news", "books"):
        mine = table.filter(pc.equal(table["source"], source))
        weights, odd = mine["weight"].to_numpy(), mine["row"].to_numpy() % 2 == 1
        assert len(set(weights[odd])) == len(set(weights[~odd])) == 1
        assert weights[odd][0] == pytest.approx(2 * weights[~odd][0])


def test_set_weights():
    tokens = {"zh.zh": 900, "zh.en": 90, "code": 10}
    source_of = {"zh.zh": "zh", "zh.en": "zh", "code": "code"}

    def of(**settings):
        return mixture.set_weights(tokens, source_of, MixtureConfig(**settings))

    assert of() == tokens
    assert of(alpha=0.0) == pytest.approx(dict.fromkeys(tokens, 1_000 / 3))
    given = of(source_weights="zh=1, code=9,zh.en=0")  # a set's own goes before its source's
    assert given == pytest.approx({"zh.zh": 1_000 * 900 / 990, "zh.en": 0, "code": 1_000 / 11})
    assert sum(of(alpha=0.5).values()) == pytest.approx(1_000)
    assert of(alpha=0.5)["zh.zh"] / of(alpha=0.5)["zh.en"] == pytest.approx(10**0.5)
    with pytest.raises(
        ValueError, match=r"=books=2 names books; there are code, zh, zh\.en, zh\.zh"
    ):
        of(source_weights="books=2")
    with pytest.raises(ValueError, match="leaves nothing"):
        of(source_weights="zh=0,code=0")


def test_sources_of_good_values_are_seen_so_many_times_more_often():
    tokens = {"laws.zh": 300, "laws.en": 100, "web.zh": 500, "web.en": 100}
    source_of = {name: name.split(".")[0] for name in tokens}
    for config in (MixtureConfig(), MixtureConfig(alpha=0.5, source_weights="laws.en=3,web=2")):
        plain = mixture.set_weights(tokens, source_of, config)
        raised = mixture.set_weights(tokens, source_of, config, {"laws": 2.5})
        ratios = {name: raised[name] / plain[name] for name in tokens}
        for laws, web in itertools.product(("laws.zh", "laws.en"), ("web.zh", "web.en")):
            assert ratios[laws] / ratios[web] == pytest.approx(2.5)
        assert sum(raised.values()) == pytest.approx(1_000)
    with pytest.raises(
        ValueError, match=r"config\.safety\.positive names lows; there are laws, web"
    ):
        mixture.set_weights(tokens, source_of, MixtureConfig(), {"lows": 2.0})


def test_names_of_sources_are_checked_early():
    def check(weights):
        mixture.check_sources(MixtureConfig(source_weights=weights), ["web", "laws"])

    check("")
    check("web=2,laws.zh=0.5")  # whether there is such a set, nobody knows yet
    for wrong in ("wbe", "webs", "web-2", "zh"):
        with pytest.raises(
            ValueError, match=f"source_weights=web=1,{wrong}=2 names {wrong}; there"
        ):
            check(f"web=1,{wrong}=2")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quality", "1,2,3", "should be ten factors above 0"),
        ("quality", "1,2,3,4,5,6,7,8,9,x", "should be ten factors above 0"),
        ("quality", "1,2,3,4,5,6,7,8,9,0", "should be ten factors above 0"),
        ("cluster_size", "1=1,9", "should be SIZE=FACTOR,… with sizes that rise"),
        ("cluster_size", "9=1,2=1", "should be SIZE=FACTOR,… with sizes that rise"),
        ("cluster_size", "1=inf", "should be SIZE=FACTOR,… with sizes that rise"),
        ("source_weights", "zh=-1", "should be NAME=FACTOR,… with factors of 0 or more"),
        ("source_weights", "zh", "should be NAME=FACTOR,… with factors of 0 or more"),
        ("max_repeats", 0, "must be between 1 and 255"),
        ("epochs", 5.0, "must be above 0 and at most config.mixture.max_repeats=4"),
        ("alpha", -1.0, "must be 0 or more"),
        ("uniqueness", float("nan"), "must be 0 or more"),
    ],
)
def test_wrong_settings(field, value, message):
    MixtureConfig().check()
    config = dataclasses.replace(MixtureConfig(), **{field: value})
    with pytest.raises(ValueError, match=re.escape(f"config.mixture.{field}={value} {message}")):
        config.check()


def test_the_weights_in_the_manifest_rise_by_the_factors(scores, tmp_path):
    """From `config.safety.positive` to what the loader mixes by."""
    found = corpus(tmp_path, scores, shards=2)
    for shard in range(2):
        size = found.num_rows(shard)
        ids = pa.array([list(range(n % 5)) for n in range(size)], pa.list_(pa.int32()))
        hashes = np.random.default_rng(shard).integers(0, 1 << 63, size).astype(np.uint64)
        attributes = {"tokens": ids, "text_bytes": np.ones(size, np.uint32), "text_hash": hashes}
        found.write("tokens", shard, np.arange(size), pa.table(attributes))
    found = found.after("tokens")
    run(found)
    found = found.after("mixture")
    tokenizer = types.SimpleNamespace(eos_id=2, fingerprint="none")
    weights = []
    for positive in ("", "books=3"):
        engine = Local(str(tmp_path / "scratch" / positive), 1)
        folder = tmp_path / f"shards-{positive}"
        settings = TokensConfig(sequence_length=16), MixtureConfig(), tokenizer
        tokens.pack(found, folder, engine, *settings, factors=safety.factors(positive))
        loaded = shards.load(folder, tokenizer=None, sequence_length=16)
        assert set(loaded.weights) == {"books.zh", "news.zh"}
        assert sum(loaded.weights.values()) == pytest.approx(loaded.total("train", "tokens"))
        weights.append(loaded.weights["books.zh"] / loaded.weights["news.zh"])
    assert weights[1] == pytest.approx(3 * weights[0])
