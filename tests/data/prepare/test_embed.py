"""Embeddings without a model, beside tf-idf vectors as dictionaries; and those of a model."""

import collections
import gzip
import itertools
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.config import Config, MeshConfig, ModelConfig
from baichuan_jax.data.prepare import embed, engine, pooled, text
from baichuan_jax.inference import weights
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from tests.data.prepare.test_exact import write

FLAT = np.ones(embed.BUCKETS, np.float32)
DEDUP = Path(__file__).parents[4] / "shared/data/dedup"
WORDS = [f"word{n}" for n in range(3_000)]
# Of "春眠不觉晓, spring sleep": whole numbers, since each of its features weighs the same.
GOLDEN = [-1, 3, 0, -1, -1, -2, 2, 0, -3, 1, 1, 0, -1, -2, 1, -1]


def cosines(texts, **options):
    x = embed.embed(pa.array(texts), options.pop("inverse", FLAT), **options).astype(np.float64)
    return x @ x.T


def random_text(rng, size=300):
    return [WORDS[n] for n in rng.integers(0, len(WORDS), size)]


def tfidf(words, inverse=lambda feature: 1.0):
    """What is projected, as a dictionary."""
    found = collections.Counter([*words, *itertools.pairwise(words)])
    return {feature: (1 + math.log(n)) * inverse(feature) for feature, n in found.items()}


def exact_cosine(a, b):
    dot = sum(weight * b.get(feature, 0) for feature, weight in a.items())
    return dot / math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))


def test_features():
    rows, hashes, counts = embed.features(text.join(["x y x y", "", "Ｘ Y", "春眠", "x"]))
    found = collections.defaultdict(dict)
    for row, feature, count in zip(rows.tolist(), hashes.tolist(), counts.tolist(), strict=True):
        found[row][feature] = count
    # x, y, xy twice and yx once; of a text of one token there is no pair, but that token again.
    assert {row: sorted(seen.values()) for row, seen in found.items()} == {
        0: [1, 2, 2, 2],
        2: [1, 1, 1],
        3: [1, 1, 1],
        4: [1, 1],
    }
    assert found[2].keys() < found[0].keys()
    assert len(found[4].keys() & found[2].keys()) == 1
    assert hashes.max() < 1 << 44 and hashes.dtype == np.uint64


def test_frequencies():
    texts = pa.array(["a b", "a c", "a a", "", None])
    counts = embed.document_counts(texts)
    # a in three texts; b, c, ab, ac, aa in one each.
    assert np.sort(counts[counts > 0]).tolist() == [1, 1, 1, 1, 1, 3]
    inverse = embed.inverse_frequencies(counts, 5)
    np.testing.assert_allclose(inverse[counts == 3], math.log(6 / 4))
    np.testing.assert_allclose(inverse[counts == 0], math.log(6))
    # Features that share a bucket may be counted in more documents than there are.
    assert embed.inverse_frequencies(np.array([7, 5]), 5).tolist() == [0, 0]


def test_angles_are_kept():
    """Cosines lie around those of the tf-idf vectors, as near as the dimensions allow."""
    rng = np.random.default_rng(0)
    texts = []
    for n in range(60):
        words = random_text(rng)
        for at in rng.choice(300, 5 * (n % 15), replace=False):
            words[at] = WORDS[rng.integers(len(WORDS))]
        texts.append(words if n % 2 else texts[-1][: 10 * n] + words[10 * n :] if n else words)
    true = np.array([[exact_cosine(tfidf(a), tfidf(b)) for b in texts] for a in texts])
    upper = np.triu_indices(60, 1)
    assert true[upper].max() > 0.6
    for dimensions in (64, 256, 1_024):
        error = (cosines([" ".join(words) for words in texts], dimensions=dimensions) - true)[upper]
        assert abs(error.mean()) < 0.3 / math.sqrt(dimensions)
        assert 0.7 < error.std() * math.sqrt(dimensions) < 1.3


def test_frequent_words_weigh_less():
    rng = np.random.default_rng(1)
    footer = [f"footer{n}" for n in range(100)]
    texts = [" ".join(random_text(rng, 100) + footer) for _ in range(200)]
    inverse = embed.inverse_frequencies(embed.document_counts(pa.array(texts)), len(texts))
    upper = np.triu_indices(200, 1)
    assert np.median(cosines(texts)[upper]) > 0.4
    assert abs(np.median(cosines(texts, inverse=inverse)[upper])) < 0.05


