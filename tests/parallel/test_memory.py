"""Memory by hand, and beside what the compilers say."""

import dataclasses

import numpy as np
import pytest

from baichuan_jax.config import PLACEMENTS
from baichuan_jax.parallel import topology
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.parallel.layout import Job, Layout
from baichuan_jax.parallel.memory import MOMENTS, memory
from configs import baichuan2_7b, baichuan2_13b

CHIPS = {"gpu": topology.parse("h200:1x8").chip, "tpu": topology.parse("v5e:16x16").chip}
RECIPES = {"7B": baichuan2_7b, "13B": baichuan2_13b}

# GiB of a device at the peak, by `training.ahead.compile_step` on 24 November 2026 (jax 0.10.2,
# libtpu 0.0.42). Model, machine, mesh, rows of a micro-batch on a device, micro-batches, remat,
# layers by placement, placement of embedding and head. The last are what the plan chooses; the TPU
# rows before them are of programs whose attention still went through blocks.
R, H, Z = "replicated", "hierarchical", "full"
COMPILED = [
    ("7B", "v5e:16x16", (1, 256, 1), 1, 4, "attention", (1, 0, 31), R, Z, 13.69),
    ("13B", "v5e:16x16", (1, 256, 1), 1, 4, "attention", (0, 0, 40), Z, Z, 13.72),
    ("13B", "v5e:16x16", (1, 256, 1), 1, 4, "full", (0, 0, 40), Z, Z, 8.37),
    ("13B", "v5e:16x16", (1, 64, 4), 16, 1, "full", (0, 0, 40), Z, Z, 12.83),
    ("7B", "v5p:4x4x8", (1, 64, 2), 4, 4, "attention", (0, 0, 32), Z, Z, 13.81),
    ("13B", "v5p:8x8x16", (1, 128, 8), 8, 1, "matmuls", (0, 0, 40), Z, Z, 19.53),
    ("7B", "v6e:16x16", (1, 256, 1), 4, 1, "attention", (0, 0, 32), Z, Z, 25.38),
    ("7B", "v6e:16x16", (1, 256, 1), 2, 2, "matmuls", (1, 0, 31), Z, Z, 28.51),
    ("13B", "v6e:16x16", (1, 256, 1), 1, 4, "matmuls", (1, 0, 39), R, Z, 29.09),
    ("13B", "v6e:16x16", (1, 256, 1), 2, 2, "full", (0, 0, 40), Z, Z, 9.14),
    ("7B", "v5p:4x4x8", (1, 128, 1), 2, 4, "matmuls", (0, 0, 32), Z, Z, 27.81),
    ("7B", "v5p:4x4x8", (1, 128, 1), 2, 4, "none", (5, 0, 27), R, Z, 75.94),
    ("13B", "v5p:4x4x8", (1, 128, 1), 8, 1, "full", (0, 0, 40), Z, Z, 23.04),
    ("7B", "v5p:8x8x16", (1, 1024, 1), 1, 1, "matmuls", (32, 0, 0), Z, Z, 27.47),
    ("13B", "v5p:8x8x16", (1, 1024, 1), 1, 1, "matmuls", (40, 0, 0), Z, Z, 46.08),
    ("13B", "v5p:8x8x16", (1, 1024, 1), 1, 1, "none", (40, 0, 0), Z, Z, 76.87),
    ("13B", "v5p:8x8x8,slices=2", (2, 512, 1), 1, 1, "matmuls", (0, 40, 0), Z, Z, 24.08),
    ("7B", "v5p:8x8x8,slices=2", (2, 512, 1), 1, 1, "none", (32, 0, 0), Z, Z, 47.38),
    ("7B", "h200:1x8", (1, 8, 1), 1, 1, "full", (0, 0, 32), Z, Z, 22.33),
    ("7B", "h200:1x8", (1, 8, 1), 2, 8, "matmuls", (0, 0, 32), Z, Z, 73.97),
    ("13B", "h200:1x8", (1, 8, 1), 1, 1, "full", (0, 0, 40), Z, Z, 38.36),
    ("13B", "h200:1x8", (1, 8, 1), 4, 1, "full", (0, 0, 40), Z, Z, 45.45),
    ("13B", "h200:1x8", (1, 8, 1), 1, 4, "full", (0, 40, 0), H, H, 52.55),
    ("13B", "h200:1x8", (1, 8, 1), 1, 128, "matmuls", (14, 26, 0), R, R, 109.33),
    ("7B", "h200:1x8", (1, 8, 1), 2, 64, "matmuls", (0, 32, 0), R, R, 80.25),
    ("13B", "h200:1x8", (1, 8, 1), 1, 128, "matmuls", (0, 0, 40), R, R, 96.05),
    ("13B", "h200:1x8", (1, 4, 2), 2, 1, "full", (0, 0, 40), Z, Z, 31.46),
    ("13B", "h200:1x8", (1, 4, 2), 2, 4, "matmuls", (0, 40, 0), H, H, 54.20),
    ("7B", "h200:1x8", (1, 2, 4), 4, 1, "full", (0, 0, 32), Z, Z, 17.48),
    ("7B", "h200:1x8", (1, 1, 8), 1, 1, "full", (32, 0, 0), R, R, 15.88),
    ("7B", "h200:1x2", (1, 1, 2), 1, 2, "full", (0, 0, 32), Z, Z, 72.03),
    ("7B", "h100:128x8", (64, 16, 1), 1, 1, "none", (32, 0, 0), Z, Z, 50.69),
    ("7B", "h100:128x8", (128, 8, 1), 1, 1, "matmuls", (32, 0, 0), Z, Z, 32.90),
    ("7B", "h100:128x8", (64, 16, 1), 1, 1, "matmuls", (0, 32, 0), Z, Z, 17.72),
    ("13B", "h100:128x8", (128, 8, 1), 1, 1, "matmuls", (0, 40, 0), Z, Z, 27.43),
    ("13B", "h100:128x8", (128, 8, 1), 1, 1, "full", (40, 0, 0), Z, Z, 36.38),
    ("13B", "h100:128x8", (128, 8, 1), 1, 1, "full", (20, 0, 20), Z, Z, 23.15),
    ("13B", "h100:128x8", (128, 8, 1), 1, 1, "matmuls", (40, 0, 0), Z, Z, 55.84),
    ("13B", "h100:128x8", (128, 8, 1), 1, 1, "none", (16, 24, 0), Z, Z, 68.82),
    ("13B", "h100:128x8", (128, 8, 1), 1, 2, "full", (40, 0, 0), R, R, 106.60),
    ("13B", "h100:128x8", (128, 4, 2), 2, 1, "full", (0, 0, 40), Z, Z, 4.62),
    ("13B", "h100:128x8", (128, 4, 2), 2, 1, "matmuls", (40, 0, 0), Z, Z, 34.31),
    ("13B", "h100:128x8", (128, 1, 8), 8, 1, "matmuls", (40, 0, 0), Z, Z, 23.58),
    ("7B", "v5e:16x16", (1, 256, 1), 1, 4, "attention", (0, 0, 32), R, Z, 12.32),
    ("7B", "v6e:16x16", (1, 256, 1), 2, 2, "matmuls", (0, 0, 32), Z, Z, 27.32),
    ("13B", "v6e:16x16", (1, 256, 1), 1, 4, "matmuls", (0, 0, 40), R, Z, 27.22),
    ("7B", "v5p:4x4x8", (1, 128, 1), 4, 2, "matmuls", (0, 32, 0), R, R, 57.51),
    ("13B", "v5p:4x4x8", (1, 128, 1), 4, 2, "matmuls", (0, 40, 0), R, R, 86.66),
    ("7B", "v5p:8x8x16", (1, 1024, 1), 1, 1, "matmuls", (0, 0, 32), Z, Z, 15.42),
    ("13B", "v5p:8x8x16", (1, 1024, 1), 1, 1, "matmuls", (0, 0, 40), Z, Z, 22.80),
    ("7B", "v5p:8x8x8,slices=2", (2, 512, 1), 1, 1, "matmuls", (0, 32, 0), Z, Z, 16.08),
    ("13B", "v5p:8x8x8,slices=2", (2, 512, 1), 1, 1, "matmuls", (0, 40, 0), Z, Z, 24.06),
    ("7B", "h200:1x8", (1, 8, 1), 4, 32, "matmuls", (0, 32, 0), Z, Z, 116.00),
    ("13B", "h200:1x8", (1, 8, 1), 2, 64, "matmuls", (0, 40, 0), Z, Z, 112.06),
    ("7B", "h100:128x8", (64, 16, 1), 1, 1, "matmuls", (0, 32, 0), Z, Z, 17.66),
    ("13B", "h100:128x8", (64, 16, 1), 1, 1, "matmuls", (0, 40, 0), Z, Z, 25.81),
]


