import collections
import contextlib
import itertools
import json
import shutil
import uuid

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from etils import epath

from baichuan_jax import tokenizer as tokenizer_module
from baichuan_jax.config import DataConfig
from baichuan_jax.data import packing, shards
from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.data.prepare import benchmark, tokens
from baichuan_jax.data.prepare.corpus import DOCUMENT_SCHEMA, Corpus, write_parquet
from baichuan_jax.data.prepare.engine import Local
from baichuan_jax.data.prepare.mixture import MixtureConfig
from baichuan_jax.data.prepare.tokens import TokensConfig
from baichuan_jax.data.stream import Stream
from baichuan_jax.tokenizer import Tokenizer

T = 32
CONFIG = TokensConfig(sequence_length=T, eval_fraction=0.1)


@pytest.fixture(scope="module")
def texts():
    """Documents as (text, source, language), some longer than a row; two have no text."""
    found = [(d.text, d.source, d.language) for d in dialogue(300, seed=1)]
    return [("", "chat", "zh"), *found, (" \n", "chat", "und")]


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer_module.train([(text, "s") for text, _, _ in texts], path, vocab_size=800)
    return path


def make(folder, texts, number=1):
    """A corpus in shards, tokens not yet there."""
    found = Corpus(str(folder))
    for shard, rows in enumerate(np.array_split(np.arange(len(texts)), number)):
        table = [(*texts[row], "x") for row in rows]
        columns = [pa.array(column, pa.string()) for column in zip(*table, strict=True)]
        write_parquet(found.document_path(shard), pa.table(columns, schema=DOCUMENT_SCHEMA))
    return found


def tokenised(folder, texts, model, number=1, workers=1):
    found = make(folder, texts, number)
    told = tokens.run(found, "tokens", Local(folder / "scratch", workers), model)
    return found.after("tokens"), told


def count(found, counts):
    """Gives the documents, in their order, these counts."""
    start = 0
    for shard in range(found.num_shards()):
        rows = np.arange(found.num_rows(shard))
        of_shard = pa.array(counts[start : start + len(rows)], pa.uint8())
        found.write("mixture", shard, rows, pa.table({"count": of_shard}))
        start += len(rows)
    return found.after("mixture")


def pack(
    found,
    model,
    name="shards",
    workers=1,
    config=CONFIG,
    mix=None,
    scratch=None,
    engine=None,
    **more,
):
    scratch = scratch or uuid.uuid4().hex
    engine = engine or Local(f"{found.directory}/{scratch}", workers)
    folder, mix = f"{found.directory}/{name}", mix or MixtureConfig()
    told = tokens.pack(found, folder, engine, config, mix, Tokenizer(model), **more)
    loaded = shards.load(folder, tokenizer=Tokenizer(model), sequence_length=config.sequence_length)
    return loaded, told


def rows_of(manifest, name, split):
    source = grain.sources.ArrayRecordDataSource([str(p) for p in manifest.paths(name, split)])
    return [shards.decode_row(record) for record in source]


def pieces_of(row):
    return [
        tuple(piece.tolist()) for piece in np.split(row["tokens"], row["lengths"].cumsum()[:-1])
    ]


def steps(manifest, split):
    """How often each step from a token to its next is stored."""
    pairs = (
        itertools.pairwise(piece)
        for name in manifest.sets
        if manifest.sets[name][split].rows
        for row in rows_of(manifest, name, split)
        for piece in pieces_of(row)
    )
    return collections.Counter(itertools.chain.from_iterable(pairs))


def test_tokens_are_attributes_of_the_documents(texts, model, tmp_path):
    found, told = tokenised(tmp_path, texts, model, number=3)
    words = Tokenizer(model)
    read = [found.read(n, "text", "tokens", "text_hash", "text_bytes") for n in range(3)]
    rows = [row for table in read for row in table.to_pylist()]
    assert [row["text"] for row in rows] == [text for text, _, _ in texts[1:-1]]
    for row in rows:
        assert row["tokens"] == words.encode(row["text"])
        assert row["text_hash"] == packing.text_hash(row["text"])
        assert row["text_bytes"] == len(row["text"].encode())
    assert told == {
        "documents": len(rows),
        "bytes": sum(row["text_bytes"] for row in rows),
        "tokens": sum(len(row["tokens"]) for row in rows),
    }
    dropped = pq.read_table(found.attribute_path("tokens", 0))["reason"].to_pylist()
    assert dropped[:2] == ["no text", None]


