"""Mesh shapes and the errors of those that do not fit; device order on mocked machines."""

import itertools
import math
import os
import random
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.parallel import mesh
from baichuan_jax.parallel.mesh import arrange, check_fit, granules, make_mesh, mesh_shape


def test_minus_one_takes_what_is_left():
    assert mesh_shape(MeshConfig(2, -1, 2), 16) == (2, 4, 2)
    assert mesh_shape(MeshConfig(), 1) == (1, 1, 1)
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"replica": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "config", [MeshConfig(3, -1, 1), MeshConfig(2, 2, 1), MeshConfig(16, 1, 1)]
)
def test_a_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match=r"does not fit 8 devices.*product must be 8"):
        make_mesh(config, jax.devices()[:8])


def test_the_nearest_meshes_that_fit_are_named():
    with pytest.raises(ValueError, match="the nearest that fit: replica=2 × fsdp=4 × tensor=1"):
        make_mesh(MeshConfig(3, 4, 1), jax.devices()[:8])
    # What the user leaves free counts for nothing.
    with pytest.raises(ValueError, match="that fit: replica=4 × fsdp=2 × tensor=1; "):
        make_mesh(MeshConfig(5, -1, 1), jax.devices()[:8])


@pytest.mark.parametrize("config", [MeshConfig(-1, -1, 1), MeshConfig(0, -1, 1)])
def test_sizes_are_positive_or_one_is_free(config):
    with pytest.raises(ValueError, match="one at most may be -1"):
        mesh_shape(config, 8)


def test_what_tensor_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(ValueError, match=r"tensor=8 must divide model.num_heads=12"):
        check_fit(mesh, ModelConfig(num_heads=12, hidden_size=96), rows=8)


def test_a_batch_that_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(4, 2, 1))
    with pytest.raises(ValueError, match=r"12 rows must be a multiple .* = 8 devices, such as 16"):
        check_fit(mesh, ModelConfig(), rows=12)
    check_fit(mesh, ModelConfig(), rows=16)


def gpus(nodes: int, each: int, processes: int = 1) -> list:
    """GPUs of nodes, each with so many processes. Node 2n+1 hangs on another switch than 2n."""
    per_process = each // processes
    return [
        types.SimpleNamespace(
            platform="gpu",
            device_kind="NVIDIA H100 80GB HBM3",
            id=i,
            process_index=i // per_process,
            slice_index=0,
            node=i // each,
            switch=f"leaf{i // each % 2}",
        )
        for i in range(nodes * each)
    ]


