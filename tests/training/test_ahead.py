"""Compiling for machines that are not there: real compilers where they are installed."""

import collections
import dataclasses
import math
import pathlib

import jax
import pytest

from baichuan_jax.config import Config, MeshConfig, ModelConfig
from baichuan_jax.parallel import topology
from baichuan_jax.parallel.flags import Choice, Flag
from baichuan_jax.parallel.layout import Job, Layout
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.parallel.program import Program
from baichuan_jax.parallel.traffic import traffic
from baichuan_jax.training import ahead
from configs import baichuan2_13b


def small(**training) -> Config:
    """A 13B with four layers of 256 × 640, a vocabulary of 1,024 and rows of 512 tokens."""
    config = Config(ModelConfig(1_024, 256, 640, 4, 4, position="alibi"))
    config.data.sequence_length, config.training.loss_chunk = 512, 128
    config.training.batch_size = 16
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


# Without a compiler.


def test_what_is_missing_is_named(monkeypatch):
    def absent(*_, platform="", **__):
        error = NotImplementedError if platform else RuntimeError
        raise error("topology not implemented for cuda" if platform else "TPU … not installed; …")

    monkeypatch.setattr(ahead.topologies, "get_topology_desc", absent)
    with pytest.raises(ValueError, match=r"v5e:2x2: .* libtpu.*pip install -e '\.\[aot\]'"):
        ahead.devices(topology.parse("v5e:2x2"))
    with pytest.raises(ValueError, match=r"h200:1x8: .*CUDA plugin.*pip install -e '\.\[cuda\]'"):
        ahead.devices(topology.parse("h200:1x8"))


def test_a_chip_without_a_target_is_refused():
    chip = dataclasses.replace(topology.parse("h200:1x8").chip, name="h900")
    with pytest.raises(ValueError, match=r"h900:1x8: .*not known here.*a100, a800, h100"):
        ahead.devices(topology.Topology(chip, (1, 8)))


@pytest.mark.parametrize(
    ("name", "libtpu", "options"),
    [
        ("v5p:8x8x16", "v5p:8x8x16", {}),
        ("v5p:8x8x8,slices=2", "v5p:8x8x8", {"num_slices": 2}),
        ("v7x:2x2x1", "tpu7x:2x2x1", {}),
        ("v6e:1x1", "v6e:1x1", {"chips_per_host_bounds": [1, 1, 1]}),
        (
            "v4:4x4x4",
            "v4:4x4x4",
            {
                "chip_config_name": "megacore",
                "chips_per_host_bounds": [2, 2, 1],
                "wrap": [True, True, True],
            },
        ),
    ],
)
def test_names_that_libtpu_knows(monkeypatch, name, libtpu, options):
    asked = []

    def answer(*names, **given):
        asked.append((*names, given))
        return jax.experimental.topologies.TopologyDescription([])

    monkeypatch.setattr(ahead.topologies, "get_topology_desc", answer)
    ahead.devices(topology.parse(name))
    assert asked == [(libtpu, "tpu", options)]


def test_what_a_tpu_compiler_needed_is_read_from_its_words():
    words = "total memory required for HLO temporaries (17.78G) exceeds available HBM (15.75G)."
    assert ahead._needed(f"RESOURCE_EXHAUSTED: {words}") == 17.78 * 2**30
    assert ahead._needed("… Used 900.5M of 15.75G hbm.") == 900.5 * 2**20
    assert ahead._needed("something else") != ahead._needed("something else")  # not a number


CHOICE = Choice((Flag("xla_hide", True, "hides"),), unknown=("xla_more",))


def stored(config: Config, mesh: tuple[int, int, int], text: str = "") -> ahead.Compiled:
    """The stored program of an NVIDIA GPU, or another, as if it were that of a config."""
    path = pathlib.Path(__file__).parents[1] / "parallel" / "programs" / "gpu.hlo"
    config.mesh = MeshConfig(*mesh)
    devices = make_mesh(config.mesh, jax.devices()[: math.prod(mesh)])
    text = text or path.read_text(encoding="utf-8")
    return ahead.Compiled(devices, 1.0, 2**40, 2**30, False, CHOICE, text)


def test_what_is_told_of_a_program():
    config, machine = small(), topology.parse("h100:1x8")
    compiled = stored(config, (1, 4, 2))
    lines = list(ahead.lines(config, machine, compiled))
    head, flag, missing, where, held, _, *table, overlap, logits, square = lines
    assert head == "h100:1x8, replica=1 × fsdp=4 × tensor=2: compiled in 1.0 s"
    assert [flag.strip(), missing.strip()] == CHOICE.lines()
    assert where.endswith("73.56 GiB: DOES NOT FIT")
    assert held.startswith("of it 1.00 GiB are weights")
    assert any("all-gather" in line and " 0.009 GB" in line for line in table)
    assert overlap.startswith("overlap with matrix products: 33.3%")
    assert logits == "buffers of full logits: none"
    assert "bf16[512,512]" in square  # T is 512, and D is 256
    (formula,) = [line for line in table if line.startswith("reduce-scatter     tensor")]
    assert formula.split()[-2:] == ["GB", "-"]  # nothing of it is in the program
    assert "nan" not in " ".join((*table, overlap))


def test_one_device_moves_nothing():
    config = small()
    lone = "HloModule m, num_partitions=1\n\nENTRY %main (x: f32[8]) -> f32[8] {\n"
    compiled = stored(config, (1, 1, 1), lone + "  ROOT %x = f32[8] parameter(0)\n}\n")
    *_, nothing, logits, square = ahead.lines(config, topology.parse("h100:1x1"), compiled)
    assert nothing == "collectives: none"
    assert logits.endswith("logits: none") and square.endswith("T × T: none")


