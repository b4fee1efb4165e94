"""What a user may get wrong is said before any long work, by file and row or by flag."""

import copy
import dataclasses
import gzip
import shutil

import jax
import numpy as np
import pytest
from absl import logging

from baichuan_jax import tokenizer
from baichuan_jax.config import MeshConfig, to_json
from baichuan_jax.convert import layout
from baichuan_jax.data import packing
from baichuan_jax.data.dialogue import dialogue
from baichuan_jax.data.prepare import ingest, mixture, tokens
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.engine import Local
from baichuan_jax.inference.quantize import quantize, save_quantized
from baichuan_jax.parallel import zero
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training import loop
from baichuan_jax.training import step as step_module
from baichuan_jax.training.checkpoint import by_name
from baichuan_jax.training.pretrain import open_data, pretrain
from tests.convert import releases


def refused(config, tmp_path, message):
    with pytest.raises(ValueError, match=message):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def source(config, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    config.data.sources = str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a.jsonl, row 2"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl, row 1.*body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl, row 2.*UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl, row 2.*JSON"),
        ("a.jsonl", b"", r"a.jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], r"a.jsonl.gz"),
        ("a.csv", b"text", r"a.csv.*ending"),
    ],
)
def test_files_that_cannot_be_read(config, tmp_path, name, content, message):
    source(config, tmp_path, name, content)
    refused(config, tmp_path, message)


def test_missing_files(config, tmp_path):
    config.data.sources = f"mine={tmp_path}/none.jsonl"
    refused(config, tmp_path, r"none.jsonl: no such file")
    config.data.sources = ""
    refused(config, tmp_path, r"config.data.sources")


def test_tokenizers_that_do_not_fit(config, tmp_path):
    config.model.vocab_size = 999
    refused(config, tmp_path, r"1,000 tokens, more than config.model.vocab_size=999")
    config.data.tokenizer = ""
    refused(config, tmp_path, r"config.data.tokenizer is empty")


def test_meshes_that_do_not_fit(config, tmp_path):
    count = jax.device_count()
    config.mesh.replica, config.mesh.fsdp = 3, 1
    refused(config, tmp_path, rf"does not fit {count} devices")
    config.mesh.replica, config.mesh.fsdp = 1, -1
    config.training.batch_size = 4
    refused(config, tmp_path, r"4 rows must be a multiple of replica × fsdp = 8")
    config.mesh.tensor = 8
    refused(config, tmp_path, r"tensor=8 must divide model.num_heads=4")


def test_weights_of_sets_that_are_not_there(config, tmp_path):
    config.data.weights = "chats=1"
    refused(config, tmp_path, r"config.data.weights: 'chats=1'.*chat.en")


def test_packed_rows_of_a_run_are_not_replaced_unasked(config, corpus, tmp_path, caplog):
    rows_of_text = (corpus / "zh_en.jsonl").read_text().splitlines(keepends=True)
    text = tmp_path / "chat.jsonl"
    text.write_text("".join(rows_of_text))
    config.data.sources = str(text)
    config.training.num_steps, config.checkpoint.every_steps = 4, 4
    run = tmp_path / "run"
    pretrain(config, run)
    packed = {path: path.read_bytes() for path in (run / "shards").rglob("rows-*")}
    config.training.num_steps = 5

    def refused_run(config, message):
        with pytest.raises(ValueError, match=message + r"(.|\n)*accept_changed_data"):
            pretrain(config, run)
        assert all(path.read_bytes() == content for path, content in packed.items())

    shorter, other = copy.deepcopy(config), copy.deepcopy(config)
    shorter.data.sequence_length = 16
    refused_run(shorter, "sequence_length: 32 -> 16")
    other.data.tokenizer = str(tmp_path / "other.model")
    documents = [(document.text, document.source) for document in dialogue(100, seed=2)]
    tokenizer.train(documents, other.data.tokenizer, vocab_size=900)
    refused_run(other, "tokenizer: .* -> ")
    text.write_text("".join(rows_of_text[:-50]))
    refused_run(config, "files: .* -> ")
    config.checkpoint.accept_changed_data = True
    with caplog.at_level(logging.WARNING):
        state = pretrain(config, run)
    assert int(state.step) == 5
    assert "New batches from row 32 on:\n" in caplog.text and "sets chat.zh: " in caplog.text


