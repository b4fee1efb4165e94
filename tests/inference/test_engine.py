"""The engine beside loops without a cache and Hugging Face, with and without company."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.inference import programs, weights
from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.request import Request
from baichuan_jax.inference.sampling import Sampling
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training.step import create_model
from tests.goldens import make_llama
from tests.model.test_transformer import with_weights

EOS = 2
WIDTH = 384  # of the loop without a cache


def config(position):
    return ModelConfig(300, 64, 96, 2, 8, position=position, initializer_range=0.3)


@functools.cache
def trained(position):
    return Transformer(jax.random.key(0), config(position))


@functools.cache
def served(position):
    return weights.of_model(trained(position), config(position), jnp.float32)


def engine(position="rope", **options):
    options = {"slots": 3, "max_length": 1_200, "chunk": 32, "eos_id": -1} | options
    return Engine(served(position), config(position), **options)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, n).tolist() for n in lengths]


@functools.cache
def forward(position):
    model = trained(position)
    return jax.jit(
        lambda *inputs: jax.nn.log_softmax(model.logits(model(*inputs, dtype="float32")))
    )


def logprobs(position, text):
    """Of every token that may follow each beginning of the text, the whole text at one time."""
    row, positions = np.zeros((1, WIDTH), np.int32), np.arange(WIDTH, dtype=np.int32)[None]
    row[0, : len(text)] = text
    return np.asarray(forward(position)(row, positions, (positions < len(text)).astype(np.int32)))[
        0
    ]


def without_cache(position, prompt, num_tokens):
    """Greedy continuation, the whole text anew for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + num_tokens:
        text.append(int(logprobs(position, text)[len(text) - 1].argmax()))
    return text[len(prompt) :]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=4),
    Sampling(temperature=1.3, seed=5, presence_penalty=0.5, frequency_penalty=0.2),
    Sampling(temperature=0.7, top_p=0.8, seed=2**63, logit_bias={7: 3.0, 9: -100}),
    Sampling(temperature=1.0, top_k=100, seed=4),
]


def mixed():
    lengths = (5, 70, 1, 100, 33, 2, 64, 65)
    return [
        Request(prompt, 12 + i, SAMPLINGS[i % len(SAMPLINGS)], score_from=0 if i % 3 else None)
        for i, prompt in enumerate(prompts(*lengths))
    ]


