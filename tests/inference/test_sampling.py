"""From logits to tokens beside float64 NumPy: what may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.inference.sampling import History, Sampling, Settings, begin, penalize, sample

V = 100


def logits(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 3


def distribution(z, sampling):
    """Float64 probabilities of the tokens that temperature, top-k and top-p leave in."""
    z = np.asarray(z, np.float64) / sampling.temperature
    order = np.argsort(-z, kind="stable")
    kept = order[: sampling.top_k or len(z)]
    p = np.exp(z[kept] - z[kept].max())
    p /= p.sum()
    count = np.searchsorted(np.cumsum(p), sampling.top_p) + 1  # the one that reaches top-p stays
    result = np.zeros(len(z))
    result[kept[:count]] = p[:count] / p[:count].sum()
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5, top_p=0.85),
        Sampling(temperature=1.5, top_k=70),
        Sampling(temperature=2.0, top_p=0.6),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    draws, z = 4_000, logits(1)
    settings = Settings.of([sampling] * draws)
    rows = np.broadcast_to(z, (draws, V))
    got = jax.jit(sample)(rows, History.empty(draws, V), settings, np.arange(draws, dtype=np.int32))
    counts = np.bincount(got, minlength=V)
    want = distribution(z[0], sampling)
    assert np.all(counts[want == 0] == 0)
    error = 4.5 * np.sqrt(draws * want * (1 - want)) + 1
    assert np.all(np.abs(counts - draws * want) < error)


def test_a_row_does_not_depend_on_the_others():
    samplings = [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=1.0, top_k=4, seed=4),
        Sampling(temperature=1.0, top_p=0.7, seed=5),
        Sampling(temperature=0.5, top_k=90, seed=6),
    ]
    z, numbers = logits(len(samplings)), np.arange(5, dtype=np.int32)
    together = sample(z, History.empty(5, V), Settings.of(samplings), numbers)
    for i, sampling in enumerate(samplings):
        row = slice(i, i + 1)
        alone = sample(z[row], History.empty(1, V), Settings.of([sampling]), numbers[row])
        assert alone[0] == together[i]


def test_greedy_and_a_tiny_temperature_take_the_largest():
    z = np.array([[1.0, 20.0, 30.0, 5.0]] * 3, np.float32)
    samplings = [Sampling(), Sampling(temperature=1e-38), Sampling(temperature=1e-9, top_p=0.5)]
    got = sample(z, History.empty(3, 4), Settings.of(samplings), np.zeros(3, np.int32))
    assert got.tolist() == [2, 2, 2]


def test_penalties_and_biases():
    sampling = Sampling(
        repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={7: 2.5}
    )
    z = logits(2)
    prompt, output = [3, 4, 5], [5, 8, 8]
    in_prompt, bias = np.zeros(V, bool), np.zeros(V, np.float32)
    in_prompt[prompt], bias[7] = True, 2.5
    history = begin(History.empty(2, V), np.int32(1), in_prompt, bias)
    counts = history.counts.at[1, jnp.array(output)].add(1)
    history = History(history.in_prompt, counts, history.bias)
    got = np.asarray(penalize(z, history, Settings.of([Sampling(), sampling])))
    np.testing.assert_array_equal(got[0], z[0])
    want = z[1].astype(np.float64)
    for token in {*prompt, *output}:
        want[token] = want[token] / 1.5 if want[token] > 0 else want[token] * 1.5
    for token in set(output):
        want[token] -= 0.3 + 0.2 * output.count(token)
    want[7] += 2.5
    np.testing.assert_allclose(got[1], want, atol=1e-5)
    again = begin(history, np.int32(1), np.zeros(V, bool), np.zeros(V, np.float32))
    np.testing.assert_array_equal(penalize(z, again, Settings.of([sampling] * 2)), z)
