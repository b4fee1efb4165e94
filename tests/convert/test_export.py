"""What other programs read of our checkpoints."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from baichuan_jax.config import Config, MeshConfig, to_json
from baichuan_jax.convert import layout, weights
from baichuan_jax.convert.export import engine_warnings, export_checkpoint
from baichuan_jax.convert.hugging_face import import_checkpoint, read_model
from baichuan_jax.convert.release import read_config
from baichuan_jax.model.position import rope
from baichuan_jax.parallel import zero
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.checkpoint import CheckpointError, Checkpoints
from configs import baichuan1_7b, baichuan1_13b, baichuan2_7b, baichuan2_13b
from tests.convert import releases
from tests.convert.test_hugging_face import one_device, our_logits, released_logits, siblings


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return releases.make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model")


def make_run(directory: Path, *, save_on=(1, 1, 1), tokenizer: Path | None = None, **model):
    """A run as training leaves it, at step 5; returns its config and model."""
    config = Config()
    config.model = releases.tiny_model(**model)
    config.data.sequence_length = 256
    directory.mkdir()
    (directory / "config.json").write_text(to_json(config))
    if tokenizer is not None:
        (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    mesh = make_mesh(MeshConfig(*save_on), jax.devices()[: int(np.prod(save_on))])
    abstract, rng = layout.abstract_model(config.model), np.random.default_rng(0)
    model = jax.tree.map(
        lambda x, sharding: jax.device_put(
            0.2 * rng.standard_normal(x.shape, np.float32) + 0.1, sharding
        ),
        abstract,
        zero.shardings(abstract, mesh),
    )
    state = {"model": model, "step": jnp.int32(5)}
    with Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(5, state, {}, tokens=5)
    return config, state["model"]


FORMS = [
    {"version": 1, "files": "bin", "shards": 2},
    {"version": 2, "shards": 2},
    {"version": 1, "position": "alibi", "dtype": "float16"},
    {"version": 2, "position": "alibi", "files": "bin", "dtype": "float32"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**10, 50_000])
def test_import_and_export_give_the_same_bits(tmp_path, form, max_shard_bytes):
    tensors = releases.make_release(tmp_path / "r", chat=True, **form)
    import_checkpoint(tmp_path / "r", tmp_path / "run", version=form["version"], say=quiet)
    export_checkpoint(
        tmp_path / "run",
        tmp_path / "back",
        raw_head=True,
        max_shard_bytes=max_shard_bytes,
        say=quiet,
    )
    found = read_config(tmp_path / "back").tensors
    assert found.keys() == {name for name in tensors if "inv_freq" not in name}
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert tensor.read().tobytes() == tensors[name].tobytes(), name
    # Its config is read as the release's was, and needs no flag.
    first = read_config(tmp_path / "r", version=form["version"]).config
    assert read_config(tmp_path / "back").config == first
    there = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert there == json.loads((tmp_path / "r" / "generation_config.json").read_text())
    shards = list((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) == 1 if max_shard_bytes == 10**10 else len(shards) > 2


def test_the_files_are_what_the_library_reads(tmp_path):
    tensors = releases.make_release(tmp_path / "r", dtype="float32", version=1)
    for layer in range(3):  # of mixed dtypes, in odd places
        name = f"model.layers.{layer}.input_layernorm.weight"
        tensors[name] = tensors[name].astype("bfloat16")
    releases.write_weights(tmp_path / "r", tensors)
    import_checkpoint(tmp_path / "r", tmp_path / "run", version=1, say=quiet)
    export_checkpoint(tmp_path / "run", tmp_path / "back", max_shard_bytes=100_000, say=quiet)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    total = 0
    for path in (tmp_path / "back").glob("*.safetensors"):
        for name, x in load_file(path).items():
            assert x.dtype == tensors[name].dtype
            np.testing.assert_array_equal(x, tensors[name])
            assert index["weight_map"].pop(name) == path.name
            total += x.nbytes
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
    assert not index["weight_map"] and index["metadata"]["total_size"] == total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_written_normalised(tmp_path, dtype):
    tensors = releases.make_release(tmp_path / "r", dtype=dtype, position="alibi")
    import_checkpoint(tmp_path / "r", tmp_path / "run", say=quiet)
    export_checkpoint(tmp_path / "run", tmp_path / "back", say=quiet)
    head = load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"]
    raw = tensors["lm_head.weight"].astype(np.float64)
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    precision = {"float32": 1e-7, "bfloat16": 2**-8}[dtype]  # of one rounding
    np.testing.assert_allclose(head.astype(np.float64), expected, atol=2e-8, rtol=precision * 1.01)
    assert head.dtype == dtype


def test_without_norm_head_the_head_is_left_alone(tmp_path):
    tensors = releases.make_release(tmp_path / "r", version=1)
    import_checkpoint(tmp_path / "r", tmp_path / "run", version=1, say=quiet)
    export_checkpoint(tmp_path / "run", tmp_path / "back", say=quiet)
    head = load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"]
    assert head.tobytes() == tensors["lm_head.weight"].tobytes()


@pytest.mark.parametrize("save_on", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("form", ["baichuan", "llama"])
def test_a_trained_run_is_exported(tmp_path, tokenizer, save_on, form):
    """Saved on any mesh; its logits come back, computed from the files by other code."""
    config, model = make_run(tmp_path / "run", save_on=save_on, vocab_size=500, tokenizer=tokenizer)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", layout=form, say=quiet)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (500, 64)  # no padding rows
    tokens = np.random.default_rng(1).integers(0, 500, 16)
    ours = our_logits(model, config.model, tokens)
    folded = config.model.__class__(**vars(config.model) | {"norm_head": False})
    np.testing.assert_allclose(released_logits(tensors, folded, tokens), ours, atol=2e-5)
    release = read_config(tmp_path / "hf")
    assert release.version == 2 and release.layout == form
    assert release.config.data.sequence_length == 256
    again = read_model(release, release.config.model, one_device())
    np.testing.assert_allclose(our_logits(again, release.config.model, tokens), ours, atol=2e-5)
    fields = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert fields["add_bos_token"] is False and fields["add_eos_token"] is False
    assert fields["add_prefix_space"] is False and fields["legacy"] is False
    assert fields["pad_token"] == "<unk>" and fields["model_max_length"] == 256
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_the_dtype_is_cast_on_request(tmp_path):
    _, model = make_run(tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf", dtype="bfloat16", say=quiet)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}
    expected = np.asarray(model.embedding[...])[:200].astype(jnp.bfloat16)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], expected)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


RECIPES = {
    "Baichuan-7B": (baichuan1_7b, "BaichuanForCausalLM", "BaiChuanForCausalLM"),
    "Baichuan-13B": (baichuan1_13b, "BaichuanForCausalLM", "BaichuanForCausalLM"),
    "Baichuan2-7B": (baichuan2_7b, "BaichuanForCausalLM", "BaichuanForCausalLM"),
    "Baichuan2-13B": (baichuan2_13b, "BaichuanForCausalLM", "BaichuanForCausalLM"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_program_misreads_the_released_shapes(name):
    model = RECIPES[name][0].get_config().model
    assert engine_warnings(model, "baichuan") == []
    assert bool(engine_warnings(model, "baichuan", raw_head=True)) == model.norm_head


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"hidden_size": 2048}, ["only at width 4,096, and this has 2,048"]),
        ({"position": "alibi", "num_layers": 40}, ["take width 4,096 for RoPE, and this is ALiBi"]),
        ({"position": "alibi", "hidden_size": 5120}, ["would take this for RoPE"]),
        ({"num_layers": 40}, ["would take this for ALiBi"]),
        ({"norm_head": False}, ["this model has no NormHead"]),
        ({"rope_base": 500_000.0}, ["RoPE base of 10,000, and this has 500,000"]),
        ({"rope_scaling": "ntk", "rope_factor": 8.0}, ["base of 10,000, and this has 82,684.6"]),
        ({"rope_scaling": "yarn", "rope_factor": 8.0}, ["not scale RoPE, and this is"]),
    ],
)
def test_programs_that_would_misread_a_model_are_named(fields, said):
    model = type(releases.tiny_model())(**fields)
    warnings = engine_warnings(model, "baichuan")
    assert len(warnings) == len(said)
    for warning, part in zip(warnings, said, strict=True):
        assert part in warning
    assert engine_warnings(model, "llama") == []


@pytest.mark.parametrize(
    "fields, name",
    [
        ({}, "BaiChuanForCausalLM"),  # RoPE at another width, which vLLM reads by this name
        ({"position": "alibi"}, "BaichuanForCausalLM"),
        ({"norm_head": False}, "BaiChuanForCausalLM"),
    ],
)
def test_official_fields(tmp_path, fields, name):
    config, _ = make_run(tmp_path / "run", **fields)
    lines = []
    export_checkpoint(tmp_path / "run", tmp_path / "hf", say=lines.append)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    position, version = fields.get("position", "rope"), 2 if config.model.norm_head else 1
    expected = releases.config_fields(config.model, version, position, "baichuan", "float32")
    expected.pop("transformers_version")
    for field in ("max_position_embeddings", "model_max_length"):
        if field in expected:
            expected[field] = 256
    if version == 2:
        expected["z_loss_weight"] = config.training.max_z_weight
    assert written.items() >= (expected | {"architectures": [name]}).items()
    notes = [line for line in lines if line.startswith("Note: ")]
    assert len(notes) == len(engine_warnings(config.model, "baichuan"))


@pytest.mark.parametrize("form", ["baichuan", "llama"])
@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_the_scaling_of_rope_comes_back(tmp_path, form, scaling):
    fields = {"rope_scaling": scaling, "rope_factor": 8.0, "rope_base": 5_000.0}
    fields |= {"rope_original_length": 32, "yarn_beta_fast": 8.0} if scaling == "yarn" else {}
    config, _ = make_run(tmp_path / "run", **fields)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", layout=form, say=quiet)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert bool(written.get("rope_scaling")) == (scaling != "ntk")
    assert written["rope_theta"] > 40_000 if scaling == "ntk" else written["rope_theta"] == 5_000
    back = read_config(tmp_path / "hf").config.model
    if scaling != "ntk":
        assert {name: getattr(back, name) for name in fields} == fields
    np.testing.assert_allclose(rope(back).frequencies, rope(config.model).frequencies, rtol=1e-12)
    assert rope(back).attention_factor == rope(config.model).attention_factor


@pytest.mark.oracle
@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_transformers_scales_rope_as_we_do(tmp_path, scaling):
    import torch
    from transformers import LlamaForCausalLM

    fields = {"rope_scaling": scaling, "rope_factor": 8.0, "rope_original_length": 32}
    config, model = make_run(tmp_path / "run", **fields)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", layout="llama", say=quiet)
    tokens = np.random.default_rng(0).integers(0, 200, 200)
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs = llama(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(our_logits(model, config.model, tokens), theirs, atol=2e-4)


def test_what_cannot_be_written_is_refused(tmp_path):
    config, _ = make_run(tmp_path / "run", position="alibi")
    with pytest.raises(ValueError, match=r"--layout=llama: a Llama has RoPE, and this .* ALiBi"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", layout="llama", say=quiet)
    with pytest.raises(ValueError, match=r"--layout=gguf: should be one of baichuan, llama"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", layout="gguf", say=quiet)
    with pytest.raises(CheckpointError, match=r"00000004: there is no such folder"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", step=4, say=quiet)
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run"):
        export_checkpoint(tmp_path, tmp_path / "hf", say=quiet)
    config.model.num_layers = 4
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    with pytest.raises(ValueError, match=r"00000005: layers.attention.out has shape \(3, 6, "):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", say=quiet)
    make_run(tmp_path / "rope")
    with pytest.raises(ValueError, match=r"--raw_head --layout=llama: a Llama does not normal"):
        export_checkpoint(
            tmp_path / "rope", tmp_path / "hf", layout="llama", raw_head=True, say=quiet
        )
    assert siblings(tmp_path) == ["rope", "run"]


@pytest.mark.parametrize("bad, dtype, said", [(np.nan, "", ""), (1e38, "float16", " as float16")])
def test_bad_numbers_are_named_and_leave_nothing_behind(tmp_path, bad, dtype, said):
    tensors = releases.make_release(tmp_path / "r", dtype="float32")
    release = read_config(tmp_path / "r")
    model = release.config.model
    arrays = {
        name: weights.Array(shape, np.dtype(np.float32), shape[0])
        for name, shape in layout.our_shapes(model).items()
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(to_json(release.config))
    writer = weights.WeightsWriter(
        _epath(tmp_path / "run" / "checkpoints" / "00000000"), arrays, {}
    )
    for name, array in arrays.items():
        x = layout.read_piece(name, 0, array.shape, release.tensors, model, "baichuan", array.dtype)
        if name == "layers.mlp.down":
            x[1, 2, 3] = bad
        writer.write(name, 0, x)
    writer.close()
    with pytest.raises(
        ValueError, match=rf"00000000: layers.mlp.down{said} holds .* at \[1, 2, 3\]"
    ):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", dtype=dtype, say=quiet)
    assert siblings(tmp_path) == ["r", "run"] and len(tensors) == 24


def _epath(path: Path):
    from etils import epath

    return epath.Path(path)


@pytest.mark.oracle
@pytest.mark.parametrize("norm_head", [True, False])
def test_transformers_reads_the_llama(tmp_path, tokenizer, norm_head):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, model = make_run(
        tmp_path / "run", vocab_size=500, norm_head=norm_head, tokenizer=tokenizer
    )
    export_checkpoint(
        tmp_path / "run", tmp_path / "hf", layout="llama", max_shard_bytes=10**5, say=quiet
    )
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(0, 500, 40)
    with torch.no_grad():
        theirs = llama(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(our_logits(model, config.model, tokens), theirs, atol=1e-4)
    split = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ["hello world", " two  spaces ", "你好世界\n\nlazy dog", "3.14\t!", "𠮷 é 😀"]:
        assert split(text)["input_ids"] == Tokenizer(tokenizer).encode(text)
    # And what transformers writes comes back.
    llama.save_pretrained(tmp_path / "saved")
    release = read_config(tmp_path / "saved")
    again = read_model(release, release.config.model, one_device())
    ours = our_logits(again, release.config.model, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