def test_batches_of_the_tokenizer_change_nothing(texts, model, monkeypatch):
    words, column = Tokenizer(model), pa.chunked_array([[text for text, _, _ in texts]])
    whole = tokens.encode(column, words)
    monkeypatch.setattr(tokens, "_BATCH_BYTES", 100)
    assert tokens.encode(column, words).equals(whole) and len(whole) == len(texts)
    assert len(tokens.encode(pa.chunked_array([], pa.string()), words)) == 0


def test_the_same_rows_as_packing_the_sources(texts, model, tmp_path):
    lines = [json.dumps({"text": text, "lang": language}) for text, _, language in texts]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        sources=str(tmp_path / "chat.jsonl"), sequence_length=T, eval_fraction=CONFIG.eval_fraction
    )
    direct = packing.pack(config, Tokenizer(model), tmp_path / "direct")
    texts = [(text, "chat", language) for text, _, language in texts]
    found, _ = tokenised(tmp_path / "corpus", texts, model, number=4)
    manifest, told = pack(found, model)
    assert manifest.fingerprint == direct.fingerprint
    assert manifest.sets == direct.sets and set(manifest.sets) == {"chat.zh", "chat.en"}
    assert manifest.weights == {name: p["train"].tokens for name, p in manifest.sets.items()}
    assert told["weights"] == manifest.weights
    assert told["sets"]["chat.zh"]["train"]["rows"] == direct.sets["chat.zh"]["train"].rows


