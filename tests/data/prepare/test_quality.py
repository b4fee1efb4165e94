import numpy as np
import pyarrow as pa
import pytest

from baichuan_jax.data.prepare import quality, text
from baichuan_jax.data.prepare.linear import ANY, BITS, Linear
from baichuan_jax.data.prepare.quality import UNSCORED, QualityConfig


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    weights = (3 * rng.standard_normal((2, 1 << BITS))).astype(np.float32)
    made = Linear(weights, np.float32([0.5, -0.5]), (ANY, "zh"))
    made.save(tmp_path / "model.npz")
    return made, str(tmp_path / "model.npz")


def documents(texts, languages):
    return pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "source": ["s"] * len(texts),
            "language": pa.array(languages, pa.string()),
        }
    )


def test_scores_and_drops(model, monkeypatch):
    texts = [f"some words {n} 天气{n}" for n in range(50)] + ["", None]
    languages = (["zh", "en", None] * 18)[: len(texts)]
    model, file = model
    expected = model.score(text.join([t or "" for t in texts]), languages)
    found = quality.score(documents(texts, languages), QualityConfig(), file)
    np.testing.assert_array_equal(found["quality"].to_numpy(), expected)
    assert found.schema.field("quality").type == pa.float32()
    assert found["reason"].to_pylist() == [None] * len(texts)
    # In small batches, the same.
    whole = text.batches
    monkeypatch.setattr(text, "batches", lambda texts: whole(texts, characters=40))
    found = quality.score(documents(texts, languages), QualityConfig(min_quality=0.4), file)
    np.testing.assert_array_equal(found["quality"].to_numpy(), expected)
    low = expected < np.float32(0.4)
    assert 5 < low.sum() < 45
    assert found["reason"].to_pylist() == ["quality" if x else None for x in low]


def test_without_a_model_nothing_is_said(model):
    found = quality.score(documents(["a", "b"], ["en", "en"]), QualityConfig(min_quality=1))
    assert found.to_pylist() == [{"reason": None, "quality": None}] * 2
    for given in (model[1], ""):
        assert len(quality.score(documents([], []), QualityConfig(), given)) == 0


def test_refuses_bad_settings(model, tmp_path):
    file = model[1]
    for good in ({}, {"classifier": file, "min_quality": 0.5}, {"positive": "a", "negative": "b"}):
        QualityConfig(**good).check()
    (tmp_path / "text.npz").write_text("no classifier")
    for field, settings, message in (
        ("min_quality", {"min_quality": 1.5}, r"=1\.5 must be between 0 and 1"),
        ("min_quality", {"min_quality": 0.5}, r"=0\.5 needs a classifier"),
        ("positive", {"positive": "a"}, "=a needs config.quality.negative, too"),
        ("negative", {"negative": "b"}, "=b needs config.quality.positive, too"),
        ("classifier", {"classifier": file, "positive": "a"}, f"={file} is trained already"),
        ("classifier", {"classifier": str(tmp_path / "none.npz")}, r"=.*none\.npz: .*none\.npz"),
        ("classifier", {"classifier": str(tmp_path / "text.npz")}, r"=.* is no saved classifier"),
    ):
        with pytest.raises(ValueError, match=f"^config.quality.{field}{message}"):
            QualityConfig(**settings).check()


def corpus(size, seed=0):
    rng = np.random.default_rng(seed)
    languages = rng.choice(["zh", "en", None], size, p=[0.5, 0.4, 0.1])
    scores = rng.random(size).astype(np.float32)
    scores = np.where(languages == "zh", scores**4, scores)  # another distribution
    scores[rng.random(size) < 0.02] = np.nan
    return scores.astype(np.float32), languages.tolist()


def test_deciles_are_tenths_of_each_language():
    scores, languages = corpus(20_000)
    found = quality.deciles(scores, languages)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found == UNSCORED, np.isnan(scores))
    for language in ("zh", "en", None):
        mine = np.array([name == language for name in languages]) & ~np.isnan(scores)
        ranks = np.argsort(np.argsort(scores[mine])) / mine.sum()
        expected = np.floor(10 * ranks)
        # What shares a bin of the histogram may be on one side of an edge.
        assert np.mean(found[mine] == expected) > 0.98
        assert np.abs(found[mine] - expected).max() <= 1
        shares = np.bincount(found[mine], minlength=10) / mine.sum()
        np.testing.assert_allclose(shares, 0.1, atol=0.01)


def test_deciles_of_parts_are_those_of_the_whole():
    scores, languages = corpus(3_000)
    whole = quality.deciles(scores, languages)
    cuts = [slice(0, 700), slice(700, 700), slice(700, 2_999), slice(2_999, None)]
    total = quality.total(quality.histograms(scores[c], languages[c]) for c in cuts)
    parts = [quality.deciles(scores[c], languages[c], total) for c in cuts]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    counts = {name: row.sum() for name, row in total.items()}
    assert sum(counts.values()) == np.isfinite(scores).sum() and set(counts) == {"", "en", "zh"}


def test_equal_and_extreme_scores():
    assert quality.deciles(np.full(7, 0.3, np.float32), ["en"] * 7).tolist() == [5] * 7
    scores = np.float32([0, 1e-7, 0.5, 1 - 1e-7, 1])
    found = quality.deciles(scores, ["en"] * 5)
    assert (np.diff(found.astype(int)) >= 0).all() and found[0] < 3 and found[-1] > 6
    assert quality.deciles(np.float32([np.nan]), ["en"]).tolist() == [UNSCORED]
    assert quality.deciles(np.zeros(0, np.float32), []).tolist() == []
