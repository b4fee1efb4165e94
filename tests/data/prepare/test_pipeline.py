"""The whole system on a small corpus: what comes out, resuming, any engine, bad input."""

import functools
import gzip
import json
import shutil

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from baichuan_jax.config import Config, DataConfig
from baichuan_jax.data import shards
from baichuan_jax.data.prepare import pipeline, stages
from baichuan_jax.data.prepare.corpus import load as load_corpus
from baichuan_jax.data.stream import Stream
from baichuan_jax.inference.load import load
from baichuan_jax.training.pretrain import pretrain
from tests.data.prepare.small import SECRET, config_of, contents, local, same


def records(workdir):
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(workdir.glob("stages/*.json"))
    }


def dropped(record):
    return {reason: documents for reason, documents, _ in record["counts"]["reasons"]}


def test_each_stage_does_its_part(prepared):
    found = records(prepared)
    assert dropped(found["exact"]) == {"exact duplicate": 2}
    assert dropped(found["documents"])["near duplicate"] >= 1
    assert sum(dropped(found["decontaminate"]).values()) >= 1
    texts = [
        text
        for path in prepared.glob("attributes/*/*.parquet")
        for text in (pq.read_table(path).to_pydict().get("text") or [])
        if text
    ]
    assert any("<EMAIL> before noon" in text for text in texts)
    kept = [sum(row[3] for row in record["counts"]["sets"]) for record in found.values()]
    assert min(kept) > 0


def test_the_loader_grain_and_tfds_read_the_shards(prepared):
    manifest = shards.load(prepared / "shards", tokenizer=None, sequence_length=128)
    stream = Stream(manifest, "train", DataConfig(sequence_length=128))
    batch = stream.rows(range(8))
    assert batch["mask_BT"].any(axis=1).all()
    name, parts = next((n, p) for n, p in manifest.sets.items() if p["train"].rows)
    by_grain = grain.sources.ArrayRecordDataSource([str(p) for p in manifest.paths(name, "train")])
    by_tfds = tfds.builder_from_directory(manifest.directory / name).as_data_source("train")
    assert len(by_grain) == len(by_tfds) == parts["train"].rows
    assert np.array_equal(shards.decode_row(by_grain[0])["tokens"], by_tfds[0]["tokens"])


def test_two_workers_give_the_same(raw, prepared, tmp_path):
    pipeline.prepare(config_of(raw), tmp_path, functools.partial(local, workers=2))
    same(contents(tmp_path), contents(prepared))


class Killed(BaseException):
    pass


class Mortal:
    """An engine that dies at its nth chain."""

    def __init__(self, inner, life):
        self._inner, self._life = inner, life

    def run(self, name, items, *functions):
        if self._life[0] == 0:
            raise Killed
        self._life[0] -= 1
        return self._inner.run(name, items, *functions)


def test_goes_on_after_a_kill_anywhere(raw, prepared, tmp_path):
    deaths = 0
    while True:
        life = [5]  # chains until the next death; no stage has more
        try:
            pipeline.prepare(config_of(raw), tmp_path, lambda f: Mortal(local(f), life))  # noqa: B023
            break
        except Killed:
            deaths += 1
            assert deaths < 30
    assert deaths > 3
    same(contents(tmp_path), contents(prepared))


