"""The benchmark of whole steps on a GPU: its layouts and tables here, its programs compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from baichuan_jax import interleave
from baichuan_jax.config import ModelConfig
from baichuan_jax.parallel import topology
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.training import ahead, benchmark, device_benchmark
from baichuan_jax.training import gpu_benchmark as gpu
from configs import baichuan2_7b, baichuan2_13b

RECIPES = {"7B": baichuan2_7b.get_config(), "13B": baichuan2_13b.get_config()}
HALF = dataclasses.replace(RECIPES["13B"].model, num_layers=20)
TINY = benchmark.Shape(32, 48, 2, 2, 128, 2, 16, 2, "bfloat16", "alibi", "full")
H200, H100 = 129.9 * GIB, 73.5 * GIB


@pytest.mark.parametrize(
    ("model", "memory", "full", "matmuls"),
    [
        (RECIPES["7B"].model, H200, 32, 20),
        (HALF, H200, 20, 13),
        (RECIPES["7B"].model, H100, 15, 9),
    ],
)
def test_as_many_layers_as_there_is_memory_for(model, memory, full, matmuls):
    shape = gpu.fitted(model, "full", memory)
    assert (shape.num_layers, shape.micro_batches, shape.tokens) == (full, 1, 32_768)
    assert shape.model == dataclasses.replace(model, num_layers=full)
    assert gpu.fitted(model, "matmuls", memory).num_layers == matmuls
    theirs = gpu.their_layout(shape, memory)
    assert (theirs.num_layers, theirs.micro_batches, theirs.remat) == (full, 4, "none")


def test_parameters_are_those_of_the_published_model():
    shape = gpu.fitted(RECIPES["7B"].model, "full", H200)
    gains = (2 * 32 + 1) * 4_096
    assert gpu.parameters(shape) + gains == 7_505_973_248


def test_a_small_card_is_told_what_it_lacks():
    with pytest.raises(ValueError, match=r"16\.0 GiB .* does not hold a layer of 4,096"):
        gpu.fitted(RECIPES["7B"].model, "full", 16 * GIB)
    tight = gpu.their_layout(gpu.fitted(RECIPES["7B"].model, "full", H200), 90 * GIB)
    assert (tight.micro_batches, tight.remat) == (4, "full")


def test_where_there_is_no_gpu_it_says_so():
    with pytest.raises(ValueError, match=r"--shape=7b is trained on a GPU, .* is cpu, "):
        next(gpu.report(RECIPES, ["7b"], 1))


@pytest.mark.parametrize(
    ("names", "sides", "message"),
    [
        (["13b"], gpu.SIDES, "--shape=13b: should be of 27m, 7b, 13b_half"),
        (["7b", "27m"], gpu.SIDES, "27m is measured alone"),
        (["7b"], ["theirs"], "--sides=theirs: should be of ours, transformers"),
    ],
)
def test_what_is_not_there_is_refused(names, sides, message):
    with pytest.raises(ValueError, match=message):
        next(gpu.report(RECIPES, names, 1, sides))


@pytest.fixture
def card(monkeypatch):
    """A card as `interleave.run` would tell of it; the 13B's second layout runs out of memory."""
    device = {"platform": "gpu", "about": "a card", "memory": H200, "torch": True}
    peak, flops = 100 * GIB, 2 * 8_192**3

    def run(sides, calls, about, rounds):
        ((make, settings),) = sides.values()
        if make is gpu.device_side:
            return {"": device}
        answers = {"about": "jax", "peak": peak, "product_flops": flops, "temporary": 2 * GIB}
        seconds = {"train": 4.0, "packed": 3.5, "product": 0.0015, "loss": 0.16}
        if make is gpu.alone and settings["position"] == "alibi":
            if settings["remat"] == "matmuls":
                raise RuntimeError("The benchmark's worker ended; its error stands above.")
            seconds["train"] = 5.0
        answers |= {call: [99.0] * device_benchmark.WARM_UP + [seconds[call]] * 2 for call in calls}
        return dict.fromkeys(sides, answers)

    monkeypatch.setattr(interleave, "run", run)
    return device