def test_cosine_follows_jaccard():
    rng = np.random.default_rng(2)
    original = random_text(rng)
    texts = [" ".join(original)]
    for changed in (3, 10, 30, 100, 300):
        words = list(original)
        for at in rng.choice(300, changed, replace=False):
            words[at] = f"new{rng.integers(1 << 30)}"
        texts.append(" ".join(words))
    found = cosines([*texts, texts[0].upper().replace(" ", "　")])[0]
    assert found[-1] > 0.999  # neither case nor width
    assert (np.diff(found[:-1]) < 0).all() and found[1] > 0.95 and abs(found[5]) < 0.2


def test_each_text_by_itself():
    rng = np.random.default_rng(3)
    texts = [" ".join(random_text(rng, size)) for size in (1, 5, 400, 2_000)] + ["", None, "，。"]
    together = embed.embed(pa.chunked_array([texts * 200, texts]), FLAT, seed=4)
    alone = [embed.embed(pa.array([one], pa.string()), FLAT, seed=4)[0] for one in texts]
    np.testing.assert_array_equal(together, np.tile(alone, (201, 1)))
    assert together.dtype == np.float16
    lengths = np.linalg.norm(together.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, np.tile([1, 1, 1, 1, 0, 0, 0], 201), atol=1e-3)
    other = embed.embed(pa.array(texts), FLAT, seed=5)
    assert abs(float(other[2].astype(np.float32) @ together[2])) < 0.25


def test_the_same_on_every_machine():
    found = embed.embed(pa.array(["春眠不觉晓, spring sleep"]), FLAT, 16)[0].tolist()
    np.testing.assert_allclose(found, GOLDEN / np.linalg.norm(GOLDEN), atol=1e-3)


@pytest.mark.parametrize("dimensions", [0, 4, 96])
def test_refuses_dimensions(dimensions):
    with pytest.raises(ValueError, match=f"dimensions={dimensions} must be a power of two"):
        embed.embed(pa.array(["a"]), FLAT, dimensions)


def test_run(tmp_path):
    rng = np.random.default_rng(5)
    shards = [[" ".join(random_text(rng, 50)) for _ in range(size)] for size in (7, 4, 1)]
    corpus = write(tmp_path, shards, drop=[(0, 2), (2, 0)])
    embed.run(corpus, "semantic", engine.Local(tmp_path / "work"), 64, seed=1)
    del shards[0][2], shards[2][0]
    counts = sum(embed.document_counts(pa.array(texts, pa.string())) for texts in shards)
    inverse = embed.inverse_frequencies(counts, 10)
    for shard, texts in enumerate(shards):
        found = embed.load(corpus, "semantic", embed.shard_name(shard))
        expected = embed.embed(pa.array(texts, pa.string()), inverse, 64, 1)
        np.testing.assert_array_equal(found, expected)
    assert [len(texts) for texts in shards] == [6, 4, 0]


def test_frequencies_of_a_part(tmp_path):
    corpus = write(tmp_path, [["a"] * 10 + ["b"] * 10])
    embed.run(corpus, "s", engine.Local(tmp_path / "work"), 64, frequency_documents=4)
    inverse = embed.load(corpus, "s", "inverse_frequencies")
    assert np.isclose(inverse, math.log(5 / 3)).sum() == 4  # a and b, alone and as all there is
    assert np.isclose(inverse, math.log(5)).sum() == embed.BUCKETS - 4