def job(model: str, rows: int, layout: Layout) -> Job:
    """A job with so many rows of a micro-batch on each device."""
    made = Job.of(RECIPES[model].get_config())
    replica, fsdp, _ = layout.mesh
    return dataclasses.replace(made, rows=rows * replica * fsdp * layout.micro_batches)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: str(case).replace(" ", ""))
def test_within_a_tenth_of_the_compilers(case):
    model, machine, mesh, rows, count, remat, layers, embedding, head, want = case
    layout = Layout(mesh, count, remat, "", embedding, layers, head)
    chip = topology.parse(machine).chip
    found = float(memory(job(model, rows, layout), layout, chip).peak) / GIB
    assert found == pytest.approx(want, rel=0.1)


def test_the_state_is_twelve_bytes_a_parameter_over_all_devices():
    layout = Layout((128, 8, 1), 1, "full", "", "full", (0, 0, 40), "full")
    for kinds in memory(job("13B", 1, layout), layout, CHIPS["gpu"]).moments.values():
        state = kinds["weights"] + kinds["optimizer"]
        assert state == 12 * ((13_896_668_160 - 414_720) / 1_024 + 414_720)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_placements_hold(platform):
    """Two bytes of each parameter in the compute dtype, whole or divided over fsdp."""
    layer = 4 * 5_120**2 + 3 * 5_120 * 13_696
    for placement, share in zip(PLACEMENTS, (1, 1 / 8, 0), strict=True):
        layers = tuple(40 * (name == placement) for name in PLACEMENTS)
        layout = Layout((4, 8, 1), 1, "full", "", "full", layers, "full")
        found = memory(job("13B", 1, layout), layout, CHIPS[platform]).moments["backward"]
        assert found["held"] == 2 * 40 * layer * share
        many = dataclasses.replace(layout, micro_batches=2)
        sums = memory(job("13B", 1, many), many, CHIPS[platform]).moments["loss"]
        ends = 4 * 2 * 125_696 * 5_120 / 32
        stored = 4 * 40 * layer / 32 if placement == "full" else 0
        assert sums["gradients"] == 4 * 40 * layer * share + stored + ends