def test_a_changed_setting_runs_its_stage_and_the_later_ones_again(raw, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    before = records(tmp_path)
    config = config_of(raw)
    config.documents.threshold = 0.9
    pipeline.prepare(config, tmp_path, local)
    after = records(tmp_path)
    names = [stage.name for stage in stages.stages(config, tmp_path)]
    changed = [name for name in names if before[name] != after[name]]
    assert changed == names[names.index("documents") :]


def test_a_source_that_loses_nearly_all_stops_the_run(raw, tmp_path):
    text = json.dumps({"text": "The same words, over and over, in each of these documents. " * 9})
    (tmp_path / "copies.jsonl").write_text("\n".join([text] * 40))
    config = config_of(raw)
    config.sources += f",copies={tmp_path / 'copies.jsonl'}"
    with pytest.raises(ValueError, match=r"'copies' has lost 97\.5% .* config\.max_source_loss"):
        pipeline.prepare(config, tmp_path / "work", local)
    config.max_source_loss = 1.0
    pipeline.prepare(config, tmp_path / "work", local)


def test_bad_rows_are_listed_and_the_rest_goes_on(raw, tmp_path):
    good = [json.dumps({"text": f"Row {n}. {SECRET * 3}{n} {n * n}"}) for n in range(30)]
    lines = [line.encode() for line in good]
    lines[5:5] = [b'["no object"]', b'{"words": 1}', b'{"text": "\xff"}', b"{", b'{"text": 5}']
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "empty.jsonl").touch()
    cut = gzip.compress(("\n".join(good) + "\n").encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(cut[:-20])
    config = config_of(raw)
    config.sources += f",bad={tmp_path / 'bad.jsonl'},rest={tmp_path / '[ec]*.jsonl*'}"
    config.max_source_loss = 1.0
    work = tmp_path / "work"
    pipeline.prepare(config, work, local)
    rejects = [json.loads(line) for line in (work / "rejects.jsonl").read_text().splitlines()]
    places = {(reject["path"].rsplit("/", 1)[-1], reject["row"]) for reject in rejects}
    assert {("bad.jsonl", row) for row in range(6, 11)} < places
    assert {name for name, _ in places} == {"bad.jsonl", "empty.jsonl", "cut.jsonl.gz"}
    assert "bad.jsonl" in (work / "report.md").read_text()


def test_a_misspelt_stage_and_no_sources(raw, tmp_path):
    with pytest.raises(ValueError, match=r"config\.skip: 'dedup' is none of language, exact"):
        pipeline.prepare(config_of(raw, skip="dedup"), tmp_path, local)
    with pytest.raises(ValueError, match=r"config\.sources"):
        pipeline.prepare(config_of(raw, sources=""), tmp_path, local)


def test_stages_can_be_left_out(raw, tmp_path):
    config = config_of(raw, skip="clean,sentences,spans,clusters")
    pipeline.prepare(config, tmp_path, local)
    assert not {"clean", "sentences", "spans", "clusters"} & set(records(tmp_path))


def test_a_run_on_prepared_data_scores_the_next_corpus(raw, prepared, tmp_path):
    config = Config()
    model, training = config.model, config.training
    model.vocab_size, model.hidden_size, model.intermediate_size = 1_200, 32, 48
    model.num_layers, model.num_heads = 2, 4
    training.num_steps, training.batch_size, config.optimizer.warmup_steps = 3, 8, 1
    training.compute_dtype, training.remat = "float32", "none"
    config.data.shards, config.data.sequence_length = str(prepared), 128
    pretrain(config, tmp_path / "run")

    config = config_of(raw, skip="spans,privacy,sentences")
    config.embedding_model = config.perplexity_model = str(tmp_path / "run")
    config.quality.positive = f"docs={raw / 'docs.jsonl.gz'}"
    config.quality.negative = f"dialogue={raw / 'dialogue.jsonl.gz'}"
    config.safety.positive = "docs=2"
    work = tmp_path / "work"
    pipeline.prepare(config, work, local, functools.partial(load, dtype="float32"))
    found = records(work)
    told = found["quality"]["told"]
    assert told["all"]["auc"] > 0.9
    assert 0 < found["perplexity"]["told"]["mean"] < 20
    columns = ("quality", "bits_per_byte", "semantic_similarity", "weight")
    corpus = load_corpus(work)
    table = pa.concat_tables(
        corpus.read(shard, "source", *columns) for shard in range(corpus.num_shards())
    )
    means = {
        row.pop("source"): row
        for row in table.group_by("source").aggregate([(c, "mean") for c in columns]).to_pylist()
    }
    assert means["docs"]["quality_mean"] > 0.7 > 0.3 > means["dialogue"]["quality_mean"]
    manifest = shards.load(work / "shards", tokenizer=None, sequence_length=128)
    shares = {
        name: manifest.weights[name] / parts["train"].tokens
        for name, parts in manifest.sets.items()
    }
    assert shares["docs.en"] == pytest.approx(2 * shares["python.code"])
    assert table["bits_per_byte"].null_count == 0
    assert table["weight"].null_count == 0


def test_one_run_at_a_time(raw, tmp_path):
    class Second:
        def __init__(self, folder):
            pipeline.prepare(config_of(raw), tmp_path, local)

    with pytest.raises(ValueError, match="another run is at work in this folder"):
        pipeline.prepare(config_of(raw), tmp_path, Second)
    with pytest.raises(ValueError, match="no prepare_data has finished here"):
        load_corpus(tmp_path)
