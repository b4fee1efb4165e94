"""The planner beside a search by hand, an earlier prototype's table, and what a user asks for."""

import dataclasses
import importlib.util
import itertools
import re

import numpy as np
import pytest

from baichuan_jax.config import PLACEMENTS, Config, validate
from baichuan_jax.parallel import cost, plan, scaling, topology
from baichuan_jax.parallel.chips import GIB, Link
from baichuan_jax.parallel.layout import FIELDS, Job, Layout, sizes
from baichuan_jax.parallel.layouts import POLICIES
from baichuan_jax.parallel.memory import memory
from baichuan_jax.parallel.plan import DoesNotFit, evaluate, search
from baichuan_jax.parallel.plan_plot import draw, draw_compared, draw_scaling
from baichuan_jax.parallel.plan_table import lines
from baichuan_jax.parallel.recipe import write
from configs import baichuan2_7b, baichuan2_13b


def toy(layers: int, rows: int = 8) -> Job:
    config = Config()
    config.model.hidden_size, config.model.intermediate_size = 512, 1_024
    config.model.num_layers, config.model.num_heads, config.model.vocab_size = layers, 4, 2_048
    config.data.sequence_length, config.training.batch_size = 256, rows
    return Job.of(config)


def machine(rng: np.random.Generator, job: Job) -> topology.Topology:
    """Two nodes of two GPUs whose memory is scarce, with any links."""
    layout = Layout((2, 2, 1), 1, "full", "", "full", (0, 0, job.shape.num_layers), "full")
    base = topology.parse("h100:2x2")
    least = float(memory(job, layout, base.chip).peak)
    chip = dataclasses.replace(
        base.chip,
        memory=least * rng.uniform(0.8, 3),
        inside=Link("NVLink", 10 ** rng.uniform(9, 12), 10 ** rng.uniform(-7, -5)),
        across=Link("InfiniBand", 10 ** rng.uniform(8, 11), 10 ** rng.uniform(-7, -4)),
    )
    return dataclasses.replace(base, chip=chip)


