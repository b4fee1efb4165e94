"""What is told where nothing fits does fit, taken as it is told."""

import re

import pytest

from baichuan_jax.parallel import plan, topology
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.parallel.plan import DoesNotFit
from configs import baichuan2_7b, baichuan2_13b


def named(message: str) -> list[tuple[str, dict[str, str]]]:
    """The suggestions of a message: what stands before 'with', and settings."""
    found = re.search(r"What fits: (.*)\.$", message)[1].split("; ")
    pairs = (one.rpartition(" with ") for one in found)
    return [(before, dict(x.split("=") for x in after.split(", "))) for before, _, after in pairs]


@pytest.mark.parametrize(
    "name, first",
    [
        ("v5e:1x1", "v5e:4x8"),
        ("h100:1x1", "h100:1x4"),
        ("h100:1x2", "h100:1x4"),
        ("b200:1x1", "b200:1x2"),
    ],
)
def test_what_does_not_fit_is_told_with_what_does(name, first):
    config = baichuan2_13b.get_config()
    there = topology.parse(name)
    with pytest.raises(DoesNotFit, match=rf"^{name}: a device needs [\d.]+ GiB") as error:
        plan.plan(config, there)
    needed = float(re.search(r"needs ([\d.]+) GiB", str(error.value))[1])
    assert needed > 0.95 * there.chip.memory / GIB
    told = named(str(error.value))
    assert told[0][0] == first
    for other, settings in told:
        fixed = [f"{field}={value}" for field, value in settings.items()]
        larger = topology.parse(other)
        found = plan.plan(config, larger, fixed=fixed)
        assert found.fits
        assert larger.num_devices > there.num_devices or larger.chip.memory > there.chip.memory


def test_a_given_layout_that_does_not_fit_is_told_with_one_that_does():
    config, there = baichuan2_7b.get_config(), topology.parse("h100:1x8")
    config.training.remat, config.training.micro_batches = "none", 16
    found = plan.plan(config, there, as_is=True)
    assert not found.fits
    ((itself, settings),) = named(found.nearest())
    assert itself == "h100:1x8 itself"
    fixed = [f"{field}={value}" for field, value in settings.items()]
    assert plan.plan(config, there, fixed=fixed).fits


def test_fixed_settings_that_do_not_fit():
    config, there = baichuan2_13b.get_config(), topology.parse("h200:1x8")
    fixed = ["training.remat=none", "training.micro_batches=16"]
    with pytest.raises(DoesNotFit, match=r"\(with training.remat=none, training.micro") as error:
        plan.plan(config, there, fixed=fixed)
    names = [before for before, _ in named(str(error.value))]
    assert names[:2] == ["training.remat left open,", "training.micro_batches left open,"]


@pytest.mark.parametrize(
    "name, rows, said",
    [
        ("v5e:16x16", 100, ["config.training.batch_size=256", "v5e:4x8"]),
        ("h100:3x8", 1_024, ["config.training.batch_size=1032", "h100:4x8"]),
        ("a800:5x7", 1_024, ["a800:4x8"]),  # seven divides none of its weights
        ("h100:1x3", 1_024, ["h100:1x4"]),
    ],
)
def test_a_batch_that_no_mesh_divides(name, rows, said):
    config = baichuan2_13b.get_config()
    config.training.batch_size = rows
    with pytest.raises(DoesNotFit, match=f"divides .*batch_size={rows:,} rows. What") as error:
        plan.plan(config, topology.parse(name))
    told = named(str(error.value))
    assert [before for before, _ in told] == said
    for before, settings in told:  # taken as they are told
        machine = topology.parse(name if "=" in before else before)
        config.training.batch_size = int(before.partition("=")[2] or rows)
        fixed = [f"{field}={value}" for field, value in settings.items()]
        assert plan.plan(config, machine, fixed=fixed).fits
        assert plan.plan(config, machine).fits  # whatever the config's own micro-batches


def test_micro_batches_are_why_no_mesh_divides_the_batch():
    config, there = baichuan2_7b.get_config(), topology.parse("h100:128x8")
    with pytest.raises(DoesNotFit, match=r"=1,024 rows \(with .*micro_batches=64\)") as error:
        plan.plan(config, there, fixed=["training.micro_batches=64"])
    assert named(str(error.value))[0][0] == "training.micro_batches left open,"
    assert "batch_size=1024 with" not in str(error.value)