def test_weights_of_another_architecture_are_refused_before_packing(config, tmp_path):
    config.checkpoint.init_from = str(tmp_path / "source")
    refused(config, tmp_path, r"init_from=.*source: should be the folder of a run")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(to_json(config))
    config.model.vocab_size, config.model.rope_base = 2_000, 5e5
    changed = r"another model than config.model:\nvocab_size: 1000 -> 2000\nrope_base: 10000.0 -> "
    refused(config, tmp_path, changed)
    assert not (tmp_path / "run" / "shards").exists()


def test_training_goes_on_with_another_scaling_of_rope(config, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(to_json(config))
    config.checkpoint.init_from = str(tmp_path / "source")
    config.model.rope_scaling, config.model.rope_factor = "yarn", 4.0
    given = []
    monkeypatch.setattr(loop, "train", lambda config, *_: given.append(config.model))
    pretrain(config, tmp_path / "run")
    assert given[0].rope_scaling == "yarn"


def test_a_quantised_run_is_refused_before_packing(config, tmp_path):
    model = step_module.create_model(config.model, 0, make_mesh(MeshConfig(), jax.devices()[:1]))
    save_quantized(quantize(model, "int8"), config, tmp_path / "small")
    config.checkpoint.init_from = str(tmp_path / "small")
    refused(config, tmp_path, r"init_from=\S+ is quantised, as int8.*the run in full precision")
    assert not (tmp_path / "run" / "shards").exists()


def test_a_release_is_read_straight_onto_the_mesh(config, tmp_path, monkeypatch):
    tensors = releases.make_release(tmp_path / "release", model=config.model)
    config.checkpoint.init_from = str(tmp_path / "release")
    config.mesh = MeshConfig(2, 2, 2)
    config.training.num_steps, config.optimizer.warmup_steps = 3, 1
    first, create = [], step_module.create_state

    def look(model, tx, mesh):
        first.append(jax.tree.map(np.asarray, model))  # the step donates the arrays
        stored = by_name(zero.shardings(model, mesh))
        for name, x in by_name(model).items():
            assert x.sharding == stored[name] and x.dtype == np.float32, name
        return create(model, tx, mesh)

    monkeypatch.setattr(loop.step_module, "create_state", look)
    state = pretrain(config, tmp_path / "run")
    assert int(state.step) == 3 and len(first) == 1
    found = by_name(first[0])
    head = tensors["lm_head.weight"].astype(np.float32)
    np.testing.assert_array_equal(found["head"][: config.model.vocab_size], head)
    for name, x in found.items():
        if name.startswith("layers."):
            theirs = layout.their_names(name, config.model, "baichuan")
            for layer, parts in zip(x, theirs, strict=True):
                expected = [tensors[part].astype(np.float32) for part in parts]
                back = layout.to_theirs(name, layer, config.model, "baichuan")
                for a, b in zip(back, expected, strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=name)
    given = []
    monkeypatch.setattr(loop, "train", lambda *arguments: given.append(arguments[-1]))
    pretrain(config, tmp_path / "run")
    assert given == [None]  # it goes on with its own


def test_releases_that_do_not_fit_are_refused_before_packing(config, tmp_path):
    config.checkpoint.init_from = str(tmp_path / "release")
    releases.make_release(tmp_path / "release", model=config.model, rms_norm_eps=1e-5)
    refused(config, tmp_path, r"another model than config.model:\nnorm_epsilon: 1e-05 -> 1e-06")
    fields = {"max_position_embeddings": None, "model_max_length": None}
    releases.make_release(tmp_path / "unclear", model=config.model, **fields)
    config.checkpoint.init_from = str(tmp_path / "unclear")
    refused(config, tmp_path, r"not clear .*--position=rope.*a flag of experiments.convert_check")
    assert not (tmp_path / "run" / "shards").exists()


def test_the_tokenizer_is_kept_in_one_move(config, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: None)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    content = (corpus / "tokenizer.model").read_bytes()
    (tmp_path / "home" / "t.model").write_bytes(content)
    config.data.tokenizer = "~/t.model"
    pretrain(config, tmp_path / "run")
    copy = tmp_path / "run" / "tokenizer.model"
    assert copy.read_bytes() == content
    assert not copy.with_name("tokenizer.model.partial").exists()
    before = copy.stat()
    config.data.tokenizer = str(copy)
    pretrain(config, tmp_path / "run")  # the same bytes: nothing is written
    after = copy.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.fixture
def prepared(config, corpus, tmp_path):
    """A folder as `experiments.prepare_data` leaves it: documents, tokens, shards, tokenizer."""
    folder = tmp_path / "prepared"
    engine, model = Local(folder / "scratch"), folder / "tokenizer.model"
    ingest.run(folder, config.data.sources, ingest.IngestConfig(), engine)
    model.write_bytes((corpus / "tokenizer.model").read_bytes())
    documents = Corpus(str(folder))
    tokens.run(documents, "tokens", engine, model)
    made = tokens.TokensConfig(config.data.sequence_length, config.data.eval_fraction)
    mix = mixture.MixtureConfig(source_weights="chat.en=0")
    words = Tokenizer(model)
    tokens.pack(documents.after("tokens"), folder / "shards", engine, made, mix, words)
    (folder / "stages").mkdir()
    return folder


def test_prepared_data_is_taken_as_it_is(config, prepared, tmp_path, monkeypatch, caplog):
    given = []
    monkeypatch.setattr(loop, "train", lambda *arguments: given.append(arguments[4:6]))
    before = {p: p.read_bytes() for p in (prepared / "shards").rglob("*") if p.is_file()}
    kept, config.data.sources = config.data.sources, ""
    own, run = str(prepared / "tokenizer.model"), tmp_path / "run"
    for folder, model in ((prepared, ""), (prepared / "shards", own)):
        config.data.shards, config.data.tokenizer = str(folder), model
        pretrain(config, run)
        train, held_out = given.pop()
        assert list(train.weights) == ["chat.zh"]  # the prepared weights leave the other out
        assert held_out.num_rows > 0
        assert (run / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
        (run / "tokenizer.model").unlink()
    config.data.sources = kept  # a recipe's, say
    with caplog.at_level(logging.INFO):
        pretrain(config, run)
    assert "config.data.sources is not read" in caplog.text
    shutil.copytree(prepared / "shards", tmp_path / "moved")
    config.data.shards = str(tmp_path / "moved")
    pretrain(config, run)
    assert list(given.pop()[0].weights) == ["chat.zh"]
    assert {p: p.read_bytes() for p in (prepared / "shards").rglob("*") if p.is_file()} == before


def test_prepared_data_that_is_not_finished(config, prepared, tmp_path):
    (prepared / "shards" / "manifest.json").unlink()
    for folder in (prepared, prepared / "shards"):
        config.data.shards = str(folder)
        refused(config, tmp_path, r"prepared: experiments.prepare_data has not finished here")
    assert not list(prepared.glob("manifest*"))


def test_prepared_data_that_does_not_fit(config, prepared, tmp_path):
    config.data.sources = config.data.tokenizer = ""
    config.data.shards = str(prepared)
    config.model.vocab_size = 999
    refused(config, tmp_path, r"prepared/tokenizer.model has 1,000 tokens, more than config.model")
    config.model.vocab_size, config.data.sequence_length = 1_000, 64
    refused(config, tmp_path, r"prepared/shards has rows for config.data.sequence_length=32")
    config.data.sequence_length, config.data.shards = 32, str(tmp_path)
    config.data.tokenizer = ""
    refused(config, tmp_path, r"config\.data\.tokenizer is empty")
    config.data.tokenizer = str(prepared / "tokenizer.model")
    refused(config, tmp_path, r"no manifest\.json")


def test_rows_in_a_bucket_are_refused(config):
    words = Tokenizer(config.data.tokenizer)
    with pytest.raises(ValueError, match=r"gs://bucket/run/shards: ArrayRecord.*data.shards=DIR"):
        open_data(config.data, words, "gs://bucket/run")


def test_other_processes_wait_until_the_rows_are_packed(config, tmp_path, monkeypatch):
    words, directory = Tokenizer(config.data.tokenizer), tmp_path / "shards"
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 1:  # first, rows of other inputs are there
            other = dataclasses.replace(config.data, sequence_length=16)
            packing.pack(other, words, directory)
        else:
            packing.pack(config.data, words, directory)

    monkeypatch.setattr(packing.time, "sleep", sleep)
    packing.wait(config.data, words, directory)
    assert len(looks) == 2
