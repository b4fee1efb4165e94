"""A small corpus, and what the whole system makes of it."""

import collections
import gzip
import json

import pytest

from baichuan_jax.data import embedded
from baichuan_jax.data.prepare import pipeline
from tests.data.prepare.small import SECRET, config_of, local


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Documentation, dialogues and code, with copies, near copies and an item of a test."""
    folder = tmp_path_factory.mktemp("raw")
    rows = collections.defaultdict(list)
    for document in embedded.corpus(400_000):
        rows[document.source].append({"text": document.text, "lang": document.language})
    docs = rows["docs"]
    docs += [
        dict(docs[3]),
        dict(docs[3]),
        {"text": docs[5]["text"] + " And one more.", "lang": "en"},
    ]
    docs[7]["text"] = SECRET + docs[7]["text"]
    docs.append({"text": "", "lang": "en"})
    for name, items in rows.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    words = docs[9]["text"].split()
    item = {"question": " ".join(words[:60]), "answer": "B"}
    (folder / "exam.jsonl").write_text(json.dumps(item))
    return folder


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepared")
    pipeline.prepare(config_of(raw), workdir, local)
    return workdir
