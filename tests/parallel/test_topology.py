"""Machines by name and by file: figures, rings of mesh axes, and what is not known."""

import json
import math

import pytest

from baichuan_jax.parallel import chips, topology
from baichuan_jax.parallel.topology import Ring, parse

GB = 1e9


@pytest.mark.parametrize(
    "name, devices, platform",
    [
        ("v5e:16x16", 256, "tpu"),
        ("v5e:1x1", 1, "tpu"),
        ("v5p:8x8x16", 1024, "tpu"),
        ("v5p:4x4x8", 128, "tpu"),
        ("v5p:8x8x8,slices=2", 1024, "tpu"),
        ("v6e:16x16", 256, "tpu"),
        ("v4:4x4x4", 64, "tpu"),
        ("v7x:4x4x4", 128, "tpu"),  # two devices a chip
        ("h200:1x8", 8, "gpu"),
        ("h100:128x8", 1024, "gpu"),
        ("a800:128x8", 1024, "gpu"),
        ("a100:2x4", 8, "gpu"),
        ("b200:1x1", 1, "gpu"),
    ],
)
def test_names(name, devices, platform):
    machine = parse(name)
    assert machine.num_devices == devices and machine.platform == platform
    assert machine.name == name and parse(machine.name) == machine
    assert machine.rings((1, 1, devices))["replica"] == ()


def rings(name: str, *mesh: int) -> dict[str, list[tuple[str, int, float]]]:
    found = parse(name).rings(mesh)
    return {
        axis: [(ring.kind, ring.size, ring.bandwidth / GB) for ring in levels]
        for axis, levels in found.items()
    }


def test_levels_of_gpus():
    assert rings("h100:128x8", 128, 8, 1) == {
        "replica": [("InfiniBand", 128, 50)],
        "fsdp": [("NVLink", 8, 450)],
        "tensor": [],
    }
    assert rings("a800:128x8", 128, 2, 4) == {
        "replica": [("InfiniBand", 128, 25)],
        "fsdp": [("NVLink", 2, 200)],
        "tensor": [("NVLink", 4, 200)],
    }
    # An axis that spans nodes has the inner level first.
    assert rings("h200:16x8", 4, 16, 2)["fsdp"] == [("NVLink", 4, 450), ("InfiniBand", 4, 50)]
    assert rings("h200:16x8", 32, 2, 2)["replica"] == [("NVLink", 2, 450), ("InfiniBand", 16, 50)]


def test_levels_of_tpus():
    # Whole axes of the torus that close to rings: two links each.
    assert rings("v5e:16x16", 1, 256, 1)["fsdp"] == [("ICI", 256, 4 * 45)]
    assert rings("v5e:16x16", 1, 16, 16)["tensor"] == [("ICI", 16, 2 * 45)]
    assert rings("v5p:8x8x16", 1, 1024, 1)["fsdp"] == [("ICI", 1024, 6 * 90)]
    assert rings("v5p:8x8x16", 1, 128, 8)["fsdp"] == [("ICI", 128, 4 * 90)]
    # 4 × 4 chips of a v5e do not close, nor does a v5p of less than 4 × 4 × 4.
    assert rings("v5e:4x4", 1, 4, 4)["fsdp"] == [("ICI", 4, 45)]
    assert rings("v5e:8x16", 1, 8, 16) == {
        "replica": [],
        "fsdp": [("ICI", 8, 45)],
        "tensor": [("ICI", 16, 2 * 45)],
    }
    assert rings("v5p:2x4x4", 1, 32, 1)["fsdp"] == [("ICI", 32, 3 * 90)]
    # Part of an axis, and what steps over it: 16 whole, and every fourth of the other 16.
    assert rings("v5e:16x16", 1, 64, 4) == {
        "replica": [],
        "fsdp": [("ICI", 64, 2 * 45 + 2 * 45 / 4)],
        "tensor": [("ICI", 4, 45)],
    }
    # Two devices share a chip's links, and have one of their own.
    assert rings("v7x:4x4x4", 1, 64, 2) == {
        "replica": [],
        "fsdp": [("ICI", 64, 6 * 90 / 2)],
        "tensor": [("die-to-die", 2, 540)],
    }
    assert rings("v7x:4x4x4", 1, 128, 1)["fsdp"] == [("die-to-die", 2, 540), ("ICI", 64, 270)]
    # Slices.
    assert rings("v5p:8x8x8,slices=2", 2, 64, 8)["replica"] == [("DCN", 2, 6.25)]
    assert rings("v5p:8x8x8,slices=2", 1, 128, 8)["fsdp"] == [("ICI", 64, 360), ("DCN", 2, 6.25)]