def test_activations_by_hand():
    """Numbers of a layer and token, in bfloat16; offloaded ones are in the host's memory."""
    layout = Layout((1, 8, 1), 1, "full", "", "full", (0, 0, 32), "full")
    tokens, D, F = 2 * 4_096, 4_096, 11_008
    for remat, numbers in (("full", D), ("attention", 5 * D), ("matmuls", 6 * D + 2 * F)):
        one = dataclasses.replace(layout, remat=remat)
        found = memory(job("7B", 2, one), one, CHIPS["tpu"]).moments["loss"]
        assert found["activations"] == 2 * 32 * tokens * numbers
    offloaded = dataclasses.replace(layout, offload="input")
    found = memory(job("7B", 2, offloaded), offloaded, CHIPS["tpu"])
    assert found.moments["loss"]["activations"] == 0 and found.host == 2 * 32 * tokens * D
    halves = dataclasses.replace(layout, mesh=(1, 4, 2))
    found = memory(job("7B", 2, halves), halves, CHIPS["tpu"]).moments["loss"]
    assert found["activations"] == 2 * 32 * tokens * D / 2


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("count", [1, 4])
def test_arrays_of_layouts_are_so_many_layouts(count, platform):
    first, last = np.array([0, 5, 40, 0, 9]), np.array([40, 5, 0, 0, 31])
    many = Layout((4, 8, 1), count, "matmuls", "", "full", (first, 40 - first - last, last), "full")
    found = memory(job("13B", 1, many), many, CHIPS[platform])
    for place in range(len(first)):
        one = many.take(place)
        alone = memory(job("13B", 1, one), one, CHIPS[platform])
        assert found.peak[place] == pytest.approx(float(alone.peak))
        assert alone.worst in MOMENTS
        assert sum(alone.moments[alone.worst].values()) == pytest.approx(float(alone.peak))
