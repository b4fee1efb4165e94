import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from baichuan_jax.config import DataConfig
from baichuan_jax.data import packing, shards


class Words:
    """A tokenizer with one token for each byte, after the end of a document."""

    vocab_size = 257
    eos_id = 256

    def __init__(self, fingerprint="words"):
        self.fingerprint = fingerprint
        self.documents = 0

    def encode_batch(self, texts):
        self.documents += len(texts)
        return [list(text.encode()) for text in texts]


def write(path, texts, language="en"):
    path.write_text("".join(json.dumps({"text": t, "lang": language}) + "\n" for t in texts))
    return f"{path.stem}={path}"


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))
    texts = ["".join(rng.choice(letters, rng.integers(1, 80))) for _ in range(400)]
    return DataConfig(
        sources=(
            write(tmp_path / "news.jsonl", texts),
            write(tmp_path / "books.jsonl", [t.upper() for t in texts[:50]], "zh"),
        ),
        sequence_length=32,
        eval_fraction=0.1,
    )


def rows_of(manifest, name, split):
    source = grain.sources.ArrayRecordDataSource([str(p) for p in manifest.paths(name, split)])
    return [shards.decode_row(record) for record in source]


def pieces_of(rows):
    for row in rows:
        yield from np.split(row["tokens"], np.cumsum(row["lengths"])[:-1])


def texts_in(manifest, split):
    """All tokens, as the steps from each token to its next inside a piece."""
    steps = []
    for name in manifest.sets:
        for piece in pieces_of(rows_of(manifest, name, split)):
            steps += itertools.pairwise(piece.tolist())
    return sorted(steps)


def documents_in(config):
    return [
        [*json.loads(line)["text"].encode(), Words.eos_id]
        for source in config.sources
        for line in open(source.partition("=")[2])
    ]


def test_every_step_of_every_document_is_stored_once(config, tmp_path):
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    expected = sorted(step for ids in documents_in(config) for step in itertools.pairwise(ids))
    assert sorted(texts_in(manifest, "train") + texts_in(manifest, "eval")) == expected


def test_rows_hold_whole_documents_or_overlapping_pieces(config, tmp_path):
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    whole = {tuple(ids) for ids in documents_in(config)}
    cut = {tuple(ids[i : i + 33]) for ids in whole for i in range(0, len(ids) - 1, 32)}
    for name in manifest.sets:
        for row in rows_of(manifest, name, "train"):
            assert row["tokens"].dtype == row["lengths"].dtype == np.int32
            assert 0 < len(row["tokens"]) == row["lengths"].sum() <= 33
            assert row["lengths"].min() >= 2
        for piece in pieces_of(rows_of(manifest, name, "train")):
            assert tuple(piece) in cut


def test_manifest_counts(config, tmp_path):
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    documents = documents_in(config)
    assert set(manifest.sets) == {"news.en", "books.zh"}
    for field, expected in {
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "utf8_bytes": sum(map(len, documents)) - len(documents),
    }.items():
        assert manifest.total("train", field) + manifest.total("eval", field) == expected
    for name, parts in manifest.sets.items():
        for split, part in parts.items():
            rows = rows_of(manifest, name, split)
            assert part.rows == len(rows) == sum(file.rows for file in part.files)
            assert part.pieces == sum(len(row["lengths"]) for row in rows)
            filled = sum(len(row["tokens"]) for row in rows)
            assert part.padding == pytest.approx(1 - filled / (33 * len(rows)))
    assert manifest.sets["news.en"]["train"].padding < 0.02
    assert 0.03 < manifest.total("eval", "documents") / len(documents) < 0.2
    again = shards.load(tmp_path / "shards", tokenizer=Words(), sequence_length=32)
    assert again == manifest and again.fingerprint == manifest.fingerprint


def test_tfds_and_grain_read_the_same_rows(config, tmp_path):
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    builder = tfds.builder_from_directory(tmp_path / "shards/news.en")
    for split in shards.SPLITS:
        source = builder.as_data_source(split)
        rows = rows_of(manifest, "news.en", split)
        assert len(source) == len(rows) > 0
        for ours, theirs in zip(rows, source, strict=True):
            for feature in ("tokens", "lengths"):
                np.testing.assert_array_equal(ours[feature], theirs[feature])


def test_same_input_same_bytes_in_several_files(config, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "FILE_BYTES", 4_000)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 1_000)
    manifests = [packing.pack(config, Words(), tmp_path / name) for name in "ab"]
    assert len(manifests[0].sets["news.en"]["train"].files) > 2
    files = [
        {p.relative_to(m.directory): p.read_bytes() for p in m.directory.glob("*/rows-*")}
        for m in manifests
    ]
    assert files[0] == files[1]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    builder = tfds.builder_from_directory(tmp_path / "a/news.en")
    assert len(builder.as_data_source("train")) == manifests[0].sets["news.en"]["train"].rows


def test_held_out_documents_depend_on_their_text_alone(config, tmp_path):
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    path = tmp_path / "news.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1] + lines[:40]))  # another order, and copies
    changed = packing.pack(config, Words(), tmp_path / "changed")
    assert set(texts_in(changed, "eval")) == set(texts_in(manifest, "eval"))
    # Not the shortest: the end of a long document that was cut may look like one of those.
    uncut = {tuple(ids) for ids in documents_in(config) if 8 < len(ids) <= 33}
    held_out, trained = (
        uncut & {tuple(piece.tolist()) for piece in pieces_of(rows_of(changed, "news.en", split))}
        for split in ("eval", "train")
    )
    assert held_out and trained and not held_out & trained
    assert changed.fingerprint != manifest.fingerprint


