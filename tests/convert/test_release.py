"""What a release is taken for, and why; and what is refused."""

import json
import re

import numpy as np
import pytest

from baichuan_jax.convert.release import is_release, read_config
from baichuan_jax.convert.safetensors_file import open_safetensors
from baichuan_jax.convert.torch_file import open_torch_file
from configs import baichuan1_7b, baichuan1_13b, baichuan2_7b, baichuan2_13b
from tests.convert import releases

RELEASED = {
    "Baichuan-7B": (1, "rope", baichuan1_7b),
    "Baichuan-13B": (1, "alibi", baichuan1_13b),
    "Baichuan2-7B": (2, "rope", baichuan2_7b),
    "Baichuan2-13B": (2, "alibi", baichuan2_13b),
}


@pytest.fixture
def described(monkeypatch):
    """Makes a folder whose tensors are only described: models at their real sizes."""

    def make(directory, model, version, position, **changes):
        from baichuan_jax.convert import release
        from baichuan_jax.convert.layout import their_shapes
        from baichuan_jax.convert.stored import StoredTensor, row_major

        directory.mkdir()
        fields = releases.config_fields(model, version, position, "baichuan", "bfloat16")
        fields = {k: v for k, v in (fields | changes).items() if v is not None}
        (directory / "config.json").write_text(json.dumps(fields))
        tensors = {
            name: StoredTensor(name, directory / "x", np.dtype("bfloat16"), s, 0, row_major(s))
            for name, s in their_shapes(model, "baichuan").items()
        }
        monkeypatch.setattr(release, "open_weights", lambda _: tensors)
        return directory

    return make


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_are_recognised(tmp_path, described, name):
    version, position, recipe = RELEASED[name]
    expected = recipe.get_config().model
    release = read_config(described(tmp_path / name, expected, version, position))
    assert release.config.model == expected
    assert release.version == version
    assert release.config.data.sequence_length == 4096
    assert release.config.training.max_z_weight == 0
    text = str(release)
    assert {"rope": "RoPE: ", "alibi": "ALiBi: "}[position] in text
    assert f"Baichuan {version}, {'with' if version == 2 else 'without'} NormHead: " in text
    assert f"its vocabulary has {expected.vocab_size:,} tokens" in text


def test_class_names_decide_nothing(tmp_path, described):
    """Baichuan2-7B carries the class of the 13B."""
    model = baichuan2_7b.get_config().model
    for number, name in enumerate(["BaichuanForCausalLM", "BaiChuanForCausalLM", "Other", None]):
        architectures = [name] if name else None
        folder = described(tmp_path / str(number), model, 2, "rope", architectures=architectures)
        assert read_config(folder).config.model == model


def test_the_longer_context_of_a_later_release(tmp_path, described):
    model = baichuan2_13b.get_config().model
    folder = described(tmp_path / "v2.0", model, 2, "alibi", model_max_length=8192)
    assert read_config(folder).config.data.sequence_length == 8192


def test_the_weight_of_max_z_is_taken_over(tmp_path):
    releases.make_release(tmp_path / "r", z_loss_weight=2e-4)
    assert read_config(tmp_path / "r").config.training.max_z_weight == 2e-4


def test_inv_freq_is_evidence_and_left_out(tmp_path):
    tensors = releases.make_release(tmp_path / "r", version=1, files="bin")
    assert sum("inv_freq" in name for name in tensors) == 3
    release = read_config(tmp_path / "r", version=1)
    text = str(release)
    assert "the files hold rotary_emb.inv_freq" in text
    assert "3 rotary_emb.inv_freq tensors are left out" in text
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "r" / "config.json").write_text(json.dumps(config | {"model_max_length": 4096}))
    with pytest.raises(ValueError, match=r"config.json: .*ALiBi: .*RoPE: the files.*--position="):
        read_config(tmp_path / "r", version=1)


