"""Checkpoints: bit for bit, onto any mesh, and never a damaged one."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.parallel.zero import shardings
from baichuan_jax.training import manifest
from baichuan_jax.training.checkpoint import CheckpointError, Checkpoints, restore_model

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4
)
OPTIMIZER = optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
META = {"row": 96, "fingerprint": "é中", "config": {"weights": ["a=1"], "rate": 2e-4}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    model: Transformer
    opt_state: optax.OptState


def make_abstract(config: ModelConfig = CONFIG) -> State:
    """What `jax.eval_shape` says of a state."""
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return State(step, model, jax.eval_shape(OPTIMIZER.init, model))


def make_state(seed: int) -> State:
    """A state whose every leaf depends on the seed, in float32, bfloat16 and int32."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(100 * noise.normal(size=x.shape), x.dtype), make_abstract()
    )


@pytest.fixture(scope="module")
def states() -> list[State]:
    return [make_state(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def abstract() -> State:
    return make_abstract()


def save(directory, states: list[State], **settings) -> None:
    """Saves them as steps 100, 200, ... of 1,000 tokens each."""
    with Checkpoints(directory, **{"keep": 9, **settings}) as checkpoints:
        for i, state in enumerate(states, start=1):
            checkpoints.save(100 * i, state, {**META, "row": i}, tokens=1_000 * i)


def assert_same(a, b) -> None:
    """The same structure (metadata of the parameters included), dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_restores_the_newest_bit_for_bit(tmp_path, states, abstract):
    save(tmp_path, states[:2])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.newest() == 200
        state, meta = checkpoints.restore(abstract)
        assert_same(state, states[1])
        assert state.model.layers.attention.qkv.spec == states[1].model.layers.attention.qkv.spec
        assert meta == {**META, "row": 2}
        assert_same(checkpoints.restore(abstract, step=100)[0], states[0])


def test_restores_onto_smaller_and_larger_meshes(tmp_path, states, abstract):
    def on_mesh(shape, devices):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            model = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                abstract.model,
                shardings(abstract.model, mesh),
            )
            # What `eval_shape` says: abstract meshes, and scalars without any sharding.
            return mesh, State(abstract.step, model, jax.eval_shape(OPTIMIZER.init, model))

    path = tmp_path
    source = states[1]
    for shape, devices in [((2, 2, 2), 8), ((1, 4, 1), 4), ((1, 1, 2), 2), ((1, 1, 1), 1)]:
        save(path, [source])
        mesh, target = on_mesh(shape, devices)
        with jax.set_mesh(mesh), Checkpoints(path, keep=1) as checkpoints:
            source, _ = checkpoints.restore(target)
        assert_same(source, states[1])
        for x, x_target in zip(jax.tree.leaves(source), jax.tree.leaves(target), strict=True):
            assert x_target.sharding is None or x.sharding.spec == x_target.sharding.spec
            assert len(x.devices()) == devices
        path = tmp_path / str(devices)  # the next mesh restores what this one saves


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_the_weights(tmp_path, states):
    save(tmp_path, states[:1])
    weights = ocp.load(tmp_path / "00000100", checkpointable_name="model")
    np.testing.assert_array_equal(
        weights["layers.attention.qkv"], states[0].model.layers.attention.qkv[...]
    )


def test_model_alone_needs_no_optimizer_state(tmp_path, states, abstract):
    save(tmp_path, states[:1])
    for file in (tmp_path / "00000100" / "training").rglob("*"):
        if file.is_file():
            file.unlink()
    assert_same(restore_model(tmp_path, abstract.model), states[0].model)


def test_model_is_cast_to_the_targets_dtype(tmp_path, states, abstract):
    save(tmp_path, states[:1])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract.model)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), states[0].model)
    assert_same(restore_model(tmp_path, half), expected)


def test_donated_buffers_do_not_change_what_is_saved(tmp_path, states, abstract):
    state = jax.tree.map(jnp.copy, states[0])
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, tokens=1)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract)[0], states[0])


def test_is_a_checkpoint_only_when_the_manifest_is_complete(tmp_path, states, monkeypatch):
    hashing = threading.Event()
    hash_file = manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: hashing.wait() and hash_file(path))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, states[0], {}, tokens=1)  # returns before it is written
        assert checkpoints.newest() is None
        hashing.set()
        checkpoints.wait()
        assert checkpoints.newest() == 1


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def corrupt(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def add(file: Path) -> None:
    (file.parent / f"{file.name}-copy").write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    "damage, said",
    [
        (truncate, "bytes instead of"),
        (corrupt, "was changed"),
        (Path.unlink, "is missing"),
        (add, "-copy was added"),
    ],
)
def test_a_damaged_newest_is_reported_and_the_one_before_used(
    tmp_path, states, abstract, caplog, damage, said
):
    save(tmp_path, states[:2])
    file = largest_file(tmp_path / "00000200")
    damage(file)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state, meta = checkpoints.restore(abstract)
        assert_same(state, states[0])
        assert meta["row"] == 1
        name = file.relative_to(tmp_path / "00000200").as_posix()
        assert f"{tmp_path}/00000200: {name}" in caplog.text and said in caplog.text
        # It neither counts among the kept ones, nor is it deleted, but it is written anew.
        checkpoints.save(150, states[2], {}, tokens=1_500)
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["00000150", "00000200"]
        checkpoints.save(200, states[3], {}, tokens=2_000)
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract)[0], states[3])
        assert [p.name for p in tmp_path.iterdir()] == ["00000200"]


def test_without_a_sound_one_the_error_lists_what_is_wrong_with_each(tmp_path, states, abstract):
    save(tmp_path, states[:3])
    truncate(largest_file(tmp_path / "00000100"))
    corrupt(largest_file(tmp_path / "00000200"))
    manifest = tmp_path / "00000300" / "manifest-00000-of-00001.json"
    manifest.write_text(manifest.read_text()[:50])
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract)
        with pytest.raises(CheckpointError, match=r"00000200.*was changed"):
            checkpoints.restore(abstract, step=200)
        with pytest.raises(CheckpointError, match=r"00000400: there is no such folder"):
            checkpoints.restore(abstract, step=400)
    for said in ["00000100: ", "bytes instead of", "00000200: ", "was changed", "00000300: "]:
        assert said in str(error.value)
    assert "manifest cannot be read" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_an_interrupted_save_left_is_ignored_then_cleared(tmp_path, states, abstract, caplog):
    save(tmp_path, states[:2])
    (tmp_path / "00000200" / "manifest-00000-of-00001.json").unlink()  # killed before the manifest
    partial = tmp_path / "00000300.orbax-checkpoint-tmp" / "model"  # killed before the commit
    partial.mkdir(parents=True)
    (tmp_path / "2024").mkdir()  # somebody's own
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        assert "00000200 is what an interrupted save left" in caplog.text
        assert "00000300.orbax-checkpoint-tmp is what" in caplog.text
        assert checkpoints.newest() == 100
        assert_same(checkpoints.restore(abstract)[0], states[0])
        assert partial.exists()
        checkpoints.save(200, states[2], {}, tokens=2_000)
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract)[0], states[2])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["00000100", "00000200", "2024"]


def test_a_directory_without_checkpoints(tmp_path, abstract):
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.newest() is None
        with pytest.raises(CheckpointError, match=r"No sound checkpoint in .*new"):
            checkpoints.restore(abstract)
    with pytest.raises(CheckpointError, match=r"No sound checkpoint in .*other"):
        restore_model(tmp_path / "other", abstract.model)


def test_keeps_the_newest_and_one_every_so_many_tokens(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every_tokens=3_000) as checkpoints:
        for step in range(1, 11):  # 800 tokens a step: 3,000 are passed at step 4, then 8
            checkpoints.save(step, {"model": {"w": jnp.ones(3)}}, {}, tokens=800 * step)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 9, 10]


def test_deletes_nothing_before_the_new_one_is_complete(tmp_path, states, abstract, monkeypatch):
    def fail(path):
        raise OSError("No space left on device")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, states[0], {}, tokens=1)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "hash_file", fail)
            checkpoints.save(2, states[1], {}, tokens=2)
            with pytest.raises(CheckpointError, match=r"step 2 .*No space.*00000001, is intact"):
                checkpoints.save(3, states[1], {}, tokens=3)  # the error surfaces here
        assert_same(checkpoints.restore(abstract)[0], states[0])
        checkpoints.save(3, states[1], {}, tokens=3)
        checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]


def test_a_sound_checkpoint_is_not_overwritten(tmp_path, states):
    save(tmp_path, states[:1])
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(CheckpointError, match="00000100 holds a checkpoint already"),
    ):
        checkpoints.save(100, states[1], {}, tokens=1)


def test_another_model_is_refused_by_name(tmp_path, states):
    save(tmp_path, states[:1])

    def target(**changes):
        return make_abstract(dataclasses.replace(CONFIG, **changes))

    wider = target(intermediate_size=64)
    shapes = r"layers.mlp.down has shape \(2, 32, 16\) in the checkpoint, but \(2, 64, 16\)"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match=shapes):
            checkpoints.restore(wider)
        with pytest.raises(ValueError, match=shapes):
            restore_model(tmp_path, wider.model)
        float32 = dataclasses.replace(
            target(), opt_state=jax.eval_shape(optax.adamw(1e-3).init, states[0].model)
        )
        with pytest.raises(ValueError, match=r"mu.embedding has dtype bfloat16 .* but float32"):
            checkpoints.restore(float32)
        sgd = dataclasses.replace(target(), opt_state=())
        with pytest.raises(ValueError, match=r"count is in the checkpoint, but not in the state"):
            checkpoints.restore(sgd)
        more = dataclasses.replace(target(), opt_state=(target().opt_state, target().step))
        with pytest.raises(ValueError, match="is in the state to restore, but not in the checkp"):
            checkpoints.restore(more)


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in [tmp_path / "file", tmp_path / "file" / "checkpoints"]:
        with pytest.raises(CheckpointError, match=f"cannot be written to {directory}"):
            Checkpoints(directory, keep=1)


FULL_DISK = """
import json, resource, sys
import jax, jax.numpy as jnp
from baichuan_jax.training.checkpoint import CheckpointError, Checkpoints

def state(seed, size):
    return {"model": {"w": jax.random.normal(jax.random.key(seed), size)}}

said = []
checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, state(1, 100), {}, tokens=1)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints.save(2, state(2, 200_000), {}, tokens=2)
try:
    checkpoints.save(3, state(3, 100), {}, tokens=3)
except CheckpointError as error:
    said.append(str(error))
w = jax.ShapeDtypeStruct((100,), jnp.float32)
restored, _ = checkpoints.restore({"model": {"w": w}})
said.append(bool((restored["model"]["w"] == state(1, 100)["model"]["w"]).all()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoints.save(3, state(3, 200_000), {}, tokens=3)
checkpoints.close()
said.append(checkpoints.newest())
print(json.dumps(said))
"""


def test_a_full_disk_is_a_clear_error_that_loses_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-2_000:]
    message, is_intact, newest = json.loads(run.stdout.splitlines()[-1])
    for said in ["step 2 ", str(tmp_path), "File too large", "800,000 bytes", "are free"]:
        assert said in message
    assert f"{tmp_path}/00000001, is intact" in message
    assert is_intact
    assert newest == 3
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from pathlib import Path
from baichuan_jax.training import checkpoint, manifest

directory, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
mesh = jax.make_mesh((2,), ("fsdp",))
jax.set_mesh(mesh)
split = jax.NamedSharding(mesh, jax.P("fsdp"))

def state(seed):
    x = np.random.default_rng(seed).normal(size=(4, 1_000)).astype(np.float32)
    return {"model": {"w": jax.make_array_from_callback(x.shape, split, lambda i: x[i])}}

checkpoints = checkpoint.Checkpoints(directory, keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, state(step), {}, tokens=step)
checkpoints.wait()
if index == 0:
    assert sorted(p.name for p in directory.iterdir()) == ["00000002", "00000003"]
    assert len(list(directory.glob("00000003/manifest-*"))) == 2
    largest = max(directory.glob("00000003/model/*/d/*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(b"?" + largest.read_bytes()[1:])
multihost_utils.sync_global_devices("damaged")
w = jax.ShapeDtypeStruct((4, 1_000), jnp.float32, sharding=split)
restored, _ = checkpoints.restore({"model": {"w": w}})
mine = restored["model"]["w"].addressable_data(0)
assert (np.asarray(mine) == np.asarray(state(2)["model"]["w"].addressable_data(0))).all()

if index == 1:
    def fail(path):
        raise OSError("quota exceeded")
    manifest.hash_file = fail
checkpoints.save(4, state(4), {}, tokens=4)
try:
    checkpoints.wait()
except checkpoint.CheckpointError as error:
    assert "quota exceeded" in str(error) and "00000002, is intact" in str(error)
    print("agreed")
"""


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    port = str(unused_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), port, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": ""},
        )
        for index in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out.endswith("agreed\n"), err[-2_000:]
