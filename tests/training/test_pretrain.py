"""What a user may get wrong is said before any long work, by file and row or by flag."""

import gzip

import jax
import pytest

from baichuan_jax.training.pretrain import pretrain


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


def test_packed_rows_of_a_run_are_not_replaced_unasked(config, tmp_path):
    config.training.num_steps, config.checkpoint.every_steps = 4, 4
    pretrain(config, tmp_path / "run")
    rows = {p: p.read_bytes() for p in (tmp_path / "run" / "shards").rglob("rows-*")}
    config.data.sequence_length = 16
    with pytest.raises(ValueError, match=r"sequence_length: 32 -> 16(.|\n)*accept_changed_data"):
        pretrain(config, tmp_path / "run")
    assert all(path.read_bytes() == content for path, content in rows.items())
