import dataclasses
import itertools
import json
import logging
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from baichuan_jax.config import DataConfig
from baichuan_jax.data import packing, shards
from baichuan_jax.data.stream import Stream, difference, prefetch

T = 32
FIELDS = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT", "mask_BT")


class Bytes:
    """A tokenizer with one token for each byte."""

    eos_id, fingerprint = 256, "bytes"

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


def write(path, texts, language):
    path.write_text("".join(json.dumps({"text": t, "lang": language}) + "\n" for t in texts))
    return f"{path.stem}={path}"


def rows_of(manifest, name, split):
    source = grain.sources.ArrayRecordDataSource([str(p) for p in manifest.paths(name, split)])
    return [shards.decode_row(record) for record in source]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(1)

    def texts(letters, number):
        return ["".join(rng.choice(list(letters), rng.integers(2, 90))) for _ in range(number)]

    return DataConfig(
        sources=(
            write(folder / "news.jsonl", texts("abcdefghij", 300), "en"),
            write(folder / "books.jsonl", texts("ABCDEFGHIJ", 100), "zh"),
        ),
        sequence_length=T,
        eval_fraction=0.2,
    )


@pytest.fixture(scope="module")
def manifest(config, tmp_path_factory):
    return packing.pack(config, Bytes(), tmp_path_factory.mktemp("shards"))


def replace(config, **changes):
    return DataConfig(**{**vars(config), **changes})


def equal(a, b):
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("split", shards.SPLITS)
def test_a_batch_is_the_same_however_hosts_share_it(config, manifest, split):
    whole = Stream(manifest, split, config).rows(range(40, 56))
    assert {name: array.shape for name, array in whole.items()} == dict.fromkeys(FIELDS, (16, T))
    for hosts in (2, 4):
        share = 16 // hosts
        parts = [
            Stream(manifest, split, config).rows(range(start, start + share))
            for start in range(40, 56, share)
        ]
        together = {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}
        assert equal(together, whole)


def test_the_order_depends_on_the_seed_and_index_alone(config, manifest):
    forward = Stream(manifest, "train", config)
    ahead = [forward.rows([index]) for index in range(30)]
    again = Stream(manifest, "train", config)
    for index in reversed(range(30)):
        assert equal(again.rows([index]), ahead[index])
    assert not equal(
        Stream(manifest, "train", replace(config, seed=1)).rows(range(30)), forward.rows(range(30))
    )
    assert forward.rows([10**12])["mask_BT"].any()  # far into a long run


def test_arrays_agree_with_the_rows(config, manifest):
    batch = Stream(manifest, "eval", config).rows(range(10_000))
    stored = {
        (tuple(row["tokens"].tolist()), tuple(row["lengths"].tolist()))
        for name in manifest.sets
        for row in rows_of(manifest, name, "eval")
    }
    seen = set()
    for tokens, targets, segments, positions, mask in zip(
        *(batch[name] for name in FIELDS), strict=True
    ):
        if not segments.any():
            assert not (tokens.any() or targets.any() or positions.any() or mask.any())
            continue
        for t in range(T - 1):
            assert targets[t] == tokens[t + 1]
            same = segments[t + 1] == segments[t] != 0
            assert mask[t] == same
            assert positions[t + 1] == (positions[t] + 1 if same else 0)
        assert positions[0] == 0
        candidates = [
            (row, lengths)
            for row, lengths in stored
            if row[:T] == tuple(tokens[: len(row[:T])]) and not segments[len(row) : T].any()
        ]
        row, lengths = max(candidates)
        ends = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        np.testing.assert_array_equal(segments[: len(row)], ends[:T])
        assert mask.sum() == len(row) - len(lengths)
        seen.add((row, lengths))
    assert seen == stored


def steps(batch):
    """The pairs (token, target) that a batch trains on."""
    mask = batch["mask_BT"]
    return sorted(
        zip(batch["tokens_BT"][mask].tolist(), batch["targets_BT"][mask].tolist(), strict=True)
    )