@pytest.mark.skipif(not DEDUP.exists(), reason="needs ../shared/data/dedup")
def test_real_near_duplicates():
    """On real pages: cosines order pairs as Jaccard does; unrelated pages are far apart."""
    documents, pairs = (
        [json.loads(line) for line in gzip.decompress((DEDUP / name).read_bytes()).splitlines()]
        for name in ("docs.jsonl.gz", "pairs.jsonl.gz")
    )
    place = {document["id"]: n for n, document in enumerate(documents)}
    languages = np.array([document["lang"] for document in documents])
    texts = pa.array([document["text"] for document in documents])
    inverse = embed.inverse_frequencies(embed.document_counts(texts), len(texts))
    found = cosines(texts, inverse=inverse)
    jaccard, unlisted = np.zeros(found.shape), np.triu(np.ones(found.shape, bool), 1)
    for pair in pairs:
        a, b = sorted((place[pair["a"]], place[pair["b"]]))
        jaccard[a, b], unlisted[a, b] = pair["jaccard_word5"], False
    for language in ("zh", "en"):
        same = np.logical_and.outer(*[languages == language] * 2)
        listed = np.triu(jaccard > 0) & same
        ranks = [np.argsort(np.argsort(x[listed])) for x in (jaccard, found)]
        assert np.corrcoef(*ranks)[0, 1] > 0.95
        assert np.quantile(found[unlisted & same], 0.9999) < 0.5
        assert np.quantile(found[(jaccard >= 0.8) & same], 0.01) > 0.8
        assert np.median(found[(jaccard >= 0.9) & same]) > 0.95


class Letters:
    """A tokenizer: each letter a token."""

    def encode_batch(self, texts):
        return [[ord(letter) % 64 for letter in text] for text in texts]


@pytest.fixture(scope="module")
def language_model():
    config = Config(model=ModelConfig(64, 32, 48, num_layers=2, num_heads=4))
    config.data.sequence_length = 40
    trained = jax.jit(lambda key: Transformer(key, config.model))(jax.random.key(0))

    def made(mesh_config):
        if mesh_config is None:
            served = weights.of_model(trained, config.model, jnp.float32)
        else:
            with jax.set_mesh(make_mesh(mesh_config)):
                served = weights.of_model(trained, config.model, jnp.float32)
        held = types.SimpleNamespace(model=served)
        return types.SimpleNamespace(engine=held, tokenizer=Letters(), config=config)

    return trained, made


@pytest.mark.parametrize("mesh", [None, MeshConfig(2, 2, 2)])
def test_states_of_a_model(language_model, mesh):
    trained, made = language_model
    rng = np.random.default_rng(6)
    sizes = np.array([3, 60, 33, 0, 1, 40])
    texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in sizes]
    found = pooled.embed(texts, made(mesh), max_tokens=512)
    assert found.shape == (6, 32) and found.dtype == np.float32
    sizes = np.minimum(sizes, 40)  # what the model was trained on
    tokens, places = np.zeros((6, 40), np.int32), np.tile(np.arange(40, dtype=np.int32), (6, 1))
    for row, ids in enumerate(Letters().encode_batch(texts)):
        tokens[row, : sizes[row]] = ids[:40]
    states = trained(tokens, places, (places < sizes[:, None]).astype(np.int32), dtype=jnp.float32)
    for row, size in enumerate(sizes):
        mean = states[row, :size].sum(0)
        np.testing.assert_allclose(
            found[row], mean / max(1e-9, np.linalg.norm(mean)), atol=1e-5, err_msg=f"{size}"
        )


def test_whitened_states(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pooled, "_FLOOR", 0.0)
    rng = np.random.default_rng(7)
    shards = [
        ["".join(map(chr, rng.integers(97, 123, 30))) for _ in range(100)],
        ["", "alone"],
        ["dropped"],
    ]
    corpus = write(tmp_path, shards, drop=[(2, 0)])
    model = language_model[1](None)
    pooled.run(corpus, "s", model)
    parts = [embed.load(corpus, "s", embed.shard_name(shard)) for shard in range(3)]
    assert [len(part) for part in parts] == [100, 2, 0] and parts[0].dtype == np.float16
    assert not parts[1][0].any()
    states = pooled.embed([*shards[0], "alone"], model).astype(np.float64)
    centred = states - states.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T, ddof=0))).T
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    x = np.concatenate([parts[0], parts[1][1:]]).astype(np.float64)
    np.testing.assert_allclose(x @ x.T, white @ white.T, atol=5e-3)


def test_whitening_has_a_floor():
    matrix = pooled.whitening(np.diag([1.0, 0.25, 0.0]))
    spread = np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(spread, [1 / math.sqrt(1.001), 1 / math.sqrt(0.251), 1e3**0.5])
    assert np.isfinite(pooled.whitening(np.zeros((2, 2)))).all()