def every_layout(job: Job):
    """All that can be run on two nodes of two, each layer placed for itself."""
    placed = list(itertools.product(PLACEMENTS, repeat=job.shape.num_layers))
    meshes = [(2, 2, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
    for mesh, count, (remat, offload) in itertools.product(meshes, (1, 2, 4), POLICIES):
        if job.rows % (mesh[0] * mesh[1] * count):
            continue
        seen = set()
        for each in placed:
            layers = tuple(each.count(placement) for placement in PLACEMENTS)
            if layers in seen:  # its layers in another order, which do the same
                continue
            seen.add(layers)
            ends = PLACEMENTS if count > 1 else ["full"]
            for embedding, head in itertools.product(ends, ends):
                yield Layout(mesh, count, remat, offload, embedding, layers, head)


@pytest.mark.parametrize("seed", range(5))
def test_equals_exhaustive_search(seed):
    """The rule in the module's docstring, applied to every layout one by one."""
    rng = np.random.default_rng(seed)
    job = toy(layers=2, rows=4)
    there = machine(rng, job)
    assumptions = cost.Assumptions.of(there.chip)
    fitting = []
    for layout in every_layout(job):
        bytes_ = float(memory(job, layout, there.chip).peak)
        if bytes_ <= there.chip.memory * assumptions.margin:
            step = cost.step(job, layout, there, assumptions)
            fitting.append((layout, float(step.seconds), float(sum(step.links.values())), bytes_))
    if not fitting:
        with pytest.raises(DoesNotFit):
            search(job, there, assumptions)
        return
    found = search(job, there, assumptions)
    chosen = (float(found.step.seconds), float(sum(found.step.links.values())))
    fastest = min(seconds for _, seconds, _, _ in fitting)
    assert fastest <= chosen[0] <= fastest * 1.02 * 1.005
    on_mesh = {}
    for layout, seconds, _, _ in fitting:
        on_mesh[layout.mesh] = min(seconds, on_mesh.get(layout.mesh, np.inf))
    meshes = [mesh for mesh, seconds in on_mesh.items() if seconds <= 1.02 * fastest]
    nearest = min(abs(np.log2(mesh[0] / 2)) for mesh in meshes)
    assert abs(np.log2(found.layout.mesh[0] / 2)) == nearest
    same = [row for row in fitting if row[0].mesh == found.layout.mesh]
    same = [row for row in same if row[1] <= 1.005 * on_mesh[found.layout.mesh]]
    assert bool(found.layout.offload) == all(row[0].offload for row in same)
    same = [row for row in same if bool(row[0].offload) == bool(found.layout.offload)]
    groups = min(np.count_nonzero(row[0].layers) for row in same)
    assert np.count_nonzero(found.layout.layers) == groups
    same = [row for row in same if np.count_nonzero(row[0].layers) == groups]
    sending = min(row[2] for row in same)
    assert chosen[1] == pytest.approx(sending, abs=1e-6)
    equal = [row for row in same if row[2] <= sending + 1e-6]
    assert float(found.memory.peak) <= min(row[3] for row in equal) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_all_there_is_on_eight_layers(seed):
    """With the frame given: the best of all 3^8 placements, by seconds alone."""
    rng = np.random.default_rng(seed)
    job = toy(layers=8)
    there = machine(rng, job)
    chip = dataclasses.replace(there.chip, memory=1.5 * there.chip.memory)
    there = dataclasses.replace(there, chip=chip)
    assumptions = cost.Assumptions.of(there.chip)
    fixed = {
        **dict(zip(FIELDS[:3], (2, 2, 1), strict=True)),
        **{"training.micro_batches": 2, "training.remat": "full", "training.offload": ""},
        **{"zero.embedding": "full", "zero.head": "full"},
    }
    found = search(job, there, assumptions, fixed)
    best = np.inf
    for counts in itertools.product(range(9), repeat=2):
        if sum(counts) <= 8:
            layers = (counts[0], 8 - sum(counts), counts[1])
            layout = dataclasses.replace(found.layout, layers=layers)
            one = evaluate(job, layout, there, assumptions)
            best = min(best, float(one.step.seconds)) if one.fits else best
    assert found.fits and best <= float(found.step.seconds) <= 1.005 * best


# --- An earlier prototype's plans for 1,024 A800, by its assumptions. ---
#
# It held the gradients of replicated layers whole, at (2 + g) bytes a parameter, and two gathered
# layers, the float32 gradient of the head, 2.19 GiB for a chunk of logits and 4 GB for the runtime;
# activations were the results of all matrix products. One of the ends and then layers were
# converted until 76 GB were enough. FLOPs took 60 % of the peak, links 140 and 22.5 GB/s.


def prototype_machine(across: float) -> topology.Topology:
    base = topology.parse("a800:128x8")
    chip = dataclasses.replace(
        base.chip,
        memory=76e9,
        bandwidth=1e30,
        inside=Link("NVLink", 140e9, 0),
        across=Link("InfiniBand", across, 2e-4 / 14 / 4),  # for each of a layer's matrices
    )
    return dataclasses.replace(base, chip=chip)


PROTOTYPE = cost.Assumptions(
    products=0.6, attention=0.6, logit_bytes=0, loss_bytes=0, memory=1, links=1, margin=1
)


def prototype_bytes(job: Job, over: int, converted: int, tensor: int = 1) -> float:
    """Of a device where one of the ends and so many other layers are divided over `over`."""
    size, layers = sizes(job.model, (1_024 // tensor, 1, tensor)), job.shape.num_layers
    layer = sum(matrix.whole for matrix in size.layer.values())
    whole = 2 * size.head.whole + layers * layer
    divided = size.head.whole + (converted - 1) * layer if converted else 0
    D, F = job.shape.hidden_size, job.shape.intermediate_size
    activations = 2 * (5 * D + 2 * F) * layers * job.time / tensor
    working = 4 * layer + 4 * size.head.whole + 2.19 * GIB + 4e9
    held = (2 + job.gradient) * (whole - divided + divided / over)
    return held + 12 * whole * tensor / 1_024 + activations + working


def prototype_step(job: Job, mesh, layers, across: float = 22.5e9) -> cost.Step:
    layout = Layout(mesh, 1, "none", "", "full", layers, "full")
    return cost.step(job, layout, prototype_machine(across), PROTOTYPE)


def a800(recipe, gradient: int, rows: int = 1_024) -> Job:
    return dataclasses.replace(Job.of(recipe.get_config()), gradient=gradient, rows=rows)


def test_prototype_7b_is_all_replicated():
    job = a800(baichuan2_7b, 4)
    assert prototype_bytes(job, 1, 0) == pytest.approx(65.5e9, rel=0.005)
    step = prototype_step(job, (1, 1_024, 1), (32, 0, 0))
    assert step.links["fsdp"] == pytest.approx(0.295, rel=0.02)
    assert step.parts["layers"] + step.parts["loss"] == pytest.approx(0.99, rel=0.02)
    assert float(step.parts["waits for layers"]) == 0


@pytest.mark.parametrize(
    "gradient, over, mesh, across, converted, gigabytes, seconds",
    [
        (2, 1_024, (1, 1_024, 1), 22.5e9, 5, 75.7, None),
        (4, 1_024, (1, 1_024, 1), 22.5e9, 18, 75.1, 0.62),
        (4, 16, (64, 16, 1), 11.25e9, 19, None, 1.08),  # half the adapters: hierarchical
    ],
)
def test_prototype_13b(gradient, over, mesh, across, converted, gigabytes, seconds):
    job = a800(baichuan2_13b, gradient)
    enough = [count for count in range(42) if prototype_bytes(job, over, count) <= 76e9]
    assert enough[0] == converted
    if gigabytes:
        assert prototype_bytes(job, over, converted) == pytest.approx(gigabytes * 1e9, rel=0.005)
    if seconds:
        left = 40 - (converted - 1)
        divided = (0, converted - 1, 0) if over == 16 else (0, 0, converted - 1)
        step = prototype_step(job, mesh, (left, *divided[1:]), across)
        assert sum(step.links.values()) == pytest.approx(seconds, rel=0.02)
        assert step.parts["layers"] + step.parts["loss"] == pytest.approx(1.85, rel=0.02)


def test_prototype_tensor_parallel():
    """TP 2 fits as it is; with TP 8 the gradients take longer than the compute."""
    job = a800(baichuan2_13b, 2)
    assert prototype_bytes(job, 1, 0, tensor=2) == pytest.approx(44.7e9, rel=0.01)
    for gradient, seconds in ((2, 0.32), (4, 0.47)):
        job = a800(baichuan2_13b, gradient, rows=128)
        step = prototype_step(job, (128, 1, 8), (40, 0, 0))
        assert step.links["replica"] == pytest.approx(seconds, rel=0.03)
        assert step.parts["layers"] + step.parts["loss"] == pytest.approx(0.23, rel=0.02)


# --- What a user asks for. ---


def test_fixed_settings_are_kept():
    config, there = baichuan2_13b.get_config(), topology.parse("h100:16x8")
    fixed = ["mesh.tensor=2", "training.remat=full", "zero.full_layers=7", "zero.head=replicated"]
    layout = plan.plan(config, there, fixed=fixed).layout
    assert layout.mesh[2] == 2 and layout.remat == "full" and layout.offload == ""
    assert layout.layers[2] == 7 and layout.head == "replicated"
    free = plan.plan(config, there)
    assert free.step.seconds <= plan.plan(config, there, fixed=fixed).step.seconds


def test_as_is_takes_the_configs_own():
    config, there = baichuan2_7b.get_config(), topology.parse("h200:1x8")
    config.zero.replicated_layers, config.training.remat = 3, "attention"
    found = plan.plan(config, there, as_is=True)
    assert found.layout.layers == (3, 29, 0) and found.layout.micro_batches == 64
    assert found.layout.mesh == (1, 8, 1) and found.looked_at == 0
    best = plan.plan(config, there)
    assert best.step.seconds < found.step.seconds and best.looked_at > 1_000


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"fixed": ["mesh.pipeline=2"]}, "'mesh.pipeline' is not planned; there are mesh.replica"),
        ({"fixed": ["mesh.tensor"]}, "'mesh.tensor' should be NAME=VALUE"),
        ({"fixed": ["mesh.tensor=two"]}, "mesh.tensor=two should be a whole number"),
        ({"fixed": ["training.micro_batches=2.5"]}, "micro_batches=2.5 should be a whole number"),
        ({"fixed": ["training.micro_batches=inf"]}, "micro_batches=inf should be a whole number"),
        ({"fixed": ["training.micro_batches=0"]}, "micro_batches=0 must be positive"),
        ({"fixed": ["training.remat=foo"]}, r"remat='foo' must be one of \('none', 'full'"),
        ({"fixed": ["training.offload=qkv", "training.remat=full"]}, "offload='qkv' must be some"),
        ({"fixed": ["zero.head=foo"]}, r"zero.head='foo' must be one of \('replicated'"),
        ({"fixed": ["zero.replicated_layers=99"]}, "between 0 and config.model.num_layers=32"),
        (
            {"fixed": ["zero.replicated_layers=30", "zero.full_layers=20"]},
            "replicated_layers=30 .*full_layers=20 must lie between 0 and .*num_layers=32",
        ),
        ({"fixed": ["mesh.tensor=3"]}, "tensor=3 goes with no mesh of h100:1x8; .* are 1, 2, 4, 8"),
        ({"fixed": ["mesh.replica=0"]}, "replica=0 goes with no mesh of h100:1x8; .* 1, 2, 4, 8"),
        (
            {"fixed": ["mesh.fsdp=8", "mesh.tensor=4"]},
            "fsdp=8 goes with no mesh of h100:1x8 with mesh.tensor=4; the nearest that do are 1, 2",
        ),
        (
            {"fixed": ["mesh.replica=3", "mesh.fsdp=5", "mesh.tensor=7"]},
            "mesh.replica=3, mesh.fsdp=5, mesh.tensor=7: no mesh of h100:1x8 has two of them",
        ),
        ({"fixed": ["mesh.tensor=2"], "as_is": True}, "--as_is takes the config's layout: leave"),
        ({"assumed": ["speed=1"]}, "'speed' is not assumed"),
        ({"assumed": ["links=fast"]}, "links=fast should be a number"),
    ],
)
def test_refuses(changes, said):
    with pytest.raises(ValueError, match=said):
        plan.plan(baichuan2_7b.get_config(), topology.parse("h100:1x8"), **changes)