AMBIGUOUS = {
    "no field of positions": (
        {"max_position_embeddings": None, "model_max_length": None},
        "neither max_position_embeddings nor model_max_length",
        {"position": "rope"},
    ),
    "neither vocabulary": ({"z_loss_weight": None}, "200 tokens are of neither", {"version": 1}),
    "versions that contradict": (
        {"baichuan_version": 1},
        "Baichuan 1, without NormHead: config.json has baichuan_version; Baichuan 2, with"
        " NormHead: config.json has z_loss_weight",
        {"version": 2},
    ),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_what_is_not_clear_is_asked_for(tmp_path, kind):
    changes, said, flag = AMBIGUOUS[kind]
    releases.make_release(tmp_path / "r", **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{said}.*--{next(iter(flag))}="):
        read_config(tmp_path / "r")
    release = read_config(tmp_path / "r", **flag)
    assert f"--{next(iter(flag))} says so" in str(release)
    assert release.config.model.norm_head == (flag.get("version", 2) == 2)


def test_sizes_of_released_models_contradict_a_field(tmp_path, described):
    """Somebody gave a 13B the field of the 7B, as some engines want it."""
    model = baichuan2_13b.get_config().model
    changes = {"max_position_embeddings": 4096}
    folder = described(tmp_path / "r", model, 2, "alibi", **changes)
    with pytest.raises(ValueError, match=r"RoPE: .*ALiBi: the released models of width 5,120"):
        read_config(folder)
    assert read_config(folder, position="alibi").config.model == model
    model = baichuan1_7b.get_config().model
    folder = described(tmp_path / "s", model, 1, "rope", z_loss_weight=0)
    with pytest.raises(ValueError, match=r"has 64,000 tokens; Baichuan 2, .*--version=1"):
        read_config(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu; it should be silu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True.*no biases"),
        ({"mlp_bias": True}, "mlp_bias is True.*no biases"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; .*should be 4"),
        ({"head_dim": 32}, "head_dim is 32; .*should be 16"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it should be a JSON object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling has type 'dynamic'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters has type"),
        ({"rope_scaling": {"type": "linear"}}, "config.model.rope_factor=0.0 must be above 1"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}},
            "rope_scaling has mscale, which is not known here for 'yarn'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 0.5}},
            "config.model.yarn_beta_fast=0.5 must be above",
        ),
        ({"sliding_window": 1024}, "sliding_window is 1024"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2,147,483,647, but the files"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"baichuan_version": 3}, "baichuan_version is 3"),
        ({"model_max_length": 0}, "model_max_length is 0"),
    ],
)
def test_fields_of_other_architectures_are_refused_by_name(tmp_path, changes, said):
    fields = {"num_attention_heads": 4, "hidden_size": 64} | changes
    releases.make_release(tmp_path / "r", **fields)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/r/config.json: {said}"):
        read_config(tmp_path / "r")


def test_llamas(tmp_path):
    releases.make_release(
        tmp_path / "r",
        layout="llama",
        rope_theta=50_000.0,
        max_position_embeddings=2048,
        attention_bias=False,
    )
    release = read_config(tmp_path / "r")
    model = release.config.model
    assert (model.position, model.norm_head, model.rope_base) == ("rope", False, 50_000)
    assert release.layout == "llama" and release.config.data.sequence_length == 2048
    assert "Layout of Llama" in str(release)
    releases.make_release(
        tmp_path / "new",
        layout="llama",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    assert read_config(tmp_path / "new").config.model.rope_base == 500


YARN = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "changes, fields",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": "linear"}),
        (
            {"rope_scaling": YARN | {"beta_fast": 16, "attention_factor": None}},
            {"rope_original_length": 512, "yarn_beta_fast": 16.0},
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": 500.0}},
            {"rope_original_length": 512, "rope_base": 500.0},
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, {"rope_original_length": 4096}),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_factor": 1.0}),
    ],
)
def test_the_scaling_of_rope_is_read(tmp_path, changes, fields):
    releases.make_release(tmp_path / "r", layout="llama", **changes)
    release = read_config(tmp_path / "r")
    scaling = next(iter(changes.values()))
    fields = {"rope_factor": float(scaling["factor"])} | fields
    if scaling["factor"] > 1:
        fields = {"rope_scaling": scaling.get("rope_type", scaling.get("type"))} | fields
        assert f"RoPE is scaled {scaling['factor']} times" in str(release)
    expected = releases.tiny_model(version=1, norm_head=False, **fields)
    assert release.config.model == expected


def test_alibi_is_not_scaled(tmp_path):
    scaling = {"type": "linear", "factor": 2}
    releases.make_release(tmp_path / "r", position="alibi", rope_scaling=scaling)
    with pytest.raises(ValueError, match=r"r/config.json scales RoPE, but: ALiBi: config.json has"):
        read_config(tmp_path / "r")


def test_config_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json is missing"):
        read_config(tmp_path / "nowhere")
    releases.make_release(tmp_path / "r")
    for text, said in [
        ("{", "is not readable as JSON"),
        ("[]", "holds a list; it should be a JSON object"),
        ("[" * 100_000, "is not readable as JSON"),
    ]:
        (tmp_path / "r" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"r/config.json {said}"):
            read_config(tmp_path / "r")
    (tmp_path / "r" / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"r/config.json is not readable as JSON"):
        read_config(tmp_path / "r")


def test_a_release_and_a_run_are_told_apart(tmp_path):
    releases.make_release(tmp_path / "r")
    assert is_release(tmp_path / "r")
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert not is_release(tmp_path)
    assert not is_release(tmp_path / "nowhere")


def spoil(tensors, name, change) -> dict:
    tensors = {key: x for key, x in tensors.items() if "inv_freq" not in key}
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    return tensors


LAYER = "model.layers.1."
HALF = np.dtype("bfloat16")
BAD_TENSORS = {
    "missing": (LAYER + "mlp.up_proj.weight", None, "is in none of the files"),
    "bias": (LAYER + "self_attn.o_proj.bias", np.zeros(64, HALF), "The architecture has no bias"),
    "unknown": ("score.weight", np.zeros((1, 64), HALF), "does not belong to this architecture"),
    "another layer": (
        "model.layers.3.mlp.up_proj.weight",
        np.zeros((96, 64), HALF),
        "does not belong to this architecture with 3 layers",
    ),
    "shape": (
        LAYER + "mlp.down_proj.weight",
        np.zeros((96, 64), HALF),
        r"has shape \[96, 64\]; by config.json it should have \[64, 96\]",
    ),
    "vocabulary": (
        "lm_head.weight",
        np.zeros((256, 64), HALF),
        r"has shape \[256, 64\]; by config.json it should have \[200, 64\]",
    ),
    "both layouts": (LAYER + "self_attn.q_proj.weight", np.zeros((64, 64), HALF), "it has both"),
}


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named_with_their_file(tmp_path, kind, files):
    name, change, said = BAD_TENSORS[kind]
    tensors = releases.make_release(tmp_path / "r", files=files)
    file = next((tmp_path / "r").glob(f"*.{files}"))
    releases.write_weights(tmp_path / "r", spoil(tensors, name, change), files)
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path / "r")
    if kind == "missing":
        assert name in str(error.value) and str(tmp_path / "r") in str(error.value)
    elif kind != "both layouts":
        assert f"{file}: {name}" in str(error.value)


