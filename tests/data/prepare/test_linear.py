import itertools
import json
import pickle

import numpy as np
import pytest

from baichuan_jax.data.prepare import linear, linear_training, text
from baichuan_jax.data.prepare.linear import ANY, BITS, Linear

TEXTS = [
    "",
    "Word",
    "two words",
    "机器学习, 深度学习!",
    "...",
    "It ends. 然后呢？The rest (of it)",
    " ok ",
]
WORDS = ["river", "stone", "cloud", "market", "letter", "window", "garden", "engine", "paper"]


@pytest.fixture(scope="module")
def random_model():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 1 << BITS)).astype(np.float32)
    return Linear(weights, np.float32([0.1, -0.2, 0.3]), (ANY, "en", "zh"))


def plain(model, words, head=0):
    """The formula, one feature after the other; words are those of a text, folded."""
    hashes = [int(text.tokens(text.join([word])).hashes[0]) for word in words]
    pairs = [(a * int(linear._PAIR_MULTIPLIER) + b) % 2**64 for a, b in itertools.pairwise(hashes)]
    weights = [float(model.weights[head, h >> (64 - BITS)]) for h in hashes + pairs]
    odds = float(model.biases[head]) + (sum(weights) / len(weights) if weights else 0)
    return 1 / (1 + np.exp(-odds))


