"""Signatures, against the definition and its statistics."""

import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import minhash

KEYS = [0x7758C2EE224ABB28, 0x11F4062A918A2B1B]
BYTES = [117, 21, 88, 116, 162, 161]


def hashes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize("block", [3, minhash._BLOCK_SHINGLES])
def test_minima_are_those_of_the_definition(monkeypatch, block):
    monkeypatch.setattr(minhash, "_BLOCK_SHINGLES", block)
    rows = np.array([0, 0, 1, 8, 8, 8, 9, 40, 41, 47, 47])
    shingles = hashes(rows[-1])
    found = minhash.minima(shingles, rows)
    half = minhash.PERMUTATIONS // 2
    for number in (0, 1, 33, half - 1):
        multiplier = int(minhash._MULTIPLIERS[number])
        assert multiplier % 2 == 1
        for n in range(len(rows) - 1):
            own = [int(shingle) >> 32 for shingle in shingles[rows[n] : rows[n + 1]]]
            permuted = [shingle * multiplier % 2**32 for shingle in own]
            reverse = [2**32 - 1 - shingle for shingle in permuted]
            assert found[number, n] == min(permuted, default=2**32 - 1)
            assert found[number + half, n] == min(reverse, default=2**32 - 1)
    assert minhash.minima(shingles[:0], np.zeros(1, np.int64)).shape == (160, 0)


def test_long_texts_pass_many_blocks():
    shingles = hashes(3 * minhash._BLOCK_SHINGLES + 5)
    rows = np.array([0, 10, len(shingles) - 1, len(shingles)])
    found = minhash.minima(shingles, rows)
    for n in range(3):
        own = minhash.minima(shingles[rows[n] : rows[n + 1]], np.array([0, rows[n + 1] - rows[n]]))
        np.testing.assert_array_equal(found[:, n], own[:, 0])


@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.8])
def test_estimates_follow_the_similarity(jaccard):
    """Bias and spread of estimates, and how often two texts meet in a band."""
    pairs, size = 600, 300
    common = round(jaccard * size)
    sets = hashes(pairs * (2 * size - common)).reshape(pairs, -1)
    firsts, seconds = sets[:, :size], sets[:, size - common :]
    true = common / (2 * size - common)
    both = np.concatenate([firsts, seconds]).reshape(-1)
    least = minhash.minima(both, np.arange(2 * pairs + 1) * size)
    keys, signatures = minhash.band_keys(least), minhash.signatures(least)
    one, other = np.arange(pairs), np.arange(pairs) + pairs
    estimates = minhash.similarity(signatures, one, signatures, other)
    spread = np.sqrt(true * (1 - true) / minhash.PERMUTATIONS)
    assert abs(estimates.mean() - true) < 5 * spread / np.sqrt(pairs)
    assert estimates.std() == pytest.approx(spread, rel=0.15)
    meet = 1 - (1 - true**minhash.ROWS) ** minhash.BANDS
    met = (keys[one] == keys[other]).any(axis=1).mean()
    assert abs(met - meet) < 5 * np.sqrt(meet * (1 - meet) / pairs) + 1e-3


def test_bytes_of_unrelated_texts_agree_by_chance_only():
    least = minhash.minima(hashes(40_000), np.arange(401) * 100)
    signatures = minhash.signatures(least)
    one = np.arange(200)
    estimates = minhash.similarity(signatures, one, signatures, one + 200)
    assert abs(estimates.mean()) < 0.002 and estimates.min() < 0
    keys = minhash.band_keys(least)
    assert len(np.unique(keys)) == keys.size


def test_equal_bytes_say_who_is_similar():
    rng = np.random.default_rng(0)
    ones, others = rng.integers(0, 4, (7, 160), np.uint8), rng.integers(0, 4, (50, 160), np.uint8)
    others[::3] = np.where(rng.random((17, 160)) < 0.2, 4, ones[rng.integers(0, 7, 17)])
    every = np.arange(50)
    alike = np.stack([minhash.similarity(ones, every * 0 + n, others, every) for n in range(7)])
    assert minhash.matches_of(0.0) == 1 and minhash.matches_of(1.0) == 160
    for threshold in (0.2, 0.25, 0.75):
        least = minhash.matches_of(threshold)
        np.testing.assert_array_equal(
            [minhash.matches(others.T, one) >= least for one in ones], alike >= threshold
        )
        expected = np.where((alike >= threshold).any(0), (alike >= threshold).argmax(0), -1)
        found = minhash.first_match(others.T, ones.T, least)
        assert found.tolist() == expected.tolist() and 5 < np.count_nonzero(found >= 0) <= 50
    # All bytes may agree: their number fits in one.
    assert minhash.matches(ones.T, ones[0])[0] == 160


def test_sketch():
    long = " ".join(f"word{n}" for n in range(300))
    texts = [long, long.upper(), "你好", "你好！", "", None, "--- …", "萬 里", "万里"]
    sketches = minhash.sketch(pa.array(texts))
    assert sketches.signatures.shape == (9, 160) and sketches.signatures.dtype == np.uint8
    assert sketches.keys.shape == (9, 20) and sketches.keys.dtype == np.uint64
    assert sketches.characters.tolist() == [len(text or "") for text in texts]
    assert sketches.empty.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    for one, other in ((0, 1), (2, 3)):
        np.testing.assert_array_equal(sketches.signatures[one], sketches.signatures[other])
        np.testing.assert_array_equal(sketches.keys[one], sketches.keys[other])
    for one, other in ((0, 2), (7, 8)):
        assert not (sketches.keys[one] == sketches.keys[other]).any()
    folded = minhash.sketch(pa.array(texts), simplify=True)
    np.testing.assert_array_equal(folded.keys[7], folded.keys[8])
    nothing = minhash.sketch(pa.chunked_array([], pa.string()))
    assert nothing.signatures.shape == (0, 160) and nothing.keys.shape == (0, 20)


def test_sketch_does_not_depend_on_batches(monkeypatch):
    texts = [f"{n} " * 50 + "some more text of its own" for n in range(30)]
    whole = minhash.sketch(pa.array(texts))
    slices = minhash.text.batches
    monkeypatch.setattr(minhash.text, "batches", lambda texts: slices(texts, 100))
    parts = minhash.sketch(pa.array(texts))
    np.testing.assert_array_equal(whole.signatures, parts.signatures)
    np.testing.assert_array_equal(whole.keys, parts.keys)


def test_keys_and_signatures_never_change():
    sketches = minhash.sketch(pa.array(["the quick brown fox jumps over the lazy dog"]))
    assert sketches.keys[0, :2].tolist() == KEYS
    assert sketches.signatures[0, :6].tolist() == BYTES