def test_the_tables(card):
    text = "\n".join(gpu.report(RECIPES, ["7b", "13b_half"], 2))
    assert text.startswith("a card\n")
    rate = 32_768 * 45.17e9 / 4  # of the 7B
    assert f"{rate / 1e12:9.3g}" in text and f"{rate * 0.0015 / (2 * 8_192**3):.1%}" in text
    rows = [line.split()[:4] for line in text.splitlines() if line.endswith("  jax")]
    assert rows == [
        ["ours", "32", "1", "full"],
        ["transformers", "32", "4", "none"],
        ["ours", "20", "2", "matmuls"],
        ["ours", "20", "1", "full"],
        ["transformers", "20", "4", "none"],
    ]
    assert "ours, 13 layers, saved: matmuls: The benchmark's worker ended" in text
    assert "ours beside it, as fast per FLOP: full 1.00×, matmuls" in text
    assert "full 0.80×\n" in text and "ALiBi as a dense mask" in text
    assert "13b_half beside 7b, share of the limit: ours full -" in text
    ideal = 3 * 0.0015 * 32_768 * 125_696 * 4_096 / 8_192**3
    assert f"gradients of 32,768 in 160.0 ms, {0.16 / ideal:.2f} × three products" in text


def test_without_pytorch_the_other_side_is_left_out(card):
    card["torch"] = False
    text = "\n".join(gpu.report(RECIPES, ["7b"], 2))
    assert "transformers: left out" in text and "beside it" not in text
    card["torch"] = True
    text = "\n".join(gpu.report(RECIPES, ["7b"], 2, ["transformers"]))
    assert "head" not in text and "\nours" not in text


def test_our_side_and_the_head_run():
    row = gpu.measure("ours", TINY, gpu.alone, dataclasses.asdict(TINY), 1)
    assert min(row.seconds, row.packed, row.limit) > 0 and row.about.endswith("cpu")
    settings = {"rows": 2, "length": 8, "dtype": "bfloat16", "chunk": 4}
    assert "4 tokens at a time: loss and gradients of 16 in" in gpu.head(TINY.model, settings, 1)


def test_the_heads_loss_falls_along_its_gradient():
    model = ModelConfig(vocab_size=100, hidden_size=16)
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, head = jax.random.normal(keys[0], (2, 8, 16)), jax.random.normal(keys[1], (128, 16))
    targets = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    loss = functools.partial(gpu.head_loss, model, 4, hidden)
    before, gradient = jax.value_and_grad(loss)(head, targets, targets >= 0)
    assert loss(head - 0.1 * gradient, targets, targets >= 0) < before


# With the CUDA plugin.


@pytest.mark.aot
@pytest.mark.parametrize("model", [RECIPES["7B"].model, HALF], ids=["7b", "13b_half"])
@pytest.mark.parametrize("remat", list(gpu.LAYOUTS))
def test_what_is_trained_fits_the_card(model, remat):
    pytest.importorskip("jax_plugins.xla_cuda13")
    machine = topology.parse("h200:1x1")
    shape = gpu.fitted(model, remat, machine.chip.memory)
    compiled = ahead.compile_step(shape.config, machine)
    assert compiled.fits and compiled.peak > 0.85 * machine.chip.memory


@pytest.mark.aot
@pytest.mark.parametrize("model", [RECIPES["7B"].model, HALF], ids=["7b", "13b_half"])
def test_temporaries_of_the_head(model):
    """At most 2.3 GiB for 32,768 tokens, beside what the head's gradient takes anyhow."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    device = ahead.devices(topology.parse("h200:1x1"))[0]
    here = jax.sharding.SingleDeviceSharding(device)
    chunk, D = gpu.CHUNKS[-1], model.hidden_size
    shapes = [((8, 4_096, D), "bfloat16"), ((125_696, D), "float32")]
    shapes += [((8, 4_096), "int32"), ((8, 4_096), "bool")]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=here) for shape in shapes]
    run = jax.value_and_grad(functools.partial(gpu.head_loss, model, chunk), (0, 1))
    program = jax.jit(run).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 2.3 * GIB