@pytest.mark.parametrize("as_is", [False, True])
def test_refuses_a_config_that_cannot_run(as_is):
    config = baichuan2_7b.get_config()
    config.training.compute_dtype = "float16"
    with pytest.raises(ValueError, match="compute_dtype='float16' must be 'bfloat16' or"):
        plan.plan(config, topology.parse("h100:1x8"), as_is=as_is)


def test_as_is_refuses_what_cannot_run():
    config, there = baichuan2_13b.get_config(), topology.parse("h100:128x8")
    said = r"batch_size=1024 must be a multiple of .*=64 × replica=1 × .* nearest that fit: "
    with pytest.raises(ValueError, match=said + "micro_batches=1, or batch_size=65536"):
        plan.plan(config, there, as_is=True)
    config.training.batch_size, config.training.micro_batches = 1_000, 1
    with pytest.raises(ValueError, match=r"=1 × replica=1 × .* nearest that fit: batch_size=1024"):
        plan.plan(config, there, as_is=True)
    config.mesh.tensor, config.training.batch_size = 16, 1_024
    with pytest.raises(ValueError, match=r"tensor=16 must divide model.num_heads=40"):
        plan.plan(config, there, as_is=True)


def test_offload_is_the_last_resort():
    """A chip that is filled by the saved inputs gets them out of the way, and no other does."""
    job = Job.of(baichuan2_7b.get_config())
    base = topology.parse("v5e:16x16")
    rows = {"training.micro_batches": 1}
    assumptions = cost.Assumptions.of(base.chip)
    assert search(job, base, assumptions, rows).layout.offload == ""
    chip = dataclasses.replace(base.chip, memory=8 * GIB)
    small = dataclasses.replace(base, chip=chip)
    found = search(job, small, assumptions, rows | {"mesh.tensor": 1})
    assert found.layout.offload == "input" and found.memory.host == 4 * GIB