def test_a_torus_takes_fewer_steps_than_a_ring():
    (ring,) = parse("v5p:8x8x16").rings((1, 1024, 1))["fsdp"]
    assert ring.latency * (ring.size - 1) == pytest.approx((7 + 7 + 15) * 1e-6)
    (ring,) = parse("v5e:16x16").rings((1, 16, 16))["fsdp"]
    assert ring.latency == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "name, mesh, tokens",
    [
        ("v5p:8x8x8", (64, 8, 1), 2550),
        ("v5p:8x8x8", (1, 512, 1), 850),
        ("v5e:16x16", (16, 16, 1), 2190),
        ("v5e:16x16", (1, 256, 1), 1095),
        ("v6e:16x16", (16, 16, 1), 5100),
        ("v6e:16x16", (1, 256, 1), 2550),
        ("v4:4x4x4", (1, 64, 1), 1020),
        ("a800:128x8", (128, 8, 1), 1170 / 0.75),  # there for three quarters of the peak
    ],
)
def test_tokens_that_hide_a_gather(name, mesh, tokens):
    """FLOP/s over bytes/s: the gather of a layer hides behind so many tokens of a device."""
    machine = parse(name)
    (ring,) = machine.rings(mesh)["fsdp"]
    assert machine.chip.flops / ring.bandwidth == pytest.approx(tokens, rel=0.005)


def test_figures_are_sane_and_have_a_source():
    for chip in chips.known():
        assert "assumed" in chip.source and len(chip.source) > 40
        assert 10e9 < chip.memory < 200e9 and 1e14 < chip.flops < 3e15
        assert chip.across.bandwidth < chip.inside.bandwidth < chip.bandwidth
        assert chips.of_kind(chip.kinds[0]) is chip
    assert chips.of_kind("cpu") is None
    # An H100 of 80 GB has 79.1 GiB, of which JAX takes 93 %.
    assert parse("h100:1x8").chip.memory == pytest.approx(79.1 * 2**30 * 0.93)


def test_every_shape_that_is_offered_is_taken():
    for chip in chips.known():
        if chip.platform == "tpu":
            offered = chips.slice_shapes(chip)
            assert len(offered) == len(set(offered)) >= 8
            for shape in offered[:10]:
                machine = topology.Topology(chip, shape)
                assert parse(machine.name) == machine
                mesh = (1, machine.num_devices, 1)
                size = math.prod(ring.size for ring in machine.rings(mesh)["fsdp"])
                assert size == machine.num_devices
    assert (16, 16, 24) in chips.slice_shapes(parse("v5p:4x4x4").chip)


@pytest.mark.parametrize(
    "text, said",
    [
        ("h300:1x8", "no chip is called 'h300'. Did you mean h200 or h100"),
        ("tpu7x:4x4x4", "Did you mean v7x"),
        ("abacus:1x8", "no chip is called 'abacus'. Known are a100, h100, h200, b200, a800, v4"),
        ("h200", "should be CHIP:SHAPE"),
        ("H200:1x8", "should be CHIP:SHAPE"),
        ("h200:1x8,slice=2", "should be CHIP:SHAPE"),
        ("h200:8", "should be CHIP:SHAPE"),
        ("v5e:16x17", "v5e has no slice 16x17; the nearest are v5e:16x16"),
        ("v5e:4x4x4", "v5e has no slice 4x4x4; the nearest are v5e:8x8"),
        ("v5e:0x4", "v5e has no slice 0x4"),
        ("v5p:8x8x15", "v5p has no slice 8x8x15; the nearest are v5p:8x8x16"),
        ("v5p:16x8x8", "the nearest are v5p:8x8x16"),
        ("v5p:16x16x28", "up to 6,144 chips"),
        ("v4:4x4", "v4 has no slice 4x4; the nearest are v4:2x2x4"),
        ("v5p:16x16", "v5p has no slice 16x16; the nearest are v5p:4x4x16, v5p:4x8x8"),
        ("v5p:4x4x4,slices=0", "slices=0 should be 1 or more"),
        ("h200:2x16", "nodes × GPUs of a node, 8 at most, such as h200:4x8"),
        ("h200:0x8", "such as h200:1x8"),
        ("h200:1x2x4", "such as h200:1x8"),
        ("h200:1x8,slices=2", "GPUs have no slices"),
    ],
)
def test_what_is_not_known(text, said):
    with pytest.raises(ValueError) as refusal:
        parse(text)
    assert said in str(refusal.value) and f"topology {text!r}" in str(refusal.value)


@pytest.mark.parametrize(
    "name, mesh, said",
    [
        ("h200:2x8", (3, 8, 1), "has 24 devices, h200:2x8 has 16; the nearest that fit: replica=2"),
        ("h200:3x8", (2, 12, 1), "cuts nodes or slices of 8 devices in pieces; the nearest"),
        ("v5p:4x4x4,slices=3", (4, 48, 1), "of 64 devices in pieces; the nearest that fit: repl"),
    ],
)
def test_meshes_that_do_not_fit(name, mesh, said):
    machine = parse(name)
    with pytest.raises(ValueError) as refusal:
        machine.rings(mesh)
    assert said in str(refusal.value)
    named = str(refusal.value).split("nearest that fit: ")[1].rstrip(".").split("; ")
    assert len(named) == 4
    for shape in named:  # do fit
        machine.rings(tuple(int(part.split("=")[1]) for part in shape.split(" × ")))