def tpus(shape: tuple[int, ...], slices: int = 1) -> list:
    """TPU chips, v5e in two dimensions and v5p in three; hosts have 2 × 2 of them."""
    x, y, z = (*shape, 1)[:3]
    places = list(itertools.product(range(slices), range(z), range(y), range(x)))
    hosts = sorted({(s, k, j // 2, i // 2) for s, k, j, i in places})
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5" if len(shape) == 3 else "TPU v5 lite",
            id=number,
            process_index=hosts.index((s, k, j // 2, i // 2)),
            slice_index=s,
            coords=(i, j, k),
            core_on_chip=0,
        )
        for number, (s, k, j, i) in enumerate(places)
    ]


def told(devices) -> dict[int, tuple[str, str]]:
    """What hosts would tell each other of their switches."""
    return {d.process_index: (d.switch, f"node{d.node}") for d in devices if d.platform == "gpu"}


def hops(a, b, shape: tuple[int, ...]) -> float:
    """How far apart two devices are, in the time that a hop over the fastest links takes."""
    if a.platform == "gpu":
        return 1 if a.node == b.node else 9 if a.switch == b.switch else 18
    if a.slice_index != b.slice_index:
        return 30
    steps = [abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)]
    if len(shape) == 3:  # closes to rings
        steps = [min(step, n - step) for step, n in zip(steps, shape, strict=True)]
    return sum(steps)


def hop_cost(order: np.ndarray, distance: np.ndarray) -> float:
    """Hops from each device to the next, around the ring of every row of every mesh axis.

    `replica` counts for as little as it moves: the shard that is left of a weight inside `fsdp`.
    """
    weights = (1 / order.shape[1], 1, 1)
    rings = [distance[order, np.roll(order, -1, axis)].sum() for axis in range(3)]
    return float(np.dot(weights, rings))


MACHINES = [  # devices, torus, mesh
    (gpus(4, 8), (), (4, 8, 1)),
    (gpus(4, 8), (), (4, 2, 4)),
    (gpus(4, 8), (), (2, 16, 1)),  # fsdp spans nodes
    (gpus(4, 8), (), (1, 32, 1)),
    (gpus(4, 8, processes=8), (), (4, 8, 1)),
    (gpus(6, 4, processes=2), (), (6, 2, 2)),
    (tpus((4, 4)), (4, 4), (1, 4, 4)),
    (tpus((4, 4)), (4, 4), (1, 16, 1)),
    (tpus((4, 4)), (4, 4), (2, 2, 4)),
    (tpus((4, 4, 4)), (4, 4, 4), (1, 16, 4)),
    (tpus((4, 4, 4)), (4, 4, 4), (1, 64, 1)),
    (tpus((4, 4, 4), slices=2), (4, 4, 4), (2, 16, 4)),
    (tpus((4, 4, 4), slices=2), (4, 4, 4), (1, 32, 4)),  # fsdp spans slices
    (tpus((4, 4), slices=2), (4, 4), (4, 2, 4)),
]


@pytest.mark.parametrize("devices, torus, shape", MACHINES)
def test_no_random_order_has_fewer_hops(devices, torus, shape):
    rng = np.random.default_rng(0)
    groups = granules(random.Random(0).sample(devices, len(devices)), told(devices))
    grid = arrange(shape, groups)
    assert grid.shape == shape and {d.id for d in grid.flat} == {d.id for d in devices}
    distance = np.array([[hops(a, b, torus) for b in devices] for a in devices])
    order = np.vectorize(lambda device: device.id)(grid)
    ours = hop_cost(order, distance)
    numbers = np.arange(len(devices))
    others = [hop_cost(rng.permutation(numbers).reshape(shape), distance) for _ in range(1000)]
    assert ours <= min(others)
    # Nor has one that differs by two devices alone, which is much nearer.
    for _ in range(1000):
        swapped = order.copy().reshape(-1)
        i, j = rng.choice(len(numbers), 2, replace=False)
        swapped[[i, j]] = swapped[[j, i]]
        assert ours <= hop_cost(swapped.reshape(shape), distance)


@pytest.mark.parametrize("devices, torus, shape", MACHINES)
def test_the_order_of_the_devices_given_does_not_matter(devices, torus, shape):
    expected = arrange(shape, granules(devices, told(devices)))
    for seed in range(5):
        shuffled = random.Random(seed).sample(devices, len(devices))
        assert (arrange(shape, granules(shuffled, told(devices))) == expected).all()


def test_tensor_lies_inside_a_node_and_replica_across_them():
    devices = gpus(16, 8, processes=8)
    grid = arrange((16, 2, 4), granules(devices, told(devices)))
    for replica in grid:
        assert len({d.node for d in replica.flat}) == 1
    assert [d.id % 8 for d in grid[5, 0]] == [0, 1, 2, 3]
    # Hosts of a switch are neighbours, in the order of their processes.
    assert [d.node for d in grid[:, 0, 0]] == [*range(0, 16, 2), *range(1, 16, 2)]
    # A ring across nodes joins GPUs of one number, which share a rail.
    assert len({d.id % 8 for d in grid[:, 1, 2]}) == 1


def test_processes_that_tell_nothing_are_hosts_of_their_own():
    """As in an ahead-of-time topology, where every GPU has slice_index 0."""
    groups = granules(gpus(4, 8), {})
    assert [[d.id for d in group] for group in groups] == np.arange(32).reshape(4, 8).tolist()


def test_slices_are_the_groups_of_tpus():
    devices = tpus((2, 2, 4), slices=3)
    grid = arrange((3, 8, 2), granules(devices, {}))
    for number, replica in enumerate(grid):
        assert {d.slice_index for d in replica.flat} == {number}


def test_a_mesh_that_cuts_hosts_in_pieces_is_refused():
    with pytest.raises(ValueError, match=r"nodes or slices of 8 devices in pieces; the nearest"):
        arrange((2, 12, 1), granules(gpus(3, 8), {}))
    with pytest.raises(ValueError) as refusal:
        arrange((4, 5, 4), granules(gpus(10, 8), {}))
    named = str(refusal.value).split("nearest that fit: ")[1].rstrip(".").split("; ")
    for shape in named:
        sizes = [int(part.split("=")[1]) for part in shape.split(" × ")]
        assert math.prod(sizes) == 80
        arrange(tuple(sizes), granules(gpus(10, 8), {}))


def test_hosts_with_unequal_numbers_of_devices_are_refused():
    with pytest.raises(ValueError, match=r"equal numbers of devices; .*process 0 8, process 1 7"):
        granules(gpus(2, 8)[:-1], {})


def test_one_process_for_each_host_sees_all_of_its_gpus(monkeypatch):
    """JAX gives a process under Slurm or Open MPI the GPU of its number, and no other."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))

    def started(coordinator="auto", **environment):
        for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        mesh.start_processes(coordinator, 2, 1)
        return calls.pop() if calls else None

    assert started("") is None
    assert started() == ((), {"local_device_ids": None})
    assert started(SLURM_NTASKS="16", SLURM_STEP_NUM_NODES="2")[1] == {"local_device_ids": None}
    assert started(SLURM_NTASKS="2", SLURM_STEP_NUM_NODES="2")[1] == {"local_device_ids": []}
    assert started(OMPI_COMM_WORLD_LOCAL_SIZE="1")[1] == {"local_device_ids": []}
    assert started("10.0.0.1:1234") == (("10.0.0.1:1234", 2, 1, None), {})
    assert started(SLURM_NTASKS="2", SLURM_STEP_NUM_NODES="2", JAX_LOCAL_DEVICE_IDS="0,1")[1] == {
        "local_device_ids": None
    }


MEMBER = """
import os, sys
from baichuan_jax.config import MeshConfig
from baichuan_jax.parallel.mesh import make_mesh, start_processes

start_processes(sys.argv[1], 2, int(sys.argv[2]))
grid = make_mesh(MeshConfig(2, 2, 1)).devices
print([device.process_index for device in grid.flat])
"""


def test_hosts_tell_each_other_their_switch():
    """Process 1 is on the switch that comes first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, coordinator, str(number)],
            env=os.environ | flags | {"BAICHUAN_JAX_SWITCH": switch},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, switch in enumerate(["spine.leaf2", "spine.leaf1"])
    ]
    for member in members:
        said, errors = member.communicate(timeout=120)
        # Gloo, which connects the processes, writes beside it, at times on the same line.
        assert "[1, 1, 0, 0]" in said, said + errors[-2000:]
