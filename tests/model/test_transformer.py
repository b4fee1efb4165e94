"""The architecture: sizes, agreement with float64 NumPy and with Hugging Face, packing."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from baichuan_jax.config import REMAT_POLICIES, ModelConfig
from baichuan_jax.model.transformer import Transformer, norm_head
from configs.ladder import LADDER
from tests.goldens import make_llama
from tests.model import reference

SMALL = {"vocab_size": 200, "hidden_size": 48, "intermediate_size": 80, "num_layers": 2}
ROPE = ModelConfig(**SMALL, num_heads=4, initializer_range=0.2)
ALIBI = ModelConfig(**SMALL, num_heads=6, initializer_range=0.2, position="alibi")


def names_and_arrays(model):
    leaves = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {
        jax.tree_util.keystr(path).lstrip("."): jax.tree.leaves(leaf)[0] for path, leaf in leaves
    }


def abstract(config):
    return jax.eval_shape(lambda key: Transformer(key, config), jax.random.key(0))


def parameters(config, embeddings=True):
    """Logical parameters: rows that only pad the vocabulary do not count."""
    padding = config.padded_vocab_size - config.vocab_size
    count = 0
    for name, array in names_and_arrays(abstract(config)).items():
        if name in ("embedding", "head"):
            count += embeddings * (array.size - padding * array.shape[1])
        else:
            count += array.size
    return count


def rows(documents, length):
    """Packs documents into one row: tokens, positions, segments."""
    tokens, positions, segments = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for number, document in enumerate(documents, 1):
        stop = start + len(document)
        tokens[0, start:stop] = document
        positions[0, start:stop] = np.arange(len(document))
        segments[0, start:stop] = number
        start = stop
    return tokens, positions, segments


@pytest.mark.parametrize(
    ("recipe", "total"),
    [
        ("baichuan2_7b", 7_505_973_248),
        ("baichuan2_13b", 13_896_668_160),
        ("baichuan1_7b", 7_000_559_616),
        ("baichuan1_13b", 13_264_901_120),
    ],
)
def test_parameter_counts_of_the_releases(recipe, total):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    assert parameters(config.model) == total
    assert config.model.padded_vocab_size == config.model.vocab_size


# Table 10, in millions.
TABLE_10 = dict(
    zip(LADDER, (11.51, 51.56, 108.01, 307.60, 835.00, 1_565.60, 3_019.33), strict=True)
)


@pytest.mark.parametrize("hidden_size", LADDER)
def test_non_embedding_parameters_of_table_10(hidden_size):
    config = importlib.import_module("configs.ladder").get_config(str(hidden_size)).model
    millions = parameters(config, embeddings=False) / 1e6
    assert round(millions, 2) == TABLE_10[hidden_size]


def test_ladder_names_its_sizes():
    with pytest.raises(ValueError, match="2880"):
        importlib.import_module("configs.ladder").get_config("400")


@pytest.mark.parametrize("config", [ROPE, ALIBI], ids=["rope", "alibi"])
def test_agrees_with_float64_numpy(config):
    model = Transformer(jax.random.key(1), config)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, config.vocab_size, n) for n in (17, 9)]
    hidden = model(*rows(documents, 32), dtype=jnp.float32)
    got = np.asarray(model.logits(hidden))[0]
    weights = names_and_arrays(model)
    for start, document in ((0, documents[0]), (17, documents[1])):
        want = reference.logits(weights, document, config)
        part = got[start : start + len(document), : config.vocab_size]
        np.testing.assert_allclose(part, want, atol=1e-4)
    assert np.all(np.isneginf(got[:, config.vocab_size :]))


@pytest.mark.parametrize("config", [ROPE, ALIBI], ids=["rope", "alibi"])
def test_packing_changes_no_document(config):
    model = Transformer(jax.random.key(2), config)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, config.vocab_size, n) for n in (11, 1, 20, 6)]
    packed = np.asarray(model(*rows(documents, 40), dtype=jnp.float32))[0]
    start = 0
    for document in documents:
        alone = model(*rows([document], len(document)), dtype=jnp.float32)[0]
        np.testing.assert_allclose(packed[start : start + len(document)], alone, atol=2e-5)
        start += len(document)
    reordered = np.asarray(model(*rows(documents[::-1], 40), dtype=jnp.float32))[0]
    np.testing.assert_allclose(reordered[:6], packed[32:38], atol=2e-5)


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(remat):
    model = Transformer(jax.random.key(3), ROPE)
    inputs = rows([np.arange(20)], 20)

    def total(model, remat):
        return jnp.sum(model(*inputs, dtype=jnp.float32, remat=remat) ** 2)

    plain, other = (jax.grad(total)(model, name) for name in ("none", remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_scan_is_a_loop_over_the_layers():
    model = Transformer(jax.random.key(4), ROPE)
    tokens, positions, segments = rows([np.arange(12)], 12)
    x = model.embed(tokens, jnp.float32)
    for n in range(ROPE.num_layers):
        layer = jax.tree.map(lambda a, n=n: a[n], model.layers)
        x, _ = layer(x, positions, segments)
    want = model(tokens, positions, segments, dtype=jnp.float32)
    np.testing.assert_allclose(model.norm(x), want, atol=1e-5)


def test_norm_head_is_scale_free_and_leaves_the_weight_alone():
    model = Transformer(jax.random.key(5), ROPE)
    before = np.asarray(model.head[...])
    hidden = model(*rows([np.arange(8)], 8), dtype=jnp.float32)
    plain = model.logits(hidden)
    np.testing.assert_array_equal(before, model.head[...])
    model.head[...] = model.head[...] * 7.0
    np.testing.assert_allclose(model.logits(hidden), plain, rtol=1e-5, atol=1e-5)
    lengths = np.linalg.norm(norm_head(model.head[...]), axis=1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-6)
    head = jnp.zeros((2, 3)).at[0].set(2.0)
    gradient = jax.grad(lambda head: jnp.sum(norm_head(head) * jnp.arange(3.0)))(head)
    assert np.all(np.isfinite(norm_head(head))) and np.all(np.isfinite(gradient))
    assert np.any(gradient[0]) and not np.any(gradient[1] > 1e30)


def test_baichuan_1_has_no_norm_head():
    config = ModelConfig(**SMALL, num_heads=4, norm_head=False)
    model = Transformer(jax.random.key(6), config)
    hidden = model(*rows([np.arange(8)], 8), dtype=jnp.float32)
    want = np.asarray(hidden) @ np.asarray(model.head[...]).T
    np.testing.assert_allclose(model.logits(hidden)[..., :200], want[..., :200], atol=1e-5)


def with_weights(model, arrays):
    """The model with arrays, by their names, in place of its own."""
    for name, value in arrays.items():
        module, _, leaf = name.rpartition(".")
        target = model
        for part in filter(None, module.split(".")):
            target = getattr(target, part)
        getattr(target, leaf)[...] = jnp.asarray(value)
    return model


def ours_with_llama_weights():
    """Logits of our model with the weights that the Hugging Face model of the golden has."""
    config = make_llama.CONFIG
    model = with_weights(Transformer(jax.random.key(0), config), make_llama.weights())
    tokens = make_llama.tokens()
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden = model(tokens, positions, np.ones_like(tokens), dtype=jnp.float32)
    return np.asarray(model.logits(hidden))[..., : config.vocab_size]


def test_agrees_with_hugging_face_llama():
    golden = np.load(Path(__file__).parents[1] / "goldens" / "llama.npz")
    np.testing.assert_allclose(ours_with_llama_weights(), golden["logits"], atol=1e-4)


@pytest.mark.oracle
def test_agrees_with_hugging_face_llama_live():
    np.testing.assert_allclose(ours_with_llama_weights(), make_llama.logits(), atol=1e-4)