def test_table_and_pictures(tmp_path):
    found = plan.plan(baichuan2_13b.get_config(), topology.parse("h100:16x8"))
    text = "\n".join(lines(found))
    assert "13,896,668,160 parameters" in text and "h100:16x8: 128 devices" in text
    assert f"MFU {found.mfu:.1%}" in text and f"{float(found.step.seconds):.3f} s a step" in text
    assert f"--config.zero.replicated_layers={found.layout.layers[0]}" in text
    assert "ZeRO-1" in text and "NVLink" in text and "InfiniBand" in text
    for field in dataclasses.fields(cost.Assumptions):
        assert field.metadata["meaning"] in text
    rows = re.findall(r"^  together +(.*)$", text, re.MULTILINE)
    assert max(map(float, rows[0].split())) == pytest.approx(float(found.memory.peak) / GIB, 1e-3)
    assert float(rows[1].replace(",", "")) == pytest.approx(1e3 * float(found.step.seconds), 1e-3)
    assert [path.name for path in draw(found, tmp_path / "plots")] == ["memory.png", "time.png"]
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "plots").iterdir())


def test_recipe_holds_the_config_with_the_layout(tmp_path):
    config = baichuan2_13b.get_config()
    config.training.loss_chunk, config.data.sources = 1_024, "zh='/data/*.jsonl'"
    found = plan.plan(config, topology.parse("v5p:8x8x16"), fixed=["training.remat=qkv,gate_up"])
    path = tmp_path / "made" / "recipe.py"
    write(found, config, path, 'python "…"')
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = module.get_config()
    validate(read)
    assert Layout.of(read, 1_024) == found.layout
    assert read.mesh.fsdp == 1_024 and read.training.remat == "qkv,gate_up"
    assert config.mesh.fsdp == -1  # the given one is as it was
    found.layout.apply(config)
    assert read == config
    with pytest.raises(ValueError, match=r"should end in .py"):
        write(found, config, tmp_path / "recipe.txt", "")


