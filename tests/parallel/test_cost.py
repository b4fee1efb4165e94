"""Bytes and seconds by hand."""

import dataclasses

import numpy as np
import pytest

from baichuan_jax.config import PLACEMENTS, Config
from baichuan_jax.parallel import cost, topology
from baichuan_jax.parallel.cost import Assumptions
from baichuan_jax.parallel.layout import Job, Layout, sizes
from baichuan_jax.parallel.topology import Ring
from baichuan_jax.parallel.traffic import traffic
from configs import baichuan2_7b, baichuan2_13b

D, F, L, V, T = 64, 128, 3, 256, 32
LAYER = 4 * D * D + 3 * D * F


def tiny(**changes) -> Job:
    config = Config()
    config.model.hidden_size, config.model.intermediate_size = D, F
    config.model.num_layers, config.model.num_heads, config.model.vocab_size = L, 8, V
    config.data.sequence_length, config.training.batch_size = T, 64
    return dataclasses.replace(Job.of(config), **changes)


def layout(placement="full", mesh=(2, 4, 1), micro_batches=1, remat="full", layers=None) -> Layout:
    layers = layers or tuple(L if placement == name else 0 for name in PLACEMENTS)
    return Layout(mesh, micro_batches, remat, "", placement, layers, placement)


@pytest.mark.parametrize("gradient", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bytes_of_weights_and_gradients_by_hand(placement, micro_batches, gradient):
    """a = 4 devices of fsdp and b = 2 of replica: what a device lacks of a gathered matrix."""
    K, matrices, ends = micro_batches, L * LAYER, 2 * V * D
    inside, across = 3 / 4, 1 / 8  # of a matrix, in the two stages
    # Gathers over fsdp and over replica, and reductions, in a step: layers, then the ends.
    times = {
        ("replicated", 1): ((1, 1, 1, 1), (1, 1, 1, 1)),
        ("hierarchical", 1): ((2, 1, 1, 1), (1, 1, 1, 1)),
        ("full", 1): ((2, 2, 1, 1), (1, 1, 1, 1)),
        ("replicated", 4): ((1, 1, 1, 1), (1, 1, 1, 1)),
        ("hierarchical", 4): ((2 * K, 1, K, 1), (K, 1, K, 1)),
        ("full", 4): ((2 * K, 2 * K, K, K), (K, K, K, K)),
    }[placement, K]
    found = traffic(tiny(gradient=gradient), layout(placement, micro_batches=K))
    want = [matrices * layer + ends * end for layer, end in zip(*times, strict=True)]
    assert found == pytest.approx(
        {
            ("weights", "fsdp", "all-gather"): 2 * inside * want[0],
            ("weights", "replica", "all-gather"): 2 * across * want[1],
            ("gradients", "fsdp", "reduce-scatter"): gradient * inside * want[2],
            ("gradients", "replica", "reduce-scatter"): gradient * across * want[3],
        }
    )


def test_bytes_of_tensor_parallelism_by_hand():
    """Four collectives of a layer's tokens forward; backward four, and what is computed again."""
    found = traffic(tiny(), layout(mesh=(1, 4, 2)))
    tokens = 64 // 4 * T
    one = tokens * D * 2 / 2
    assert found["activations", "tensor", "all-gather"] == L * (2 + 2 + 2) * one + one
    assert found["activations", "tensor", "reduce-scatter"] == L * (2 + 2 + 1) * one
    saved = traffic(tiny(), layout(mesh=(1, 4, 2), remat="matmuls"))
    assert saved["activations", "tensor", "reduce-scatter"] == L * (2 + 2) * one
    assert found["weights", "fsdp", "all-gather"] == (2 * L * LAYER + 2 * V * D) * 3 / 4  # halves


def test_odd_sizes_are_reduced_over_copies():
    """96 of fsdp divide no matrix here: replica does, and the rest are copies."""
    size = sizes(tiny().model, (2, 96, 1))
    assert size.head.copies == (1, 96) and size.head.stored == V * D // 2
    found = traffic(tiny(rows=192), layout(mesh=(2, 96, 1)))
    want = 2 * 95 / 96 * (L * LAYER + 2 * V * D) * 4  # whole: replica scatters it after that
    assert found["gradients", "fsdp", "all-reduce"] == pytest.approx(want)


def test_seconds_by_hand():
    assumptions = Assumptions(links=0.5)
    ring = Ring(4, 100.0, 0.25, "NVLink")
    assert cost.seconds(300, (ring,), assumptions) == 300 / 50 + 3 * 0.25
    assert cost.seconds(300, (), assumptions) == 0
    # 8 devices in 2 nodes: 700 bytes of 800 come; 600 by NVLink, then 100 of 200 from the other.
    outer = Ring(2, 10.0, 1.0, "InfiniBand")
    assert cost.seconds(700, (ring, outer), assumptions) == 100 / 5 + 3 * 0.25 + 1.0
    fast = dataclasses.replace(outer, bandwidth=1e9)
    assert cost.seconds(700, (ring, fast), assumptions) == 600 / 50 + 3 * 0.25 + 1.0
    many = Ring(1_024, 1e9, 1.0, "InfiniBand")  # a tree of 2 · log2 hops, not 1,023
    assert cost.seconds(1, (many,), assumptions) == pytest.approx(20)


@pytest.mark.parametrize(("recipe", "billions"), [(baichuan2_7b, 45.17), (baichuan2_13b, 84.55)])
def test_flops_of_the_published_models(recipe, billions):
    found = cost.flops_per_token(recipe.get_config().model, 4_096)
    assert found / 1e9 == pytest.approx(billions, abs=0.005)


def ideal(**changes) -> Assumptions:
    """Nothing but products takes time."""
    changes = {"products": 1.0, "attention": 1.0, "logit_bytes": 0, "loss_bytes": 0} | changes
    return Assumptions(**changes)


MACHINE = topology.parse("h100:2x4")
WIDE = dataclasses.replace(MACHINE, chip=dataclasses.replace(MACHINE.chip, bandwidth=1e30))


def test_compute_by_hand():
    """Matrix products of a step are 6 FLOPs a parameter, and 2 for each that is done again."""
    job, chip = tiny(), WIDE.chip
    tokens = 64 // 8 * T
    found = cost.compute(job, layout(), chip, ideal())
    attention = 2 * T * D * tokens
    assert found.forward == pytest.approx((2 * LAYER * tokens + attention) / chip.flops)
    assert found.backward == pytest.approx((4 * LAYER * tokens + 2.5 * attention) / chip.flops)
    down = D * F
    assert found.again == pytest.approx((2 * (LAYER - down) * tokens + attention) / chip.flops)
    assert found.loss == pytest.approx(6 * V * D * tokens / chip.flops)
    again = {
        remat: cost.compute(job, layout(remat=remat), chip, ideal()).again * chip.flops
        for remat in ("none", "matmuls", "attention", "qkv,gate_up")
    }
    assert again["none"] == 0 and again["matmuls"] == pytest.approx(0, abs=1)
    assert again["attention"] == pytest.approx(2 * (D * D + 2 * D * F) * tokens)
    assert again["qkv,gate_up"] == pytest.approx(2 * D * D * tokens + attention)
    halves = cost.compute(job, layout(mesh=(1, 4, 2)), chip, ideal())  # twice the rows
    assert halves.forward == pytest.approx(found.forward)


def test_memory_bound_work():
    job, one = tiny(), layout()
    slow = dataclasses.replace(WIDE.chip, flops=1e30, bandwidth=1e9)
    found = cost.compute(job, one, slow, ideal(memory=0.5, logit_bytes=16))
    tokens = 64 // 8 * T
    logits, elementwise = T / 2 * 8 * 16, (14 * D + 3 * F) * 2
    assert found.forward == pytest.approx(tokens * (logits + elementwise) / 0.5e9)
    assert found.again == pytest.approx(found.forward)
    assert found.backward == pytest.approx(2 * found.forward)


def test_what_hides_and_what_waits():
    """A layer takes as long as the longer of compute and its slowest links."""
    job, chip = tiny(), WIDE.chip
    links = dataclasses.replace(chip.inside, bandwidth=1e30, latency=0.0)
    fast = dataclasses.replace(WIDE, chip=dataclasses.replace(chip, inside=links, across=links))
    hidden = cost.step(job, layout(), fast, ideal())
    assert float(hidden.exposed) == pytest.approx(0, abs=1e-12)
    slow_link = dataclasses.replace(links, bandwidth=1e6)
    slow = dataclasses.replace(fast, chip=dataclasses.replace(fast.chip, across=slow_link))
    found = cost.step(job, layout(), slow, ideal(links=1.0))
    work = cost.compute(job, layout(), chip, ideal())
    gather = LAYER / 8 * 2 / 1e6  # over two replicas: half of a quarter
    forward, backward = found.phases["full", "forward"], found.phases["full", "backward"]
    assert forward.exposed == pytest.approx(gather - work.forward)
    assert backward.exposed == pytest.approx(3 * gather - work.backward - work.again)
    exposed = L * (forward.exposed + backward.exposed)
    assert found.parts["waits for layers"] == pytest.approx(exposed)
    assert found.links["replica"] == pytest.approx(L * 4 * gather + 6 * 2 * V * D / 8 / 1e6)
    assert found.seconds > hidden.seconds
    # Held between layers, what has crossed is not sent again.
    held = cost.step(job, layout("hierarchical"), slow, ideal(links=1.0))
    assert held.phases["hierarchical", "backward"].hidden["replica"] == pytest.approx(2 * gather)


def test_the_last_layers_come_first_in_the_backward_pass():
    """Nothing hides their gather; replicated layers have none in that pass."""
    all_full, mixed, kept = (
        cost.step(tiny(), layout(layers=layers), MACHINE, ideal(products=1e-4))
        for layers in ((0, 0, L), (1, 0, L - 1), (L, 0, 0))
    )
    assert mixed.phases["replicated", "forward"] == mixed.phases["full", "forward"]
    assert mixed.parts["waits at the ends"] == all_full.parts["waits at the ends"]
    assert mixed.parts["waits at the ends"] > kept.parts["waits at the ends"]


def test_what_is_held_is_copied():
    """Read and written twice for each micro-batch."""
    slow = dataclasses.replace(WIDE, chip=dataclasses.replace(WIDE.chip, bandwidth=1e9))
    for count in (1, 4):
        for placement, share in zip(PLACEMENTS, (1, 1 / 4, 0), strict=True):
            one = layout(placement, micro_batches=count)
            found = cost.step(tiny(), one, slow, ideal(memory=0.5)).parts["held weights"]
            assert found == pytest.approx(4 * count * 2 * L * LAYER * share / 0.5e9)


def test_gathers_before_the_micro_batches_wait():
    once = cost.step(tiny(), layout("replicated", micro_batches=4), MACHINE, ideal())
    assert once.parts["waits once"] > 0 and once.parts["waits for layers"] == 0
    each = cost.step(tiny(), layout("full", micro_batches=4), MACHINE, ideal())
    assert each.parts["waits once"] == 0
    assert each.links["replica"] == pytest.approx(4 * (4 / 3) * once.links["replica"], rel=0.2)


def test_offload_waits_for_the_host():
    quick = dataclasses.replace(layout(), offload="input")
    assert cost.step(tiny(), quick, MACHINE, ideal(host=1e30)).parts["offload"] == 0
    assert cost.step(tiny(), quick, MACHINE, ideal(host=1e3)).parts["offload"] > 0


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_arrays_of_layouts_are_so_many_layouts(micro_batches):
    first, last = np.array([0, 1, 3, 0, 2]), np.array([3, 1, 0, 0, 1])
    many = layout(micro_batches=micro_batches, layers=(first, L - first - last, last))
    found = cost.step(tiny(), many, MACHINE, ideal())
    for place, (a, b) in enumerate(zip(first, last, strict=True)):
        one = layout(micro_batches=micro_batches, layers=(int(a), int(L - a - b), int(b)))
        alone = cost.step(tiny(), one, MACHINE, ideal())
        assert found.seconds[place] == pytest.approx(float(alone.seconds))
        assert found.links["fsdp"][place] == pytest.approx(float(alone.links["fsdp"]))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"speed": 1.0}, "'speed' is not assumed; there are products"),
        ({"products": 1.5}, "products=1.5 should be above 0, and at most 1"),
        ({"links": 0.0}, "links=0.0 should be above 0"),
        ({"logit_bytes": -1.0}, "logit_bytes=-1.0 should be positive"),
    ],
)
def test_assumptions_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        Assumptions.of(MACHINE.chip, **changes)


def test_every_chip_has_its_rate():
    for chip in topology.known():
        assert 0.5 < Assumptions.of(chip).products < 0.9
        assert chip.name in cost._PRODUCTS
    assert Assumptions.of(MACHINE.chip, links=0.9).links == 0.9