def test_listing():
    shown = "\n".join(topology.listing())
    for chip in chips.known():
        assert f"\n{chip.name:6}" in shown and chip.source in shown
    assert "\nv5p      95.74    459.0   2,765   ICI 90 × links  DCN 6.25 " in shown
    assert "16x16" in shown and "CHIP:SHAPE,slices=N" in shown
    assert "file MACHINE.json. Only `chip` and `shape`\nmust be there" in shown
    assert shown.endswith('"microseconds": 10}}')


def write(folder, **fields) -> str:
    path = folder / "machine.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return str(path)


LINK = {"kind": "RoCE", "gb_per_s": 12.5, "microseconds": 20}


def test_a_file_with_what_differs(tmp_path):
    machine = parse(write(tmp_path, chip="a800", shape=[64, 8], across=LINK, source="our racks"))
    known = parse("a800:64x8")
    assert machine.name == known.name and machine.chip.flops == known.chip.flops
    assert machine.chip.source == "our racks"
    found = machine.rings((64, 8, 1))
    (ring,) = found["replica"]
    assert ring == Ring(64, pytest.approx(12.5e9), pytest.approx(20e-6), "RoCE")
    assert found["fsdp"] == known.rings((64, 8, 1))["fsdp"]


def test_a_file_of_another_chip(tmp_path):
    nvlink = {"kind": "NVSwitch", "gb_per_s": 900, "microseconds": 1}
    path = write(
        tmp_path,
        **{"chip": "gb200", "shape": [2, 72], "memory_gib": 170.5, "teraflops": 2500},
        **{"memory_gb_per_s": 8000, "inside": nvlink, "across": LINK},
    )
    machine = parse(path)
    assert machine.num_devices == 144 and machine.platform == "gpu"
    assert machine.chip.memory == 170.5 * 2**30 and machine.chip.flops == 2500e12
    assert machine.rings((2, 72, 1))["fsdp"] == (Ring(72, 900e9, 1e-6, "NVSwitch"),)
    assert path in machine.chip.source


def test_the_example_in_the_docstring(tmp_path):
    example = "{" + topology.__doc__.split("    {", 1)[1]
    machine = parse(write(tmp_path, **json.loads(example)))
    assert machine.name == "a800:64x8" and machine.chip.across.bandwidth == 12.5e9


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "chip is None and should be a name"),
        ({"chip": "A800", "shape": [1, 8]}, "chip is 'A800' and should be a name in small letters"),
        ({"chip": "a800"}, "shape is None and should be positive integers, as [64, 8]"),
        ({"chip": "a800", "shape": [8, 0]}, "shape is [8, 0]"),
        ({"chip": "a800", "shape": [2, 2, 2]}, "the shape of GPUs is nodes × GPUs"),
        ({"chip": "v5e", "shape": [3, 3]}, "v5e has no slice 3x3"),
        ({"chip": "a800", "shape": [1, 8], "slices": 1.5}, "slices is 1.5"),
        ({"chip": "a800", "shape": [1, 8], "acros": LINK}, "'acros'; did you mean 'across'?"),
        ({"chip": "a800", "shape": [1, 8], "colour": 1}, "'colour'; there are chip, shape"),
        ({"chip": "a800", "shape": [1, 8], "teraflops": "312"}, "teraflops is '312'"),
        ({"chip": "a800", "shape": [1, 8], "teraflops": float("nan")}, "teraflops is nan"),
        ({"chip": "a800", "shape": [1, 8], "memory_gib": 0}, "memory_gib is 0"),
        ({"chip": "a800", "shape": [1, 8], "memory_gib": True}, "memory_gib is True"),
        ({"chip": "a800", "shape": [1, 8], "across": 25}, "across is 25 and should have kind"),
        ({"chip": "a800", "shape": [1, 8], "across": {"kind": "IB"}}, "should have kind, gb_per_s"),
        (
            {"chip": "a800", "shape": [1, 8], "across": LINK | {"gb_per_s": -1}},
            "across.gb_per_s is -1",
        ),
        ({"chip": "a800", "shape": [1, 8], "across": LINK | {"kin": 1}}, "'kin'; did you mean"),
        ({"chip": "gb200", "shape": [1, 8]}, "memory_gib is missing: 'gb200' is no chip"),
    ],
)
def test_files_that_are_wrong(tmp_path, fields, said):
    path = write(tmp_path, **fields)
    with pytest.raises(ValueError) as refusal:
        parse(path)
    assert said in str(refusal.value) and str(refusal.value).startswith(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '"v5e:4x4"', "[" * 100_000])
def test_files_that_are_no_objects(tmp_path, text):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"machine\.json.*(JSON)"):
        parse(str(path))


def test_a_file_that_is_not_there():
    with pytest.raises(
        FileNotFoundError, match=r"topology nowhere/machine\.json: there is no such"
    ):
        parse("nowhere/machine.json")
