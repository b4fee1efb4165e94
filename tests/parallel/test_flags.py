"""Compiler flags: chosen by device, left to the user, checked with the compiler."""

import pathlib
import re

import jax
import pytest

from baichuan_jax.config import MeshConfig
from baichuan_jax.parallel import flags
from baichuan_jax.parallel.flags import Choice, Flag
from baichuan_jax.parallel.mesh import make_mesh

NAMES = {"xla_gpu_enable_pipelined_all_gather", "xla_gpu_pipeline_all_gather"}  # old and new
KNOWN, UNKNOWN = "xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_no_such_flag"


@pytest.fixture
def choose(monkeypatch):
    """`for_training` as if the flags of NVIDIA's GPUs were a CPU's: its compiler has them, too."""

    def choose(*chosen: Flag) -> Choice:
        chosen = chosen or flags.for_device("gpu", "NVIDIA A100-SXM4-80GB")
        monkeypatch.setattr(flags, "for_device", lambda *_: chosen)
        return flags.for_training(make_mesh(MeshConfig(), jax.devices()[:2]))

    return choose


def test_a_cpu_has_none_and_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(flags, "_accepts", None)
    assert flags.for_training(make_mesh(MeshConfig())) == Choice()
    assert Choice().options == {} and Choice().lines() == []


def test_every_nvidia_flag_is_known_to_this_jaxlib(choose):
    choice = choose()
    assert choice.unknown == () and len(choice.options) == len(flags.for_device("gpu", "A100"))
    assert choice.options[KNOWN] is True and len(NAMES & set(choice.options)) == 1


def test_an_older_name_is_used_where_the_newer_is_unknown(choose):
    older = Flag(KNOWN, True, "same")
    choice = choose(Flag(UNKNOWN, "MODE_ON", "same", older))
    assert choice == Choice((older,)) and choice.lines() == [f"{KNOWN}=True: same"]
    newer = Flag(KNOWN, False, "same", Flag(UNKNOWN, True, "same"))
    assert choose(newer).options == {KNOWN: False}


def test_an_unknown_flag_is_left_out_and_told(choose):
    choice = choose(Flag(UNKNOWN, True, "new"), Flag(KNOWN, True, "kept"))
    assert choice.options == {KNOWN: True} and choice.unknown == (UNKNOWN,)
    assert choice.lines() == [
        f"{KNOWN}=True: kept",
        f"{UNKNOWN}: left out, this compiler has no such flag",
    ]


def test_a_value_that_is_wrong_is_an_error(choose):
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid bool value"):
        choose(Flag(KNOWN, 7, "wrong"))


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_what_the_user_sets_stands(choose, monkeypatch, name):
    monkeypatch.setenv(name, f"--xla_dump_to=/x --{KNOWN}=false")
    choice = choose()
    assert KNOWN not in choice.options and choice.users == (KNOWN,)
    assert len(choice.options) == len(flags.for_device("gpu", "A100")) - 1
    assert f"{KNOWN}: as you set it" in choice.lines()


def test_an_older_name_that_the_user_sets_stands(choose, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_gather=false")
    choice = choose()
    assert choice.users == ("xla_gpu_enable_pipelined_all_gather",)
    assert not NAMES & set(choice.options)


def test_xla_flags_may_be_in_a_file(choose, monkeypatch, tmp_path):
    (tmp_path / "flags").write_text(f"--{KNOWN}=false\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert choose().users == (KNOWN,)


def test_within_a_mesh_context_too(choose):
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert choose().unknown == ()


def test_nothing_is_pipelined_beside_tensor_parallelism():
    alone, beside = (flags.for_device("gpu", "NVIDIA H200", tensor) for tensor in (1, 2))
    pipelined = {flag.name for flag in alone} - {flag.name for flag in beside}
    assert {name.rpartition("pipeline_")[2] for name in pipelined} == {
        *("all_gather", "reduce_scatter", "all_reduce"),
    }


def test_generations_and_versions_differ(monkeypatch):
    hopper = flags.for_device("gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    (estimator,) = set(flags.for_device("gpu", "NVIDIA A800-SXM4-80GB")) - set(hopper)
    assert estimator.name == "xla_gpu_enable_analytical_latency_estimator"
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert flags.for_device("gpu", "NVIDIA A800-SXM4-80GB") == hopper
    tpu = flags.for_device("tpu", "TPU v5 lite")
    assert all(re.match(r"xla_(tpu|jf|enable)_", flag.name) and flag.why for flag in tpu)


def test_a_process_is_prepared_only_where_the_cuda_plugin_is(monkeypatch, tmp_path):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda _: None)
    flags.prepare_process()
    assert name not in flags.os.environ
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda _: object())
    there = []
    monkeypatch.setattr(pathlib.Path, "glob", lambda *_: there)  # of NVIDIA's driver
    flags.prepare_process()
    assert flags.os.environ[name] == "0.93"
    options = "--xla_gpu_analytical_latency_estimator_options="
    start = f"--xla_one=1 {options}gpus_per_node=8,nic_speed_gbps=400,"
    assert flags.os.environ["XLA_FLAGS"].startswith(start)
    monkeypatch.setenv(name, "0.5")
    monkeypatch.setenv("XLA_FLAGS", f"{options}1")
    flags.prepare_process()
    assert flags.os.environ["XLA_FLAGS"] == f"{options}1"
    assert flags.os.environ[name] == "0.5"
    monkeypatch.setenv("XLA_FLAGS", "")
    (tmp_path / "information").write_text("Model: \t\t NVIDIA A800-SXM4-80GB\nIRQ: 7\n")
    there = [tmp_path / "information"] * 4
    flags.prepare_process()
    assert "gpus_per_node=4,nic_speed_gbps=200," in flags.os.environ["XLA_FLAGS"]
    assert flags.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
