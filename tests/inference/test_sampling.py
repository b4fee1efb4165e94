"""Cached generation beside a loop without a cache, batch mates and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.inference.sampling import generate
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training.step import create_model

EOS = 2


def config(position):
    return ModelConfig(300, 64, 96, 2, 8, position=position, initializer_range=0.3)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, n).tolist() for n in (5, 70, 1)]


def without_cache(model, prompt, num_tokens):
    """Greedy continuation, the whole text anew for each token."""
    forward = jax.jit(lambda *inputs: model.logits(model(*inputs, dtype=jnp.float32)))
    text = list(prompt)
    positions = np.arange(128, dtype=np.int32)[None]
    while len(text) < len(prompt) + num_tokens:
        row = np.zeros((1, 128), np.int32)
        row[0, : len(text)] = text
        logits = forward(row, positions, (positions < len(text)).astype(np.int32))
        text.append(int(logits[0, len(text) - 1].argmax()))
        if text[-1] == EOS:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_greedy_equals_the_loop_without_a_cache(position):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = create_model(config(position), 0, mesh)
    with jax.set_mesh(mesh):
        got = generate(model, prompts(), max_new_tokens=8, eos_id=EOS, dtype=jnp.float32)
        assert got == [without_cache(model, prompt, 8) for prompt in prompts()]


def test_samples_depend_on_neither_batch_mates_nor_mesh():
    options = {"max_new_tokens": 8, "eos_id": EOS, "dtype": jnp.float32, "seed": 4}
    options |= {"temperature": 0.8, "top_k": 20}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = create_model(config("rope"), 0, mesh)
    with jax.set_mesh(mesh):
        together = generate(model, prompts(), **options)
        assert generate(model, prompts()[:2], **options) == together[:2]
        assert generate(model, prompts(), **options | {"seed": 5}) != together
        assert generate(model, prompts(), **options | {"temperature": 0.0}) != together
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        assert generate(create_model(config("rope"), 0, mesh), prompts(), **options) == together


def test_stops_at_the_end_of_text():
    model = Transformer(jax.random.key(0), config("rope"))
    options = {"max_new_tokens": 8, "dtype": jnp.float32}
    free = generate(model, prompts()[:1], eos_id=-1, **options)[0]
    assert len(free) == 8
    stop = free[3]
    cut = generate(model, prompts()[:1], eos_id=stop, **options)[0]
    assert cut == free[: free.index(stop)]


def test_an_empty_prompt_is_refused():
    model = Transformer(jax.random.key(0), config("rope"))
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[5], []], max_new_tokens=2, eos_id=EOS)