def test_an_epoch_of_a_set_trains_each_step_once(config, manifest):
    config = replace(config, weights=("books.zh=0",))
    stream = Stream(manifest, "train", config)
    assert stream.num_rows == manifest.sets["news.en"]["train"].rows
    expected = sorted(
        (int(a), int(b))
        for row in rows_of(manifest, "news.en", "train")
        for piece in np.split(row["tokens"], np.cumsum(row["lengths"])[:-1])
        for a, b in itertools.pairwise(piece)
    )
    epochs = [stream.rows(range(e * stream.num_rows, (e + 1) * stream.num_rows)) for e in (0, 1)]
    assert steps(epochs[0]) == steps(epochs[1]) == expected
    assert not equal(*epochs)  # another order


def test_documents_are_whole_after_an_eval_pass(config, manifest):
    stream = Stream(manifest, "eval", config)
    batch = stream.rows(range(stream.num_rows + 3))
    expected = sum(p["eval"].tokens - p["eval"].documents for p in manifest.sets.values())
    assert batch["mask_BT"].sum() == expected  # each step of each held-out document, once
    assert not any(batch[name][-3:].any() for name in FIELDS)
    # The sets take turns: each half of the rows holds about half of the smaller set.
    chinese = (batch["tokens_BT"][:, 0] < ord("a"))[: stream.num_rows]
    half = chinese[: stream.num_rows // 2].sum()
    assert abs(half - chinese.sum() / 2) <= 1


def share_of_books(stream, number=1_500):
    batch = stream.rows(range(number))
    letters = batch["tokens_BT"][batch["mask_BT"]]
    return (letters < ord("a")).mean()


def test_weights(config, manifest, caplog):
    tokens = {name: parts["train"].tokens for name, parts in manifest.sets.items()}
    natural = tokens["books.zh"] / sum(tokens.values())
    assert share_of_books(Stream(manifest, "train", config)) == pytest.approx(natural, abs=0.02)
    with caplog.at_level(logging.INFO):
        mixed = Stream(manifest, "train", replace(config, weights=("books.zh=3e9, news.en=1e9",)))
    assert share_of_books(mixed) == pytest.approx(0.75, abs=0.02)
    assert "books.zh is 7" in caplog.text
    alone = Stream(manifest, "train", replace(config, weights=("news.en=0",)))
    assert share_of_books(alone) == 1
    assert Stream(manifest, "eval", replace(config, weights=("news.en=0",))).num_rows == sum(
        parts["eval"].rows for parts in manifest.sets.values()
    )


def test_weights_of_the_manifest(config, manifest, tmp_path):
    given = dataclasses.replace(manifest, weights={"books.zh": 3e9, "news.en": 1e9, "gone.en": 1.0})
    stream = Stream(given, "train", config)
    assert stream.weights == {"books.zh": 3e9, "news.en": 1e9}
    assert share_of_books(stream) == pytest.approx(0.75, abs=0.02)
    asked = Stream(given, "train", replace(config, weights=("news.en=3e9",)))
    assert asked.weights == {"books.zh": 3e9, "news.en": 3e9}
    none = dataclasses.replace(manifest, weights={"books.zh": 0.0})
    tokens = manifest.sets["news.en"]["train"].tokens
    assert Stream(none, "train", config).weights == {"news.en": tokens}
    assert "weights books.zh: 3000000000.0 -> none" in difference(
        stream.describe(8), Stream(none, "train", config).describe(8)
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("poems=1", r"'poems=1' should be SET=WEIGHT with a set of news\.en, books\.zh"),
        ("news.en", "should be SET=WEIGHT"),
        ("news.en=much", "needs a number of tokens"),
        ("news.en=-1", "needs a number of tokens"),
        ("news.en=inf", "needs a number of tokens"),
        ("news.en=0,books.zh=0", "no row to train with"),
    ],
)
def test_bad_weights(config, manifest, weights, message):
    with pytest.raises(ValueError, match=message):
        Stream(manifest, "train", replace(config, weights=(weights,)))