def test_scaling(tmp_path):
    config = baichuan2_7b.get_config()
    found = scaling.plans(config, "h100", (8, 64, 1_024))
    assert [one.topology.name for one in found] == ["h100:1x8", "h100:8x8", "h100:128x8"]
    assert [one.job.rows for one in found] == [8, 64, 1_024]  # as many for each device
    assert 0.97 < found[-1].mfu / found[0].mfu < 1.03
    table = list(scaling.lines("7B", found))
    assert "h100:128x8" in table[-3] and len(table) == 7
    assert draw_scaling({"7B": found}, tmp_path / "scaling.png").stat().st_size > 10_000
    assert scaling.machine("v5e", 1_024).name == "v5e:16x16,slices=4"
    assert scaling.machine("v5p", 512).name == "v5p:8x8x8"
    assert scaling.machine("v7x", 8).num_devices == 8
    with pytest.raises(ValueError, match="chip='abacus' must be one of a100"):
        scaling.machine("abacus", 8)
    with pytest.raises(ValueError, match="v5e does not come in 24 devices"):
        scaling.machine("v5e", 24)


def test_picture_of_plans_beside_compilers(tmp_path):
    found = plan.plan(baichuan2_7b.get_config(), topology.parse("h100:1x8"))

    @dataclasses.dataclass
    class Row:
        model: str
        plan: plan.Plan
        compiler: float
        error: float

    path = draw_compared([Row("7B", found, 50 * GIB, 0.1)], tmp_path / "memory.png")
    assert path.stat().st_size > 5_000
