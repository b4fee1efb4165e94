"""Loading for inference: every released layout, runs, defaults, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from baichuan_jax.chat import chat_prompt
from baichuan_jax.config import MeshConfig
from baichuan_jax.convert.export import export_checkpoint
from baichuan_jax.convert.hugging_face import import_checkpoint
from baichuan_jax.inference import load as load_module
from baichuan_jax.inference.load import load, quantize_folder
from baichuan_jax.inference.request import Request
from tests.convert.releases import make_release, make_tokenizer, tiny_model

TEXTS = ["问：三加五等于", "Question: What is", "a"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 500)


def release(directory, tokenizer, position="rope", **options):
    heads = 4 if position == "rope" else 6
    model = tiny_model(position, vocab_size=500, hidden_size=32 * heads, num_layers=2)
    make_release(directory, position=position, model=model, tokenizer=tokenizer, **options)
    return directory


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("files", ["bin", "safetensors"])
def test_every_layout_is_imported_and_speaks_the_same(
    tmp_path, tokenizer, position, version, files
):
    """The release itself, its import, the import of its export, and quantised folders."""
    source = release(tmp_path / "hf", tokenizer, position, version=version, files=files, chat=True)
    told = {"version": version} if version == 1 else {}
    first = load(source, dtype="float32", max_length=200, **told)
    assert first.config.model.position == position and first.format.version == version
    assert first.config.model.norm_head == (version == 2)
    greedy = {"temperature": 0.0, "max_new_tokens": 8}
    texts, reply = first.generate(TEXTS, **greedy), first.chat("你好", **greedy)
    assert len(set(texts)) == 3

    run = tmp_path / "run"
    import_checkpoint(source, run, say=lambda _: None, **told)
    export_checkpoint(run, tmp_path / "again", say=lambda _: None)
    for folder in (run, tmp_path / "again"):
        model = load(folder, dtype="float32", max_length=200)
        assert model.generate(TEXTS, **greedy) == texts and model.chat("你好", **greedy) == reply
        assert model.format.version == version

    quantize_folder(run, tmp_path / "int8", "int8", dtype="float32")
    saved = load(tmp_path / "int8", dtype="float32", max_length=200)
    online = load(source, dtype="float32", max_length=200, quantize="int8", **told)
    assert saved.generate(TEXTS, **greedy) == online.generate(TEXTS, **greedy)


def test_defaults_come_from_the_folder(tmp_path, tokenizer):
    source = release(tmp_path / "hf", tokenizer, chat=True)
    model = load(source)
    assert model.defaults == model.chat_defaults
    assert dataclasses.asdict(model.defaults.sampling)["top_k"] == 5
    assert model.defaults.sampling.repetition_penalty == 1.05
    fields = json.loads((source / "generation_config.json").read_text())
    path = source / "generation_config.json"
    path.write_text(json.dumps(fields | {"top_k": None, "do_sample": False}))
    assert load(source).defaults.sampling.temperature == 0.0
    for wrong in ({"temperature": -1}, {"do_sample": "no"}, {"max_new_tokens": True}):
        path.write_text(json.dumps(fields | wrong))
        with pytest.raises(ValueError, match=f"generation_config.json: {next(iter(wrong))}"):
            load(source)
    path.unlink()
    model = load(source)
    assert model.defaults.sampling.temperature == 0.0  # a text is gone on with greedily
    assert model.chat_defaults.sampling.temperature == 0.3 and model.chat_defaults.max_new_tokens


def test_generate_and_chat_refuse_by_name(tmp_path, tokenizer):
    model = load(release(tmp_path / "hf", tokenizer), max_length=64)
    for call, message in (
        (lambda: model.generate(["a", ""]), "Prompt 1 is empty"),
        (lambda: model.generate("a", max_new_tokens=0), "max_new_tokens=0"),
        (lambda: model.generate("a", stop="ab"), "stop='ab'"),
        (lambda: model.generate("a" * 200), "max_length=64"),
        (lambda: model.generate("a", temperature=-1), "temperature=-1"),
        (lambda: model.chat([{"role": "robot", "content": "x"}]), r"messages\[0\]"),
        (lambda: model.chat("你好", max_new_tokens=-5), "max_new_tokens=-5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not model.engine.busy
    assert model.chat("你好", max_new_tokens=10_000) is not None  # what the context leaves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"cache_dtype": "float8"}, "cache_dtype='float8'"),
        ({"quantize": "int3"}, "int3"),
        ({"slots": 0}, "slots=0"),
    ],
)
def test_wrong_options_are_refused_by_name(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        load(release(tmp_path / "hf", tokenizer), **options)


def test_wrong_folders_are_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"There is no .*none"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="local disk"):
        load("gs://bucket/run")
    source = release(tmp_path / "hf", tokenizer)
    (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"hf/tokenizer.model is missing"):
        load(source)


def test_4_bits_are_split_over_as_many_devices_as_blocks_allow(monkeypatch):
    seven = tiny_model(vocab_size=125_696, hidden_size=4_096, intermediate_size=11_008)
    seven = dataclasses.replace(seven, num_heads=32)
    thirteen = dataclasses.replace(
        seven, hidden_size=5_120, intermediate_size=13_696, num_heads=40, position="alibi"
    )
    assert len(jax.devices()) == 8
    for model, kind, tensor in (
        (seven, "", 8),
        (seven, "int8", 8),
        (seven, "nf4", 4),
        (thirteen, "", 8),
        (thirteen, "int4", 2),
    ):
        mesh = load_module._default_mesh(model, kind, on_cpu=False)
        assert mesh.shape["tensor"] == tensor, (model.hidden_size, kind)


def test_streaming_gives_the_text_and_leaves_nothing_behind(tmp_path, tokenizer):
    model = load(release(tmp_path / "hf", tokenizer), dtype="float32")
    request = Request(model.tokenizer.encode("问："), 20)
    whole = model.engine.generate([request])[0].text
    assert "".join(model.stream(request)) == whole
    pieces = model.stream(request)
    next(pieces)
    pieces.close()
    assert not model.engine.busy
    assert np.isfinite(model.engine.generate([request])[0].logprobs).all()


@pytest.mark.parametrize("kind", ["", "int8", "nf4"])
def test_a_mesh_gives_the_same_text(tmp_path, tokenizer, kind):
    model = tiny_model(vocab_size=500, hidden_size=256, num_heads=4, intermediate_size=256)
    make_release(tmp_path / "hf", model=model, tokenizer=tokenizer)
    options = {"dtype": "float32", "quantize": kind, "slots": 4, "max_length": 100}
    texts = [
        load(tmp_path / "hf", mesh=mesh, **options).generate(TEXTS, max_new_tokens=12)
        for mesh in (None, MeshConfig(2, 1, 4) if kind == "" else MeshConfig(2, 2, 2))
    ]
    assert texts[0] == texts[1]


def test_the_released_tokenizer_and_vocabulary(tmp_path):
    """The real file where it is at hand; a model of its vocabulary, narrow and random."""
    file = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "baichuan2.model"
    if not file.exists():
        pytest.skip(f"{file} is not there: it is part of the release and never committed")
    model = tiny_model(vocab_size=125_696, num_layers=2)
    make_release(tmp_path / "hf", model=model, tokenizer=file, chat=True, files="bin", shards=2)
    model = load(tmp_path / "hf", max_length=256)  # no flag: the vocabulary tells the version
    assert model.format.version == 2 and (model.format.user_id, model.format.assistant_id) == (
        195,
        196,
    )
    prompt = chat_prompt(
        [{"role": "user", "content": "你好吗<reserved_107>"}], model.tokenizer, model.format, 100
    )
    assert prompt.ids[:3] == [195, 16_829, 93_122] and prompt.ids[-1] == 196
    assert prompt.ids.count(196) == 1  # a user's text is no role
    assert model.chat_defaults.sampling.top_k == 5
    first, again = (model.chat("登鹳雀楼->", max_new_tokens=12, seed=3) for _ in range(2))
    assert first == again and first
    assert model.generate("你好", max_new_tokens=8, top_p=0.9, top_k=0, temperature=1.0)