def test_no_held_out_rows(config, tmp_path):
    config = replace(config, eval_fraction=0.0)
    manifest = packing.pack(config, Bytes(), tmp_path)
    with pytest.raises(ValueError, match="no row to eval with"):
        Stream(manifest, "eval", config)


def test_difference(config, manifest):
    stream = Stream(manifest, "train", config)
    first = json.loads(json.dumps(stream.describe(8)))  # as a checkpoint keeps it
    assert difference(first, stream.describe(8)) == ""
    other = Stream(manifest, "train", replace(config, seed=5, weights=("news.en=7",)))
    lines = difference(first, other.describe(16)).splitlines()
    assert lines[:2] == ["batch_size: 8 -> 16", "seed: 0 -> 5"]
    assert len(lines) == 3 and lines[2].endswith("-> 7.0") and "weights news.en" in lines[2]


def test_difference_shows_changed_text(config, manifest, tmp_path):
    path = tmp_path / "news.jsonl"
    old_text = Path(config.sources[0].partition("=")[2]).read_text()
    more = [{"text": f"number {n}", "lang": "en"} for n in range(20)]  # some for each split
    path.write_text(old_text + "".join(json.dumps(row) + "\n" for row in more))
    changed = replace(config, sources=(f"news={path}", config.sources[1]))
    other = packing.pack(changed, Bytes(), tmp_path / "shards")
    old, new = (Stream(m, "train", config).describe(8) for m in (manifest, other))
    lines = difference(old, new).splitlines()
    assert any(line.startswith("sets news.en: ") for line in lines)
    assert not any("books.zh" in line for line in lines)


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    return jax.NamedSharding(mesh, jax.P("fsdp"))


def test_global_batch_loads_only_the_rows_of_this_process(config, manifest, monkeypatch):
    stream = Stream(manifest, "train", config)

    class OnTwoOfFour:
        """Rows 4 to 7 of 8, held twice: by both devices of a tensor axis."""

        def addressable_devices_indices_map(self, shape):
            assert shape == (8, T)
            return dict.fromkeys(("device 0", "device 1"), (slice(4, 8), slice(None)))

    loaded = []
    rows = stream.rows
    monkeypatch.setattr(stream, "rows", lambda indices: loaded.append(indices) or rows(indices))
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, shard: shard((slice(4, 8), slice(0, T // 2))),
    )
    built = stream.global_batch(100, 8, OnTwoOfFour())
    assert loaded == [[104, 105, 106, 107]]
    expected = rows([104, 105, 106, 107])
    assert equal(built, {name: array[:, : T // 2] for name, array in expected.items()})


def test_prefetch_gives_the_batches_in_order(config, manifest, sharding):
    stream = Stream(manifest, "train", config)
    batches = list(prefetch(stream, 12, 4, sharding, stop=25))
    assert len(batches) == 4  # rows 12, 16, 20, 24
    for start, batch in zip(range(12, 25, 4), batches, strict=True):
        assert all(array.sharding == sharding for array in batch.values())
        assert equal(batch, stream.rows(range(start, start + 4)))


def test_prefetch_raises_in_the_place_of_the_batch_and_ends_its_thread(
    config, manifest, sharding, monkeypatch
):
    stream = Stream(manifest, "train", config)
    rows, asked = stream.rows, []

    def failing(indices):
        asked.append(indices[0])
        if indices[0] == 8:
            raise OSError("the disk is gone")
        return rows(indices)

    monkeypatch.setattr(stream, "rows", failing)
    batches = prefetch(stream, 0, 4, sharding)
    assert equal(next(batches), rows(range(4))) and equal(next(batches), rows(range(4, 8)))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    endless = prefetch(stream, 100, 4, sharding)
    next(endless)
    endless.close()
    count = len(asked)
    assert count <= 5 + 4  # never more than two ahead
    with pytest.raises(StopIteration):
        next(endless)
    assert len(asked) == count