def assert_same(outputs, expected):
    for output, other in zip(outputs, expected, strict=True):
        assert output.tokens == other.tokens
        np.testing.assert_allclose(output.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(output.prompt_logprobs, other.prompt_logprobs, atol=1e-5)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_greedy_equals_the_loop_without_a_cache(position):
    requests = [Request(prompt, 10) for prompt in prompts(5, 70, 1, 100)]
    for output in engine(position).generate(requests):
        assert output.tokens == without_cache(position, output.request.prompt, 10)
        assert output.finish_reason == "length"


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_logprobs_are_those_of_the_whole_text(position):
    requests = [
        Request(prompt, 6, SAMPLINGS[1], score_from=start, top_logprobs=3)
        for prompt, start in zip(prompts(40, 90, 2), (0, 50, 1), strict=True)
    ]
    for output in engine(position).generate(requests):
        prompt, start = output.request.prompt, max(1, output.request.score_from)
        table = logprobs(position, prompt + output.tokens)
        text = prompt + output.tokens
        want = [table[i - 1, text[i]] for i in range(start, len(text))]
        np.testing.assert_allclose(output.prompt_logprobs + output.logprobs, want, atol=1e-5)
        for i, top in zip(range(start, len(text)), output.prompt_top + output.top, strict=True):
            values = np.sort(table[i - 1])[::-1][:3]
            np.testing.assert_allclose([value for _, value in top], values, atol=1e-5)
            np.testing.assert_allclose([table[i - 1, k] for k, _ in top], values, atol=1e-5)


def golden_engine():
    config = make_llama.CONFIG
    model = with_weights(Transformer(jax.random.key(0), config), make_llama.weights())
    model = weights.of_model(model, config, jnp.float32)
    return Engine(model, config, eos_id=-1, slots=2, max_length=300, chunk=32)


@pytest.mark.parametrize(("name", "penalty"), [("greedy", 1.0), ("penalized", make_llama.PENALTY)])
def test_tokens_of_hugging_face_generate(name, penalty):
    golden = np.load(Path(__file__).parents[1] / "goldens" / "llama.npz")[name]
    sampling = Sampling(repetition_penalty=penalty)
    requests = [Request(p, make_llama.NEW_TOKENS, sampling) for p in make_llama.prompts()]
    assert [o.tokens for o in golden_engine().generate(requests)] == golden.tolist()


@pytest.mark.oracle
def test_tokens_of_hugging_face_generate_live():
    for penalty in (1.0, make_llama.PENALTY):
        sampling = Sampling(repetition_penalty=penalty)
        requests = [Request(p, make_llama.NEW_TOKENS, sampling) for p in make_llama.prompts()]
        got = [output.tokens for output in golden_engine().generate(requests)]
        assert got == make_llama.generated(penalty).tolist()


def test_company_changes_nothing():
    together = engine(slots=5).generate(mixed())
    for seed in (0, 1):  # other neighbours in other slots, other lengths of chunk and visit
        order = np.random.default_rng(seed).permutation(len(together))
        other = engine(slots=3 + seed, chunk=48, tokens_per_visit=5)
        outputs = dict(zip(order, other.generate([mixed()[i] for i in order]), strict=True))
        assert_same([outputs[i] for i in range(len(together))], together)
    alone = engine(slots=1)
    assert_same([alone.generate([request])[0] for request in mixed()], together)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_every_mesh_gives_the_same(shape):
    mesh = make_mesh(MeshConfig(*shape))
    rope = config("rope")
    with jax.set_mesh(mesh):
        model = weights.of_model(create_model(rope, 0, mesh), rope, jnp.float32)
    shared = prompts(50, seed=3)[0]
    requests = [*mixed(), *(Request(shared + end, 8, SAMPLINGS[1]) for end in ([4], [5, 6], [7]))]
    options = {"eos_id": -1, "slots": 8, "max_length": 300, "chunk": 32}
    outputs = Engine(model, rope, mesh=mesh, **options).generate(requests)
    assert_same(outputs, engine(slots=8).generate(requests))


def test_int8_cache_is_close():
    requests = [Request(p, 8, score_from=0) for p in prompts(40, 70)]
    exact, rounded = (engine(cache_dtype=d).generate(requests) for d in (None, jnp.int8))
    for a, b in zip(exact, rounded, strict=True):
        error = np.abs(np.subtract(a.prompt_logprobs, b.prompt_logprobs))
        assert 0 < error.mean() < 0.04  # of values of about 5


def test_common_beginnings_are_read_once():
    shared = prompts(100)[0]
    requests = [Request(shared + end, 6) for end in prompts(3, 9, 20, 1, 5, seed=1)]
    unit = engine(slots=2)
    outputs = unit.generate(requests)
    assert [output.cached_tokens for output in outputs] == [0, 100, 100, 100, 100]
    assert unit.stats.cached_tokens == 400 and unit.stats.prompt_tokens == 538
    fresh = [engine(slots=1).generate([request])[0] for request in requests]
    assert_same(outputs, fresh)
    again = unit.generate([Request(requests[0].prompt + outputs[0].tokens + [7], 6)])[0]
    assert again.cached_tokens >= 100
    assert again.tokens == without_cache("rope", again.request.prompt, 6)


def test_scored_tokens_are_never_taken_over():
    prompt = prompts(80)[0]
    unit = engine(slots=2)
    unit.generate([Request(prompt, 4)])
    first, second = unit.generate([Request(prompt, 0, score_from=n) for n in (0, 60)])
    assert (first.cached_tokens, second.cached_tokens) == (0, 59)
    assert (len(first.prompt_logprobs), len(second.prompt_logprobs)) == (79, 20)
    np.testing.assert_allclose(first.prompt_logprobs[59:], second.prompt_logprobs, atol=1e-5)
    assert first.tokens == [] and first.finish_reason == "length"


def test_the_cache_grows_and_shrinks():
    unit = engine(slots=2, tokens_per_visit=2)
    short = Request(prompts(20)[0], 100)
    alone = engine(slots=1, max_length=256).generate([short])[0]
    long = unit.submit(Request(prompts(245)[0], 40))
    running = unit.submit(short)
    lengths = set()
    while unit.busy:
        unit.step()
        lengths.add(unit._length)
    assert lengths == {128, 256, 512} and unit._length == 128  # it shrank after the long one
    assert_same([running], [alone])
    assert long.tokens == without_cache("rope", long.request.prompt, 40)


@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_a_program_is_compiled_once_for_a_shape(platform):
    """One for each length of the cache; on a CPU, for each power of two of rows besides."""
    unit = engine(slots=4, max_length=100 if platform == "cpu" else 101, tokens_per_visit=3)
    unit._on_cpu = platform == "cpu"
    before = programs.decode._cache_size(), programs.read._cache_size()
    for seed in range(4):
        requests = [
            Request(p, 7 + seed, s)
            for p, s in zip(prompts(3, 60, 90, 2, 40, seed=seed), SAMPLINGS, strict=True)
        ]
        unit.generate([*requests, Request([5], 1, top_logprobs=2)])
        unit.generate(requests[:1])
        unit.generate(requests[3:5])
    assert programs.decode._cache_size() - before[0] == (3 if platform == "cpu" else 1)
    assert programs.read._cache_size() - before[1] == 2  # of one prompt, and of four at one time
    unit.generate([Request(prompts(40)[0], 0, score_from=0)])
    assert programs.read._cache_size() - before[1] == 3  # reading with scores is another program


def test_end_of_text_and_its_neglect():
    free = engine().generate([Request(prompts(5)[0], 12)])[0]
    eos = free.tokens[5]
    cut = free.tokens.index(eos)
    stopped, ignored = engine(eos_id=eos).generate(
        [Request(prompts(5)[0], 12), Request(prompts(5)[0], 12, ignore_eos=True)]
    )
    assert stopped.tokens == free.tokens[:cut] and stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == len(stopped.top) == cut
    assert ignored.tokens == free.tokens and ignored.finish_reason == "length"


def test_cancelled_requests_leave_their_slots():
    unit = engine(slots=2)
    outputs = [unit.submit(Request(p, 500)) for p in prompts(5, 6, 7)]
    unit.step()
    assert (unit.active, unit.waiting) == (2, 1)
    unit.cancel(outputs[0])
    unit.cancel(outputs[2])
    assert (unit.active, unit.waiting) == (1, 0)
    unit.cancel(outputs[1])
    unit.cancel(outputs[1])
    assert not unit.busy and unit.step() == []
    assert {output.finish_reason for output in outputs} == {"cancelled"}
    request = Request(prompts(9)[0], 6)
    assert_same(unit.generate([request]), engine().generate([request]))


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"prompt": []}, "at least one token id"),
        ({"prompt": [1.5]}, "at least one token id"),
        ({"prompt": [5, 300]}, "id 300"),
        ({"prompt": [-1]}, "id -1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 1_200}, "max_length=1200"),
        ({"top_logprobs": 21}, "top_logprobs=21"),
        ({"score_from": -2}, "score_from=-2"),
        ({"score_from": 1.0}, "score_from=1.0"),
        ({"max_new_tokens": 3.5}, "max_new_tokens=3.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"stop": ("x",)}, "tokenizer"),
        ({"sampling": Sampling(temperature=-1)}, "temperature=-1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature=nan"),
        ({"sampling": Sampling(top_p=0)}, "top_p=0"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p=1.5"),
        ({"sampling": Sampling(top_k=-3)}, "top_k=-3"),
        ({"sampling": Sampling(seed=1.5)}, "seed=1.5"),
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty=0"),
        ({"sampling": Sampling(logit_bias={300: 1.0})}, "id 300"),
        ({"sampling": Sampling(logit_bias={3: 1e3})}, r"logit_bias\[3\]"),
    ],
)
def test_bad_requests_are_refused_by_name(request_fields, message):
    unit = engine()
    with pytest.raises(ValueError, match=message):
        unit.submit(Request(**{"prompt": [5], "max_new_tokens": 3} | request_fields))
    assert not unit.busy


def test_nothing_runs_on_after_an_error():
    unit = engine(slots=2)
    requests = [Request(p, 300) for p in prompts(5, 6, 7)]
    with pytest.raises(ValueError, match="max_new_tokens=-1"):
        unit.generate([*requests, Request([5], -1)])
    assert not unit.busy
    steps = unit.step
    unit.step = lambda: steps() if unit.waiting == 3 else 1 / 0  # as Ctrl-C would
    with pytest.raises(ZeroDivisionError):
        unit.generate(requests)
    assert not unit.busy


def test_ids_without_a_piece_are_neither_drawn_nor_told():
    unit = engine()
    unit.vocab_size = 40  # as a smaller tokenizer makes it
    requests = [Request([5, 6, 7], 20, s, score_from=0, top_logprobs=20) for s in SAMPLINGS]
    for output in unit.generate(requests):
        assert max(output.tokens) < 40
        told = [pair for top in output.prompt_top + output.top for pair in top]
        assert max(token for token, _ in told) < 40
        table = logprobs("rope", [5, 6, 7])
        for token, value in output.prompt_top[0]:  # of the whole vocabulary all the same
            np.testing.assert_allclose(value, table[0, token], atol=1e-5)


def test_the_longest_cache_is_tried():
    unit = engine()
    want = unit.generate([Request(prompts(9)[0], 6)])
    lengths = []
    resize = unit._set_length
    unit._set_length = lambda length: (lengths.append(length), resize(length))
    unit.try_longest()
    assert lengths == [1_200, 128]
    assert_same(unit.generate([Request(prompts(9)[0], 6)]), want)


def test_bad_engines_are_refused_by_name():
    with pytest.raises(ValueError, match="slots=0"):
        engine(slots=0)
    with pytest.raises(ValueError, match=r"slots=6 .* 8"):
        engine(slots=6, mesh=make_mesh(MeshConfig(8, 1, 1)))
    with pytest.raises(ValueError, match="tokens_per_visit=0"):
        engine(tokens_per_visit=0)