def test_scores_are_the_formula(random_model):
    words = [[], ["word"], ["two", "words"], list("机器学习深度学习"), []]
    found = random_model.score(text.join(TEXTS[:5]))
    expected = [plain(random_model, w) for w in words]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    languages = ["zh", "en", None, "zh", "fr"]
    found = random_model.score(text.join(TEXTS[:5]), languages)
    expected = [plain(random_model, w, h) for w, h in zip(words, [2, 1, 0, 2, 0], strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_span_scores_as_a_text_of_its_own(random_model):
    joined = text.join(TEXTS)
    whole = "".join(TEXTS)
    for spans in (text.sentences(joined), text.paragraphs(joined)):
        assert len(spans.starts) > len([t for t in TEXTS if t]) - 1
        pieces = [whole[a:b] for a, b in zip(spans.starts, spans.ends, strict=True)]
        languages = ["en", "zh", None, "zh", "en", "en", "zh"]
        of_spans = np.repeat(languages, np.diff(spans.rows))
        found = random_model.score_spans(joined, spans, languages)
        np.testing.assert_array_equal(found, random_model.score(text.join(pieces), of_spans))
    assert len(random_model.score_spans(text.join([]), text.sentences(text.join([])))) == 0


def test_neighbours_do_not_matter(random_model):
    together = random_model.score(text.join(TEXTS))
    alone = [random_model.score(text.join([t]))[0] for t in TEXTS]
    np.testing.assert_array_equal(together, np.float32(alone))
    assert len(random_model.score(text.join([]))) == 0


def test_traditional_counts_as_simplified_if_asked(random_model):
    folded = Linear(random_model.weights[:1], random_model.biases[:1], simplify=True)
    both = folded.score(text.join(["機器學習", "机器学习"]))
    assert both[0] == both[1]
    both = random_model.score(text.join(["機器學習", "机器学习"]))
    assert both[0] != both[1]


def test_saves_and_loads(random_model, tmp_path):
    path = tmp_path / "deep" / "model.npz"
    random_model.save(path)
    found = Linear.load(path)
    np.testing.assert_array_equal(found.weights, random_model.weights)
    assert found.languages == random_model.languages and not found.simplify
    assert found.fingerprint == random_model.fingerprint
    again = tmp_path / "again.npz"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert linear.load(path) is linear.load(path)
    other = Linear(random_model.weights, random_model.biases + 1, random_model.languages)
    assert other.fingerprint != random_model.fingerprint
    other.save(path)  # the file is another one now
    assert linear.load(path).fingerprint == other.fingerprint


class _Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_refuses_files_that_are_no_classifier(random_model, tmp_path):
    path = tmp_path / "model.npz"
    small = Linear(np.zeros((1, 1 << BITS), np.float32), np.float32([0]))
    small.save(path)
    content = path.read_bytes()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with np.load(path) as fields:
        parts = dict(fields)
    np.savez(tmp_path / "objects.npz", **(parts | {"settings": np.array([_Trap()], object)}))
    bad = {
        "cut": content[: len(content) // 2],
        "text": b"not a classifier",
        "empty": b"",
        "pickle": pickle.dumps(_Trap()),
        "changed": content[:300] + bytes([content[300] ^ 1]) + content[301:],
        "other": (tmp_path / "other.npz").read_bytes(),
        "objects": (tmp_path / "objects.npz").read_bytes(),
    }
    for name, data in bad.items():
        file = tmp_path / f"bad-{name}.npz"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"bad-{name}.npz is (no saved|damaged)"):
            Linear.load(file)
    with pytest.raises(FileNotFoundError):
        Linear.load(tmp_path / "none.npz")
    np.savez(tmp_path / "shape.npz", **(parts | {"biases": np.zeros(2, np.float32)}))
    with pytest.raises(ValueError, match=r"biases \(2,\) for 1 languages"):
        Linear.load(tmp_path / "shape.npz")
    np.savez(tmp_path / "edited.npz", **(parts | {"biases": np.ones(1, np.float32)}))
    with pytest.raises(ValueError, match="not those that were saved"):
        Linear.load(tmp_path / "edited.npz")


def write(path, texts, language="en"):
    path.write_text("".join(json.dumps({"text": t, "lang": language}) + "\n" for t in texts))
    return str(path)


def draw(rng, size, tilt, length=30):
    """Texts whose words are each more likely in one of the classes, but in none alone."""
    share = np.exp(tilt * np.linspace(-1, 1, len(WORDS)))
    return [
        " ".join(rng.choice(WORDS, length, p=share / share.sum())) + f" {rng.integers(1e9)}"
        for _ in range(size)
    ]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(1)
    good = write(folder / "good.jsonl", draw(rng, 1_500, 0.3))
    poor = write(folder / "poor.jsonl", draw(rng, 400, -0.3))  # sizes do not decide
    return good, poor


@pytest.fixture(scope="module")
def trained(examples):
    return linear_training.train(*examples)


def test_learns_and_is_calibrated(trained):
    model, report = trained
    rng = np.random.default_rng(2)
    texts = [*draw(rng, 2_000, 0.3), *draw(rng, 2_000, -0.3)]
    labels = np.repeat([1, 0], 2_000)
    scores = model.score(text.join(texts))
    slopes = dict(zip(WORDS, np.linspace(-1, 1, len(WORDS)), strict=True))
    true_odds = np.array([sum(slopes.get(word, 0) for word in t.split()) for t in texts])
    best = linear_training.auc(true_odds, labels)
    assert 0.9 < best < 0.98 and linear_training.auc(scores, labels) > best - 0.02
    accuracy = np.mean((scores > 0.5) == labels)
    assert accuracy > np.mean((true_odds > 0) == labels) - 0.03
    for low in np.arange(0, 1, 0.2):
        chosen = (scores >= low) & (scores < low + 0.2)
        assert chosen.sum() > 100
        assert abs(labels[chosen].mean() - scores[chosen].mean()) < 0.12
    assert report["all"]["documents"] == [1_500, 400]
    assert report["all"]["accuracy"] == pytest.approx(accuracy, abs=0.08)
    assert 0.05 < report["all"]["held_out"][0] / 1_500 < 0.15
    json.dumps(report)


def test_the_seed_decides(trained, examples):
    model, report = trained
    again, same = linear_training.train(*examples)
    assert again.fingerprint == model.fingerprint == report["fingerprint"] and same == report
    other, _ = linear_training.train(*examples, seed=1)
    assert other.fingerprint != model.fingerprint


def test_a_head_for_each_language_with_enough_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_training, "LEAST_OF_LANGUAGE", 150)
    rng = np.random.default_rng(3)
    up, down = draw(rng, 400, 0.6), draw(rng, 400, -0.6)
    chinese = [["今天天气很好" + w for w in "山水云石"], ["今天天气很好" + w for w in "铜铁锡银"]]
    chinese = [[f"{t}{n}" for t in side for n in range(50)] for side in chinese]
    # What is good in English is poor in French, of which there is less.
    sets = []
    for name, english, french, zh in (
        ("a", up[:200], down[200:300], chinese[0]),
        ("b", down[:200], up[200:300], chinese[1]),
    ):
        rows = [(t, "en") for t in english] + [(t, "fr") for t in french] + [(t, "zh") for t in zh]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": t, "lang": lang}) for t, lang in rows))
        sets.append(str(path))
    model, report = linear_training.train(*sets)
    assert model.languages == (ANY, "en", "zh") and list(report)[:3] == ["all", "en", "zh"]
    assert report["en"]["documents"] == [200, 200] and report["all"]["documents"] == [500, 500]
    fresh = text.join([*up[300:], *down[300:]])
    labels = np.repeat([1, 0], 100)
    of_head = linear_training.auc(model.score(fresh, ["en"] * 200), labels)
    of_all = linear_training.auc(model.score(fresh), labels)
    assert of_head > 0.95 and of_head > of_all


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(4)
    scores, labels = rng.integers(0, 9, 60), rng.integers(0, 2, 60)
    a, b = scores[labels == 1][:, None], scores[labels == 0]
    expected = np.mean((a > b) + 0.5 * (a == b))
    assert linear_training.auc(scores, labels) == pytest.approx(expected)


def test_calibration_stays_finite_where_the_sets_are_apart():
    slope, offset = linear_training._calibrate(np.full(20, 5.0), np.full(20, -5.0))
    assert 0 < slope < 10 and abs(offset) < 1e-6
    rng = np.random.default_rng(5)
    z = rng.standard_normal(20_000) * 3
    labels = rng.random(20_000) < 1 / (1 + np.exp(-(0.4 * z + 0.5)))
    # Both sets weigh the same, so the offset moves by the log of their sizes' ratio.
    slope, offset = linear_training._calibrate(z[labels], z[~labels])
    ratio = np.log(labels.sum() / (~labels).sum())
    assert slope == pytest.approx(0.4, abs=0.02) and offset == pytest.approx(0.5 - ratio, abs=0.06)


def test_says_what_is_missing(examples, tmp_path):
    few = write(tmp_path / "few.jsonl", ["one", "", " "])
    with pytest.raises(ValueError, match=r"config.q.negative: .*few.jsonl has 1 documents with"):
        linear_training.train(examples[0], few, fields=("config.q.positive", "config.q.negative"))
    same = write(tmp_path / "same.jsonl", ["copy"] * 100)
    with pytest.raises(ValueError, match="negative: its 100 documents are too few"):
        linear_training.train(examples[0], same)
    fields = ("f.good", "f.poor", "f.path")
    with pytest.raises(ValueError, match=r"f\.poor=x needs f.good, too"):
        linear_training.fit("", "x", "", fields=fields)
    with pytest.raises(ValueError, match=r"f\.good=x needs f.poor, too"):
        linear_training.fit("x", "", "", fields=fields)
    with pytest.raises(ValueError, match=r"f\.path=z is trained already"):
        linear_training.fit("x", "y", "z", fields=fields)
    assert linear_training.fit("", "", "", fields=fields) == (None, {})


def test_fit_takes_a_trained_one(trained, examples, tmp_path):
    model, report = trained
    fields = ("f.good", "f.poor", "f.path")
    fitted, same = linear_training.fit(*examples, "", fields=fields)
    assert fitted.fingerprint == model.fingerprint and same == report
    model.save(tmp_path / "m.npz")
    loaded, told = linear_training.fit("", "", str(tmp_path / "m.npz"), fields=fields)
    assert loaded.fingerprint == model.fingerprint == told["fingerprint"]


def test_long_documents_and_many_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_training, "DOCUMENTS", 120)
    monkeypatch.setattr(linear_training, "CHARACTERS", 500)
    rng = np.random.default_rng(6)
    long = [" ".join(draw(rng, 1, 0.8, 400)) for _ in range(300)]
    short = draw(rng, 300, -0.8)
    sets = write(tmp_path / "a.jsonl", long), write(tmp_path / "b.jsonl", short)
    model, report = linear_training.train(*sets)
    assert report["all"]["documents"] == [120, 120]
    assert model.score(text.join(long)).mean() > 0.9 > 0.2 > model.score(text.join(short)).mean()
