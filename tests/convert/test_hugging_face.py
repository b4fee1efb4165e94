"""Released checkpoints become our parameters: the right ones, bit for bit, or not at all."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config import MeshConfig, from_json
from baichuan_jax.convert import hugging_face, layout, weights
from baichuan_jax.convert.hugging_face import (
    check_tokenizer,
    import_checkpoint,
    read_model,
    release_rows,
)
from baichuan_jax.convert.release import read_config
from baichuan_jax.parallel import zero
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.checkpoint import by_name, restore_model
from tests.convert import releases
from tests.model import reference

FORMS = {
    "Baichuan-7B": {"version": 1, "position": "rope", "files": "bin", "shards": 2},
    "Baichuan-13B-Chat": {"version": 1, "position": "alibi", "files": "bin", "chat": True},
    "Baichuan2-7B": {"version": 2, "position": "rope", "files": "bin"},
    "Baichuan2-7B in float16": {"version": 2, "position": "rope", "dtype": "float16"},
    "Baichuan2-13B-Chat": {
        **{"version": 2, "position": "alibi", "chat": True, "files": "bin", "shards": 3}
    },
    "Baichuan2-13B-Chat v2.0": {
        **{"version": 2, "position": "alibi", "chat": True, "shards": 3},
        **{"model_max_length": 8192},
    },
    "Llama": {"version": 1, "layout": "llama", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return releases.make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model")


def make(directory: Path, name: str, **changes) -> dict[str, np.ndarray]:
    return releases.make_release(directory, **FORMS[name] | changes)


def released_logits(tensors, model, tokens_T) -> np.ndarray:
    """Float64 logits [T, V], computed with the tensors as the official code uses them."""
    w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    H, K, T = model.num_heads, model.head_size, len(tokens_T)
    x = w["model.embed_tokens.weight"][tokens_T]
    for n in range(model.num_layers):

        def linear(x, name, prefix=f"model.layers.{n}."):
            return x @ w[f"{prefix}{name}.weight"].T

        h = reference.rms_norm(x, w[f"model.layers.{n}.input_layernorm.weight"], 1e-6)
        if f"model.layers.{n}.self_attn.W_pack.weight" in w:
            q, k, v = np.split(linear(h, "self_attn.W_pack"), 3, axis=-1)
        else:
            q, k, v = (linear(h, f"self_attn.{name}_proj") for name in "qkv")
        heads = []
        for head in range(H):
            q1, k1, v1 = (x.reshape(T, H, K)[:, head] for x in (q, k, v))
            if model.position == "rope":
                q1, k1 = reference.rope(q1, 10_000), reference.rope(k1, 10_000)
            scores = q1 @ k1.T / np.sqrt(K)
            if model.position == "alibi":
                distance = np.arange(T)[None] - np.arange(T)[:, None]
                scores += reference.alibi_slope(head, H) * distance
            scores[np.triu_indices(T, 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v1)
        x = x + linear(np.concatenate(heads, -1), "self_attn.o_proj")
        h = reference.rms_norm(x, w[f"model.layers.{n}.post_attention_layernorm.weight"], 1e-6)
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = w["lm_head.weight"]
    if model.norm_head:
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    return reference.rms_norm(x, w["model.norm.weight"], 1e-6) @ head.T


def our_logits(model, config, tokens_T) -> np.ndarray:
    model = jax.tree.map(np.asarray, model)  # off the mesh
    model = jax.tree.map(jnp.asarray, model)
    tokens_BT = jnp.asarray(tokens_T)[None]
    positions = jnp.arange(len(tokens_T))[None]
    hidden = model(tokens_BT, positions, jnp.ones_like(positions), dtype=jnp.float32)
    return np.asarray(model.logits(hidden))[0, :, : config.vocab_size]


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("name", FORMS)
def test_computes_what_the_released_tensors_compute(tmp_path, name):
    tensors = make(tmp_path / "r", name)
    release = read_config(tmp_path / "r", version=FORMS[name]["version"])
    config = release.config.model
    assert config.position == FORMS[name].get("position", "rope")
    model = read_model(tmp_path / "r", config, one_device(), jnp.float32)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 24)
    expected = released_logits(tensors, config, tokens)
    np.testing.assert_allclose(our_logits(model, config, tokens), expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", FORMS)
def test_a_run_is_made_that_everything_else_can_read(tmp_path, name, tokenizer):
    version = FORMS[name]["version"]
    config = releases.tiny_model(FORMS[name].get("position", "rope"), vocab_size=500)
    tensors = make(tmp_path / "r", name, model=config, tokenizer=tokenizer)
    lines = []
    release = import_checkpoint(
        tmp_path / "r", tmp_path / "run", version=version, step=7, say=lines.append
    )
    said = "\n".join(lines)
    assert str(release) in said
    run = from_json(tmp_path / "run" / "config.json")
    config.version = version
    config.norm_head = version == 2 and FORMS[name].get("layout") != "llama"
    assert run.model == config == release.config.model
    assert run.data.sequence_length == FORMS[name].get("model_max_length", 4096)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    chat = FORMS[name].get("chat", False)
    expected = {"config.json", "checkpoints", "tokenizer.model"}
    assert files == expected | ({"generation_config.json"} if chat else set())
    if chat:
        generation = json.loads((tmp_path / "run" / "generation_config.json").read_text())
        assert generation["repetition_penalty"] == (1.05 if version == 2 else 1.1)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000007"]

    dtype = jnp.dtype(FORMS[name].get("dtype", "bfloat16"))
    direct = read_model(release, config, one_device())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), direct)
    restored = restore_model(tmp_path / "run" / "checkpoints", abstract, step=7)
    for (where, x), y in zip(by_name(restored).items(), jax.tree.leaves(direct), strict=True):
        assert x.dtype == y.dtype == dtype, where
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), where
    padding = np.asarray(restored.embedding[...])[config.vocab_size :]
    assert len(padding) == 12 and not padding.any()
    np.testing.assert_array_equal(
        restored.embedding[: config.vocab_size], tensors["model.embed_tokens.weight"]
    )


def test_long_tables_and_stacks_come_in_pieces(tmp_path, monkeypatch):
    """As those of real models do, with the last piece a short one."""
    releases.make_release(tmp_path / "r", position="alibi", files="bin")
    release = read_config(tmp_path / "r")
    whole = read_model(release, release.config.model, one_device())
    monkeypatch.setattr(layout, "PIECE_BYTES", 2 * 2 * 96 * 96)
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 2_000)
    shapes = layout.our_shapes(release.config.model)
    rows = {name: layout.piece_rows(shape, 2) for name, shape in shapes.items()}
    assert (rows["embedding"], shapes["embedding"][0]) == (192, 256)
    assert (rows["layers.attention.out"], rows["layers.attention.qkv"]) == (2, 1)
    pieces = read_model(release, release.config.model, one_device())
    import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
    restored = restore_model(tmp_path / "run" / "checkpoints", abstract)
    for name, x in by_name(whole).items():
        assert np.asarray(x).tobytes() == np.asarray(by_name(pieces)[name]).tobytes(), name
        assert np.asarray(x).tobytes() == np.asarray(by_name(restored)[name]).tobytes(), name


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 4, 1), (8, 1, 1), (1, 8, 1), (1, 1, 2)])
def test_each_device_gets_what_it_stores(tmp_path, shape):
    releases.make_release(tmp_path / "r", shards=2)
    config = read_config(tmp_path / "r").config.model
    whole = read_model(tmp_path / "r", config, one_device(), jnp.float32)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        model = read_model(tmp_path / "r", config, mesh, jnp.float32)
    stored = zero.shardings(layout.abstract_model(config), mesh)
    for name, x in by_name(model).items():
        assert x.sharding == by_name(stored)[name], name
        np.testing.assert_array_equal(np.asarray(x), np.asarray(by_name(whole)[name]), name)
    tokens = np.arange(8)
    with jax.set_mesh(mesh):
        rows = jnp.tile(tokens, (8, 1))
        positions = jnp.tile(jnp.arange(8), (8, 1))
        place = jax.NamedSharding(mesh, jax.P(("replica", "fsdp"), None))
        rows, positions = (jax.device_put(x, place) for x in (rows, positions))
        hidden = jax.jit(lambda m, r, p: m(r, p, jnp.ones_like(r), dtype=jnp.float32))(
            model, rows, positions
        )
        logits = np.asarray(jax.jit(lambda m, h: m.logits(h))(model, hidden))[0]
    expected = our_logits(whole, config, tokens)
    np.testing.assert_allclose(logits[:, : config.vocab_size], expected, atol=1e-4)


def test_an_other_dtype_is_asked_for(tmp_path):
    tensors = releases.make_release(tmp_path / "r", dtype="float32")
    config = read_config(tmp_path / "r").config.model
    model = read_model(tmp_path / "r", config, one_device(), jnp.bfloat16)
    expected = tensors["lm_head.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(model.head[: config.vocab_size]), expected)
    import_checkpoint(tmp_path / "r", tmp_path / "run", dtype="float16", say=lambda _: None)
    reader = weights.WeightsReader(tmp_path / "run" / "checkpoints" / "00000000")
    assert {str(dtype) for dtype in reader.dtypes.values()} == {"float16"}
    with pytest.raises(ValueError, match=r"int8 is not among bfloat16, float16, float32"):
        import_checkpoint(tmp_path / "r", tmp_path / "other", dtype="int8")


def test_numbers_that_the_dtype_cannot_hold_are_told(tmp_path):
    tensors = releases.make_release(tmp_path / "r", dtype="float32")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    releases.write_weights(tmp_path / "r", tensors)
    with pytest.raises(ValueError, match=r"layers.mlp.gate_up as float16 holds inf at \[1, 5, 1, "):
        import_checkpoint(tmp_path / "r", tmp_path / "run", dtype="float16", say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_dtypes_that_differ_inside_a_stack_need_a_decision(tmp_path):
    tensors = releases.make_release(tmp_path / "r")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name].astype(np.float32)
    releases.write_weights(tmp_path / "r", tensors)
    with pytest.raises(ValueError, match=rf"{name} has dtype float32, but .* Give --dtype="):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    import_checkpoint(tmp_path / "r", tmp_path / "run", dtype="float32", say=lambda _: None)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_dtype_of_a_stack_does_not_hide_what_another_loses(tmp_path, layer):
    tensors = releases.make_release(tmp_path / "r", dtype="float16")
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    tensors[name][3, 5] = 1e5
    releases.write_weights(tmp_path / "r", tensors)
    release = read_config(tmp_path / "r")
    said = rf"layers.mlp.gate_up as float16 holds inf at \[{layer}, 5, 1, 3\]"
    with pytest.raises(ValueError, match=said):
        import_checkpoint(tmp_path / "r", tmp_path / "run", dtype="float16", say=lambda _: None)
    with pytest.raises(ValueError, match=said):
        read_model(release, release.config.model, one_device(), jnp.float16)
    with pytest.raises(ValueError, match=r"and they become one tensor, layers.mlp.gate_up. Give"):
        release_rows(release)


def test_rows_of_a_release(tmp_path):
    releases.make_release(tmp_path / "r", dtype="float16", shards=2)
    release = read_config(tmp_path / "r")
    whole = by_name(read_model(release, release.config.model, one_device()))
    read, read_float32 = release_rows(release), release_rows(release, "float32")
    for name, x in whole.items():
        for start, stop in [(0, len(x)), (1, 2), (len(x) - 1, len(x) + 3)]:
            rows = read(name, start, stop)
            assert rows.dtype == x.dtype == np.float16, name
            np.testing.assert_array_equal(rows, np.asarray(x)[start:stop], err_msg=name)
    rows = read_float32("layers.mlp.down", 2, 3)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.asarray(whole["layers.mlp.down"])[2:])


def siblings(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def no_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 64)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize(
    "files, damage, said",
    [
        ("safetensors", truncate, r"model-00002-of-00002.safetensors: \S+ ends at byte .* cut off"),
        ("safetensors", no_header, r"model-00002-of-00002.safetensors is not a whole safetensors"),
        ("bin", truncate, r"pytorch_model-00002-of-00002.bin is not a whole file of torch.save"),
        ("bin", no_header, r"pytorch_model-00002-of-00002.bin is not a whole file of torch.save"),
        ("bin", flip, r"pytorch_model-00002-of-00002.bin: model.layers.\S+ is damaged: its check"),
        ("bin", Path.unlink, r"pytorch_model-00002-of-00002.bin is missing"),
    ],
)
def test_damaged_files_leave_nothing_behind(tmp_path, files, damage, said, step):
    releases.make_release(tmp_path / "r", files=files, shards=2)
    damage(next((tmp_path / "r").glob("*-00002-of-00002.*")))
    with pytest.raises((ValueError, OSError), match=said):
        import_checkpoint(tmp_path / "r", tmp_path / "run", step=step, say=lambda _: None)
    assert siblings(tmp_path) == ["r"]


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_is_named_by_file_and_tensor(tmp_path, files, bad):
    tensors = releases.make_release(tmp_path / "r", files=files, shards=1)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][3, 4] = bad
    releases.write_weights(tmp_path / "r", tensors, files)
    said = rf"{files}: {name} holds {bad} at \[3, 4\]"
    with pytest.raises(ValueError, match=said):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    assert siblings(tmp_path) == ["r"]
    with pytest.raises(ValueError, match=said):
        read_model(tmp_path / "r", read_config(tmp_path / "r").config.model, one_device())


def test_what_is_there_is_not_overwritten(tmp_path):
    releases.make_release(tmp_path / "r")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    with pytest.raises(FileExistsError, match=r"run is there already"):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    (tmp_path / "run" / "mine").unlink()
    import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)  # an empty folder
    assert (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match=r"gs://bucket/run: should be on a local disk"):
        import_checkpoint(tmp_path / "r", "gs://bucket/run", say=lambda _: None)
    with pytest.raises(ValueError, match=r"--step=-1 must not be negative"):
        import_checkpoint(tmp_path / "r", tmp_path / "other", step=-1, say=lambda _: None)


def test_a_disk_without_room_is_told_before(tmp_path, monkeypatch):
    releases.make_release(tmp_path / "r")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"run needs about [\d,]+ bytes, and the disk has 1,000 free"):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    assert siblings(tmp_path) == ["r"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    releases.make_release(tmp_path / "r")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(weights.WeightsWriter, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    assert siblings(tmp_path) == ["r"]


def test_a_checkpoint_that_is_not_written_to_its_end_is_none(tmp_path, monkeypatch):
    releases.make_release(tmp_path / "r")
    pieces = hugging_face._pieces
    monkeypatch.setattr(hugging_face, "_pieces", lambda *a: list(pieces(*a))[:-1])
    with pytest.raises(ValueError, match=r"norm.gain was not written to its end"):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    assert siblings(tmp_path) == ["r"]


@pytest.mark.parametrize("rows, fits", [(499, False), (500, True), (512, True), (800, False)])
def test_tokenizers_must_belong_to_the_embedding(tmp_path, tokenizer, rows, fits):
    model = releases.tiny_model(vocab_size=rows)
    releases.make_release(tmp_path / "r", model=model, tokenizer=tokenizer)
    lines = []
    if fits:
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lines.append)
        padding = "The tokenizer has 500 tokens: the last 12 rows of the embedding are taken for"
        assert (rows > 500) == any(line.startswith(padding) for line in lines)
        return
    said = rf"tokenizer.model has 500 tokens, but model.embed_tokens.weight of .* {rows} rows"
    with pytest.raises(ValueError, match=said):
        import_checkpoint(tmp_path / "r", tmp_path / "run", say=lines.append)
    with pytest.raises(ValueError, match=said):
        check_tokenizer(Tokenizer(tokenizer), model, tmp_path / "r")
    assert siblings(tmp_path) == ["r"]


def test_files_beside_the_weights(tmp_path, tokenizer):
    model = releases.tiny_model(vocab_size=500)
    releases.make_release(tmp_path / "r", model=model, tokenizer=tokenizer, chat=True)
    added = tmp_path / "r" / "added_tokens.json"
    added.write_text('{"<pad>": 125696, "<mine>": 4}')
    lines = []
    import_checkpoint(tmp_path / "r", tmp_path / "run", say=lines.append)
    assert "added_tokens.json: <pad> = 125696 is ignored; the embedding ends at 499." in lines
    assert "added_tokens.json: <mine> = 4 is ignored; tokenizer.model rules." in lines
    for file, said in [("added_tokens.json", "JSON"), ("generation_config.json", "JSON")]:
        kept = (tmp_path / "r" / file).read_text()
        (tmp_path / "r" / file).write_text("{")
        with pytest.raises(ValueError, match=rf"r/{file} is not readable as {said}"):
            import_checkpoint(tmp_path / "r", tmp_path / "other", say=lines.append)
        (tmp_path / "r" / file).write_text(kept)
    (tmp_path / "r" / "tokenizer.model").write_text("no tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer.model \(12 bytes\) is not a SentencePiece"):
        import_checkpoint(tmp_path / "r", tmp_path / "other", say=lines.append)
    (tmp_path / "r" / "tokenizer.model").unlink()
    import_checkpoint(tmp_path / "r", tmp_path / "bare", say=lines.append)
    assert any("the run has no tokenizer, only weights" in line for line in lines)
    assert siblings(tmp_path) == ["bare", "r", "run"]


def test_the_real_tokenizer_fits_the_released_vocabulary(tmp_path):
    path = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "baichuan2.model"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    model = releases.tiny_model(vocab_size=125_696, hidden_size=32, num_heads=2)
    fields = {"model": model, "tokenizer": path, "z_loss_weight": None, "chat": True}
    releases.make_release(tmp_path / "r", **fields)
    release = import_checkpoint(tmp_path / "r", tmp_path / "run", say=lambda _: None)
    assert release.version == 2 and release.config.model.norm_head
    generation = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert (generation["user_token_id"], generation["assistant_token_id"]) == (195, 196)