GOOD = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
BAD_HEADERS = {
    "too deep": b"[" * 100_000,
    "no text": b"\xff\xfe",
    "no object": b"[]",
    "infinite offset": GOOD | {"data_offsets": [0, float("inf")]},
    "three offsets": GOOD | {"data_offsets": [0, 2, 4]},
    "offset as text": GOOD | {"data_offsets": "04"},
    "fractional offset": GOOD | {"data_offsets": [0.5, 4.5]},
    "negative offset": GOOD | {"data_offsets": [-4, 0]},
    "dtype as a list": GOOD | {"dtype": ["F16"]},
    "shape as a number": GOOD | {"shape": 2},
    "negative shape": GOOD | {"shape": [-1, -2]},
    "no dtype": {"shape": [2], "data_offsets": [0, 4]},
    "a number": 3,
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_damaged_headers_are_told_with_file_and_tensor(tmp_path, kind):
    header, path = BAD_HEADERS[kind], tmp_path / "model.safetensors"
    said = "its header is damaged"
    if not isinstance(header, bytes):
        header, said = json.dumps({"w": header}).encode(), "w has a damaged description"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=rf"{path}: {said}"):
        open_safetensors(path)
    good = json.dumps({"w": GOOD}).encode()
    path.write_bytes(len(good).to_bytes(8, "little") + good + bytes(4))
    assert open_safetensors(path)["w"].read().tolist() == [0, 0]