def test_where_rows_look_like_weights_others_are_compiled(monkeypatch):
    """The stored program has matrices of 512 × 512."""
    config, machine = small(), topology.parse("h100:1x8")
    compiled, asked = stored(config, (1, 4, 2)), []

    def compile_step(other, _):
        asked.append(other.data.sequence_length)
        return compiled

    monkeypatch.setattr(ahead, "compile_step", compile_step)
    config.model.hidden_size = 1_024  # a half of it, over `tensor`, is T
    *_, once_more, logits, square = ahead.lines(config, machine, compiled)
    assert asked == [384] and once_more.endswith("compiles once more, with rows of 384")
    assert logits == "buffers of full logits: none" and square == "buffers of T × T: none"
    monkeypatch.setattr(ahead, "_apart", lambda *_: False)
    *_, square = ahead.lines(config, machine, compiled)
    assert "cannot be told" in square and "config.data.sequence_length" in square


# With libtpu or the CUDA plugin.


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu")


@pytest.fixture
def cuda():
    pytest.importorskip("jax_plugins.xla_cuda13")


def check_traffic(compiled: ahead.Compiled, config: Config, machine: topology.Topology) -> None:
    """Bytes are those of the formula, which leaves out norm gains and a token's sums.

    Later compilers gather embedding and head once for all micro-batches where they see it.
    """
    formula, found = collections.Counter(), collections.Counter()
    moved = traffic(Job.of(config), Layout.of(config, machine.num_devices))
    for (_, axis, kind), size in moved.items():
        formula[(axis,), kind] += size
    for one in Program(compiled.text).collectives:
        if max(shape.bytes for shape in one.shapes) > 4_096:
            found[one.axes(dict(compiled.mesh.shape)), one.kind] += one.total
    rest = sum(size for key, size in found.items() if key not in formula)
    assert rest < 0.005 * sum(found.values())
    if jax.__version_info__ >= (0, 11) and config.training.micro_batches > 1:
        assert all(0.9 < found[key] / size < 1.01 for key, size in formula.items())
    else:
        assert {key: found[key] for key in formula} == pytest.approx(formula, rel=0.01)


@pytest.mark.aot
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("replicated", "full", "micro_batches", "mesh", "remat"),
    [
        (4, 0, 1, (2, 4, 1), "full"),
        (4, 0, 2, (2, 4, 1), "full"),
        (0, 0, 2, (2, 4, 1), "full"),
        (0, 4, 2, (2, 4, 1), "full"),
        (2, 1, 1, (2, 4, 1), "full"),
        (0, 0, 2, (2, 2, 2), "full"),
        (0, 0, 2, (2, 2, 2), "matmuls"),
        (0, 0, 2, (2, 2, 2), "none"),
        (2, 1, 2, (2, 2, 2), "gate_up"),
    ],
)
def test_bytes_are_those_of_the_formula(replicated, full, micro_batches, mesh, remat):
    config, machine = small(micro_batches=micro_batches, remat=remat), topology.parse("h100:2x4")
    config.mesh = MeshConfig(*mesh)
    config.zero.replicated_layers, config.zero.full_layers = replicated, full
    compiled = ahead.compile_step(config, machine)
    assert compiled.fits and 0 < compiled.arguments < compiled.peak
    check_traffic(compiled, config, machine)


@pytest.mark.aot
@pytest.mark.usefixtures("cuda")
def test_what_does_not_fit_a_gpu_is_compiled_and_told():
    config, machine = baichuan2_13b.get_config(), topology.parse("h100:1x1")
    config.training.batch_size, config.training.micro_batches = 1, 1
    compiled = ahead.compile_step(config, machine)
    assert not compiled.fits and compiled.peak > compiled.arguments > 150 * 2**30
    assert "DOES NOT FIT" in "\n".join(ahead.lines(config, machine, compiled))


@pytest.mark.aot
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", ["a100:1x4", "a800:2x2", "h200:1x4", "b200:1x4"])
def test_every_gpu_has_a_target(name):
    compiled = ahead.compile_step(small(), topology.parse(name))
    assert compiled.fits and len(Program(compiled.text).collectives) > 4


@pytest.mark.aot
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1", "v5p:2x2x1,slices=2"]
)
def test_every_tpu_compiles(name):
    machine, config = topology.parse(name), small()
    config.mesh.replica = machine.slices
    compiled = ahead.compile_step(config, machine)
    assert compiled.fits and compiled.peak > compiled.arguments > 0
    kinds = {one.kind for one in Program(compiled.text).collectives}
    assert kinds & {"all-gather", "all-reduce"}
    assert any(line.startswith("collectives: ") for line in ahead.lines(config, machine, compiled))


@pytest.mark.aot
@pytest.mark.usefixtures("libtpu")
def test_what_does_not_fit_a_tpu_is_told_with_the_compilers_words():
    config, machine = baichuan2_13b.get_config(), topology.parse("v5e:4x4")
    config.training.batch_size, config.training.micro_batches = 16, 1
    compiled = ahead.compile_step(config, machine)
    assert not compiled.fits and compiled.text == ""
    assert compiled.peak > machine.chip.memory == 15.75 * 2**30
    *_, words = ahead.lines(config, machine, compiled)
    assert words.startswith("RESOURCE_EXHAUSTED")