def test_eval_sources(config, tmp_path):
    config.eval_sources = (write(tmp_path / "news_eval.jsonl", ["held out"], "en"),)
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    assert manifest.total("eval", "documents") == 1
    assert manifest.total("train", "documents") == 450
    assert set(manifest.sets) == {"news.en", "books.zh", "news_eval.en"}


def test_documents_without_text_are_counted(tmp_path):
    source = write(tmp_path / "a.jsonl", ["text", "", " \n", "", "more"], language=None)
    config = DataConfig(sources=(source,), eval_fraction=0.0, sequence_length=8)
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    assert manifest.dropped == {"empty": 2, "white space only": 1}
    assert list(manifest.sets) == ["a"]
    config.sources = (write(tmp_path / "b.jsonl", ["", " "]),)
    with pytest.raises(ValueError, match=r"no text to train on.*'empty': 1"):
        packing.pack(config, Words(), tmp_path / "none")


def test_nothing_held_out_is_an_error(config, tmp_path):
    config.eval_fraction = 1e-9
    with pytest.raises(ValueError, match="held out none of the 450 documents"):
        packing.pack(config, Words(), tmp_path / "shards")


class Interrupted(Words):
    def encode_batch(self, texts):
        if texts[0].isupper():
            raise KeyboardInterrupt
        return super().encode_batch(texts)


def test_goes_on_after_the_last_finished_source(config, tmp_path, caplog):
    whole = packing.pack(config, Words(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        packing.pack(config, Interrupted(), tmp_path / "shards")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        shards.load(tmp_path / "shards", tokenizer=None, sequence_length=32)
    stranger = tmp_path / "shards/books.zh/rows-train.array_record-00007"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"left by the interrupted run")
    tokenizer = Words()
    manifest = packing.pack(config, tokenizer, tmp_path / "shards")
    assert tokenizer.documents == 50  # the second source alone
    assert not stranger.exists()
    assert manifest == dataclasses.replace(whole, directory=manifest.directory)
    packing.pack(config, tokenizer, tmp_path / "shards")
    assert tokenizer.documents == 50  # complete: opened as it is


@pytest.mark.parametrize("interrupted", [False, True])
def test_changed_inputs_are_packed_anew(config, tmp_path, caplog, interrupted):
    directory = tmp_path / "shards"
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            packing.pack(config, Interrupted(), directory)
    else:
        packing.pack(config, Words(), directory)
    config.sequence_length = 16
    manifest = packing.pack(config, Words(), directory)
    assert "packed anew, for sequence_length changed" in caplog.text
    assert manifest.sequence_length == 16
    assert manifest.fingerprint == packing.pack(config, Words(), tmp_path / "fresh").fingerprint


def test_load_finds_what_does_not_fit(config, tmp_path):
    directory = tmp_path / "shards"
    packing.pack(config, Words(), directory)
    with pytest.raises(ValueError, match="sequence_length=32, not 64"):
        shards.load(directory, tokenizer=None, sequence_length=64)
    with pytest.raises(ValueError, match="tokenizer words, not other"):
        shards.load(directory, tokenizer=Words("other"), sequence_length=32)
    file = directory / "news.en/rows-train.array_record-00000"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"news\.en/rows-train.*is damaged"):
        packing.pack(config, Words(), directory)
    file.unlink()
    with pytest.raises(ValueError, match=r"news\.en/rows-train.*is missing"):
        shards.load(directory, tokenizer=None, sequence_length=32)
    (directory / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        shards.load(directory, tokenizer=None, sequence_length=32)
    (directory / "manifest.json").unlink()
    assert packing.pack(config, Words(), directory) and file.read_bytes() == content


def test_a_manifest_with_and_without_weights(config, tmp_path):
    manifest = packing.pack(config, Words(), tmp_path / "shards")
    path = tmp_path / "shards/manifest.json"
    values = json.loads(path.read_text())
    assert values.pop("weights") == {}
    path.write_text(json.dumps(values))  # as it was written before there were weights
    old = shards.load(tmp_path / "shards", tokenizer=None, sequence_length=32)
    assert old == manifest and old.fingerprint == manifest.fingerprint == values["fingerprint"]
    shards.write(dataclasses.replace(manifest, weights={"news.en": 0.5}), shards.MANIFEST)
    new = shards.load(tmp_path / "shards", tokenizer=None, sequence_length=32)
    assert new.weights == {"news.en": 0.5} and new.fingerprint == old.fingerprint


def test_progress(config, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 2_000)
    calls = []
    manifest = packing.pack(
        config, Words(), tmp_path / "shards", progress=lambda *counts: calls.append(counts)
    )
    assert len(calls) > 5 and calls == sorted(calls)
    fields = ("documents", "utf8_bytes", "tokens")
    totals = [sum(manifest.total(s, field) for s in shards.SPLITS) for field in fields]
    assert list(calls[-1]) == totals


def test_best_fit():
    assert packing.best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert packing.best_fit([3, 10, 7], 10) == [[0, 2], [1]]
    # 4 goes beside 5, where it fits best, and leaves beside 3 the room that 6 needs.
    assert packing.best_fit([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, 5_000).tolist()
    rows = packing.best_fit(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(5_000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100
    assert len(rows) <= 1.01 * sum(lengths) / 100