def test_integers_are_refused(tmp_path):
    from safetensors.numpy import save_file

    tensors = releases.make_release(tmp_path / "r")
    name = LAYER + "mlp.down_proj.weight"
    save_file(
        spoil(tensors, name, np.zeros((64, 96), np.int8)), tmp_path / "r" / "model.safetensors"
    )
    with pytest.raises(ValueError, match=rf"model.safetensors: {name} has dtype int8.*Quantised"):
        read_config(tmp_path / "r")


def test_shards_that_are_missing_or_lack_a_tensor(tmp_path):
    for files in ("safetensors", "bin"):
        folder = tmp_path / files
        tensors = releases.make_release(folder, files=files, shards=3)
        assert len(read_config(folder).tensors) == len(tensors)
        shards = sorted(folder.glob(f"*-of-00003.{files}"))
        index = next(folder.glob("*.index.json"))
        shards[1].rename(folder / "kept")
        with pytest.raises(FileNotFoundError, match=rf"{shards[1]} is missing: {index.name} says"):
            read_config(folder)
        (folder / "kept").rename(shards[1])
        content = json.loads(index.read_text())
        moved = next(name for name, file in content["weight_map"].items() if file == shards[0].name)
        content["weight_map"][moved] = shards[1].name
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{shards[1]} does not hold {moved}, although"):
            read_config(folder)
        content["weight_map"][moved] = "../" + shards[1].name
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{index}: {moved} is said to be in '../"):
            read_config(folder)
        index.write_text("{}")
        with pytest.raises(ValueError, match=rf"{index} has no weight_map"):
            read_config(folder)
        index.write_text("not json")
        with pytest.raises(ValueError, match=rf"{index} is not readable as JSON"):
            read_config(folder)
        index.unlink()
        with pytest.raises(FileNotFoundError, match=r"should have weights as .* without an index"):
            read_config(folder)


def test_an_index_of_a_quantised_checkpoint_is_refused(tmp_path):
    releases.make_release(tmp_path / "r", files="bin", shards=2)
    index = tmp_path / "r" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.mlp.up_proj.weight.quant_state"
    content["weight_map"][name] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name} belongs to a quantised"):
        read_config(tmp_path / "r")


def test_safetensors_come_before_bin(tmp_path):
    releases.make_release(tmp_path / "r", files="safetensors")
    (tmp_path / "r" / "pytorch_model.bin").write_text("never read")
    file = next(iter(read_config(tmp_path / "r").tensors.values())).file
    assert file.suffix == ".safetensors"


def test_the_tests_bin_files_are_read(tmp_path):
    tensors = releases.make_release(tmp_path / "r", files="bin", dtype="float16")
    found = open_torch_file(tmp_path / "r" / "pytorch_model.bin")
    for name, x in tensors.items():
        assert found[name].read().tobytes() == x.tobytes()
