"""Which meshes and placements the planner looks at."""

import dataclasses

import pytest

from baichuan_jax.config import Config
from baichuan_jax.parallel import cost, topology
from baichuan_jax.parallel.layout import Job, Layout
from baichuan_jax.parallel.layouts import frames, meshes, placements
from configs import baichuan2_7b


def test_tensor_stays_inside_a_node_whatever_links_are_called():
    base = topology.parse("h100:2x8")
    across = dataclasses.replace(base.chip.across, kind=base.chip.inside.kind)
    same = dataclasses.replace(base, chip=dataclasses.replace(base.chip, across=across))
    job = Job.of(baichuan2_7b.get_config())
    found = list(meshes(job, same, {}))
    assert found == list(meshes(job, base, {}))
    assert {shape[2] for shape in found} == {1, 2, 4, 8}
    assert [frame for _, frame in frames(job, same, cost.Assumptions(), {"mesh.tensor": 2})]


def counts(layers: int, fixed: dict[str, int]) -> list[tuple[int, int, int]]:
    config = Config()
    config.model.num_layers = layers
    frame = Layout((2, 2, 1), 1, "full", "", "full", (0, 0, layers), "full")
    (found,) = placements(Job.of(config), frame, fixed)
    return list(zip(*(each.tolist() for each in found.layers), strict=True))


@pytest.mark.parametrize("layers", [2, 40, 128])
def test_placements_are_all_counts(layers):
    found = counts(layers, {})
    assert all(min(each) >= 0 and sum(each) == layers for each in found)
    assert len(set(found)) == len(found) == (layers + 1) * (layers + 2) // 2


def test_placements_of_very_many_layers_are_evenly_spread():
    found = counts(4_000, {})
    assert all(min(each) >= 0 and sum(each) == 4_000 for each in found)
    assert len(set(found)) == len(found) < 10_000
    assert {(4_000, 0, 0), (0, 4_000, 0), (0, 0, 4_000), (1_984, 0, 2_016)} <= set(found)


@pytest.mark.parametrize("layers", [40, 4_000])
def test_placements_beside_fixed_counts(layers):
    """Of what is left, all may go to one placement, or to the other."""
    found, left = counts(layers, {"zero.replicated_layers": 7}), layers - 7
    assert {first for first, _, _ in found} == {7} and {(7, left, 0), (7, 0, left)} <= set(found)
    found = counts(layers, {"zero.full_layers": 7})
    assert {last for _, _, last in found} == {7} and {(left, 0, 7), (0, left, 7)} <= set(found)
    assert counts(layers, {"zero.replicated_layers": 7, "zero.full_layers": 3}) == [
        (7, layers - 10, 3)
    ]