@pytest.fixture(scope="module")
def counted(texts, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    found, _ = tokenised(folder, texts, model, number=4)
    counts = np.random.default_rng(0).integers(0, 5, len(texts))
    return count(found, counts), counts


def test_documents_are_packed_as_often_as_they_count(texts, model, counted):
    found, counts = counted
    manifest, told = pack(found, model)
    words, expected = Tokenizer(model), {split: collections.Counter() for split in shards.SPLITS}
    documents, held_out = collections.Counter(), 0
    for (text, _, _), number in zip(texts, counts.tolist(), strict=True):
        if text.strip():
            out = packing.held_out(packing.text_hash(text), CONFIG.eval_fraction)
            split, number = ("eval", 1) if out else ("train", number)
            documents[split] += number
            for step in itertools.pairwise([*words.encode(text), words.eos_id]):
                expected[split][step] += number
            held_out += out and number == 0
    for split in shards.SPLITS:
        assert steps(manifest, split) == +expected[split]
        assert manifest.total(split, "documents") == documents[split] > 0
        fields = [of_set[split] for of_set in told["sets"].values()]
        assert sum(of_set["documents"] for of_set in fields) == documents[split]
    for of_set in manifest.sets.values():
        for part in of_set.values():
            filled = part.tokens + part.pieces - part.documents
            assert part.padding == pytest.approx(1 - filled / (part.rows * (T + 1)))


def test_copies_never_share_a_row(model, tmp_path):
    texts = [(f"这是第 {n} 句话。", "chat", "zh") for n in range(40)]
    found, _ = tokenised(tmp_path, texts, model, number=2)
    manifest, _ = pack(
        count(found, np.full(40, 4)), model, config=TokensConfig(512, eval_fraction=0.0)
    )
    rows = rows_of(manifest, "chat.zh", "train")
    stored = collections.Counter(piece for row in rows for piece in pieces_of(row))
    assert len(stored) == 40 and set(stored.values()) == {4}
    assert all(len(set(pieces_of(row))) == len(row["lengths"]) > 1 for row in rows)


@pytest.fixture
def many_files(monkeypatch):
    monkeypatch.setattr(tokens, "TASK_TOKENS", 1_500)
    monkeypatch.setattr(packing, "FILE_BYTES", 2_000)


def test_many_tasks_and_files(model, counted, many_files):
    found, _ = counted
    manifest, _ = pack(found, model, "many")
    files = [file.name for file in manifest.sets["dialogue.zh"]["train"].files]
    assert files == [f"rows-train.array_record-{n:05d}" for n in range(len(files))]
    assert len(files) > 6
    again, _ = pack(found, model, "again")
    assert again.sets == manifest.sets and again.fingerprint == manifest.fingerprint
    assert not (manifest.directory / "parts").exists()


def test_tfds_and_grain_read_the_same_rows(model, counted, many_files):
    manifest, _ = pack(counted[0], model, "read")
    for name in manifest.sets:
        builder = tfds.builder_from_directory(str(manifest.directory / name))
        for split in shards.SPLITS:
            source, rows = builder.as_data_source(split), rows_of(manifest, name, split)
            assert len(source) == len(rows) == manifest.sets[name][split].rows > 0
            for ours, theirs in zip(rows, source, strict=True):
                for feature in ("tokens", "lengths"):
                    np.testing.assert_array_equal(ours[feature], theirs[feature])


def test_workers_change_nothing(texts, model, counted, tmp_path):
    found, counts = counted
    one, _ = pack(found, model, "one")
    other, _ = tokenised(tmp_path, texts, model, number=4, workers=2)
    two, _ = pack(count(other, counts), model, workers=2)
    assert two.sets == one.sets and two.weights == one.weights
    files = [
        {str(p.relative_to(m.directory)): p.read_bytes() for p in m.directory.glob("*/rows-*")}
        for m in (one, two)
    ]
    assert files[0] == files[1]


def test_an_old_folder_is_replaced(model, counted, many_files, monkeypatch):
    found, _ = counted
    old, _ = pack(found, model, "replaced")
    monkeypatch.undo()
    new, _ = pack(found, model, "replaced")
    known = {path.name for s in shards.SPLITS for path in new.paths("dialogue.zh", s)}
    assert {p.name for p in (new.directory / "dialogue.zh").glob("rows-*")} == known
    assert old.fingerprint != new.fingerprint


class Killed(BaseException):
    pass


def kill_at_change(monkeypatch, number, folder):
    """Kills what is about to make the nth change of the files below a folder."""
    left = [number]

    def dying(change):
        def instead(path, *arguments, **options):
            if folder in path.parents:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return change(path, *arguments, **options)

        return instead

    kind = type(epath.Path("/"))
    for name in ("replace", "unlink", "rmtree"):
        monkeypatch.setattr(kind, name, dying(getattr(kind, name)))


@pytest.mark.parametrize("keeps", [True, False], ids=["engine resumes", "engine starts anew"])
def test_other_rows_pass_for_complete_when_all_are_there(
    texts, model, tmp_path, monkeypatch, keeps
):
    some = [(text, "chat", "zh") for text, _, _ in texts[1:41]]
    found, _ = tokenised(tmp_path, some, model)
    monkeypatch.setattr(packing, "FILE_BYTES", 3_000)
    whole, _ = pack(found, model, "whole")
    old, _ = pack(found, model, "before", config=TokensConfig(2 * T, eval_fraction=0.1))
    folder, states = epath.Path(found.directory) / "killed", []
    for number in range(99):
        if folder.exists():
            folder.rmtree()
        shutil.copytree(old.directory, folder)
        scratch = f"scratch-{keeps}-{number}"
        try:
            with monkeypatch.context() as patch:
                kill_at_change(patch, number, folder)
                pack(found, model, "killed", scratch=scratch)
            break
        except Killed:
            path = folder / shards.MANIFEST
            states.append(path.exists() and shards.read(folder, shards.MANIFEST).fingerprint)
        again, _ = pack(found, model, "killed", scratch=scratch if keeps else None)
        assert again.sets == whole.sets
        assert not (folder / "parts").exists()
    # The old ones, then none, then the new ones.
    assert [state for state, _ in itertools.groupby(states)] == [
        old.fingerprint,
        False,
        whole.fingerprint,
    ]


def test_the_same_rows_are_there_at_any_time(model, counted, monkeypatch):
    found, _ = counted
    whole, _ = pack(found, model, "same")
    mix = MixtureConfig(alpha=0.5)
    for number in range(99):
        try:
            with monkeypatch.context() as patch:
                kill_at_change(patch, number, whole.directory)
                pack(found, model, "same", mix=mix)
            break
        except Killed:
            read = shards.load(whole.directory, tokenizer=Tokenizer(model), sequence_length=T)
            assert read.fingerprint == whole.fingerprint
    assert number > 1
    read = shards.load(whole.directory, tokenizer=Tokenizer(model), sequence_length=T)
    assert read.sets == whole.sets and read.weights != whole.weights
    # Damaged ones are no rows.
    path = read.paths("dialogue.zh", "train")[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert pack(found, model, "same")[0].sets == whole.sets


class Twice:
    """A cluster that does each task twice, and takes what the one gives that comes through."""

    def __init__(self, patch):
        self._patch = patch

    def run(self, name, items, first):
        results = []
        for item in items:
            results += list(first(item))
            with self._patch() as patch, contextlib.suppress(Killed):
                patch.setattr(packing.RowWriter, "_close_file", killed)
                list(first(item))
        return results


def killed(*arguments):
    raise Killed


def test_a_task_that_is_done_twice(model, counted, many_files, monkeypatch):
    found, _ = counted
    whole, _ = pack(found, model, "once")
    twice, _ = pack(found, model, "twice", engine=Twice(monkeypatch.context))
    assert twice.sets == whole.sets and not (twice.directory / "parts").exists()
    for name in whole.sets:
        for one, two in zip(whole.paths(name, "train"), twice.paths(name, "train"), strict=True):
            assert one.read_bytes() == two.read_bytes()


def test_rows_that_were_deleted_are_missed(model, counted):
    found, _ = counted
    manifest, _ = pack(found, model, "deleted", scratch="deleted-scratch")
    manifest.directory.rmtree()
    with pytest.raises(ValueError, match=r"00000 is missing: delete the scratch folder"):
        pack(found, model, "deleted", scratch="deleted-scratch")


def test_the_weights_of_the_mix(model, counted):
    found, _ = counted
    mix = MixtureConfig(alpha=0.5, source_weights="dialogue.en=3")
    manifest, _ = pack(found, model, "mixed", mix=mix)
    zh, en = (manifest.sets[f"dialogue.{name}"]["train"].tokens for name in ("zh", "en"))
    weights = Stream(manifest, "train", DataConfig(sequence_length=T)).weights
    ratio = weights["dialogue.en"] / weights["dialogue.zh"]
    assert ratio == pytest.approx(3 * (en / zh) ** 0.5)
    with pytest.raises(ValueError, match=r"source_weights.* names poems"):
        pack(found, model, "bad", mix=MixtureConfig(source_weights="poems=3"))


def test_a_source_of_good_values_is_seen_more_often(texts, model, tmp_path):
    some = [(text, f"s{n % 2}", "zh") for n, (text, _, _) in enumerate(texts[1:81])]
    found, _ = tokenised(tmp_path, some, model)
    plain, raised = (pack(found, model, factors=given)[0].weights for given in (None, {"s1": 3.0}))
    ratio = raised["s1.zh"] / raised["s0.zh"]
    assert ratio == pytest.approx(3 * plain["s1.zh"] / plain["s0.zh"])
    assert sum(raised.values()) == pytest.approx(sum(plain.values()))


def test_the_loader_is_measured(model, counted):
    manifest, _ = pack(counted[0], model, "loader")
    found = benchmark.loader(manifest, batch_size=4, rows=30)
    assert found.rows == 32 and found.tokens_per_second > 1_000 and found.resume_seconds < 5


def test_nothing_left_or_nothing_held_out(texts, model, tmp_path):
    found, _ = tokenised(tmp_path, texts, model)
    with pytest.raises(ValueError, match=r"eval_fraction=1e-09 held out none of the 300"):
        pack(found, model, config=TokensConfig(T, eval_fraction=1e-9))
    nothing = count(found, np.zeros(len(texts)))
    with pytest.raises(ValueError, match="no document is left to train on"):
        pack(nothing, model)
    for config, message in [
        (TokensConfig(sequence_length=0), r"config\.tokens\.sequence_length=0 must be positive"),
        (TokensConfig(eval_fraction=1.0), r"config\.tokens\.eval_fraction=1\.0 must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            config.check()
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        tokens.run(found, "tokens", Local(tmp_path / "s"), tmp_path / "none.model")


def test_a_shard_without_documents(texts, model, tmp_path):
    texts = [("", "chat", "zh")] * 50 + [(text, "chat", "zh") for text, _, _ in texts[1:51]]
    found, _ = tokenised(tmp_path, texts, model, number=2)
    assert found.read(0, "tokens").num_rows == 0
    manifest, _ = pack(found, model)
    assert manifest.total("train", "documents") + manifest.total("eval", "documents") == 50
