"""Settings: what is refused, and with which words."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from baichuan_jax import config as config_module
from baichuan_jax.config import Config, from_json, to_json, validate
from baichuan_jax.data.prepare.config import PrepareConfig
from baichuan_jax.data.prepare.stages import stages
from baichuan_jax.parallel import plan, topology

RECIPES = sorted(
    path.stem for path in Path(__file__).parents[1].glob("configs/*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_says_how_to_run_it(recipe):
    module = importlib.import_module(f"configs.{recipe}")
    config = module.get_config()
    if isinstance(config, PrepareConfig):
        config.sources = "embedded:"
        assert stages(config, epath.Path("unused"))
    else:
        validate(config)
    for word in ("paper", "Command", "Hardware", "Expected"):
        assert word in module.__doc__


@pytest.mark.parametrize("recipe", ["baichuan2_7b", "baichuan2_13b"])
def test_recipes_of_32k_tokens(recipe):
    short = importlib.import_module(f"configs.{recipe}").get_config()
    long = importlib.import_module(f"configs.{recipe}_32k").get_config()
    assert long.data.sequence_length == 32_768
    tokens = [c.data.sequence_length * c.training.batch_size for c in (short, long)]
    assert tokens[0] == tokens[1]
    if short.model.position == "alibi":
        assert long.model == short.model
    else:
        assert long.model.rope_factor * long.model.rope_original_length == 32_768
        assert long.model.rope_original_length == short.data.sequence_length
    machine = topology.parse("h100:128x8")
    assert plan.plan(long, machine, False, ["mesh.tensor=8", "training.remat=matmuls"]).fits


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("model", "num_heads", 33, "multiple of config.model.num_heads=33"),
        ("model", "position", "sinus", "'rope' or 'alibi'"),
        ("model", "num_heads", 4_096, "must be even"),
        ("model", "num_layers", 0, "config.model.num_layers=0 must be positive"),
        ("training", "micro_batches", 3, "multiple of config.training.micro_batches=3"),
        ("training", "compute_dtype", "float16", "Baichuan 2 was trained in bfloat16"),
        ("training", "remat", "some", "config.training.remat='some' must be one of"),
        ("optimizer", "warmup_steps", 200_000, "below config.training.num_steps"),
        ("optimizer", "final_learning_rate", 1.0, "between 0 and config.optimizer.learning_rate"),
        ("training", "eval_every", 0, "config.training.eval_every=0 must be positive"),
        ("training", "max_z_weight", -1.0, "must not be negative"),
        ("data", "eval_fraction", 1.5, "config.data.eval_fraction=1.5"),
        ("data", "sequence_length", -1, "config.data.sequence_length=-1 must be positive"),
        ("model", "rope_scaling", "dynamic", "'dynamic' must be one of .*'linear', 'ntk', 'yarn'"),
        ("model", "rope_scaling", "ntk", "config.model.rope_factor=1.0 must be above 1 with"),
        ("model", "rope_factor", 8.0, "does nothing without config.model.rope_scaling: one of"),
        ("model", "rope_original_length", 0, "config.model.rope_original_length=0 must be"),
        ("model", "rope_base", 1.0, "config.model.rope_base=1.0 must be above 1"),
        ("model", "yarn_beta_slow", 32.0, "yarn_beta_fast=32.0 must be above .*_slow=32.0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(section, name, value, message):
    config = Config()
    setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_alibi_is_not_scaled():
    config = Config()
    config.model.position, config.model.rope_scaling, config.model.rope_factor = "alibi", "yarn", 2
    with pytest.raises(ValueError, match="rope_scaling='yarn': ALiBi needs none"):
        validate(config)


def test_json_round_trip(tmp_path):
    config = Config()
    config.data.sources = "a=/x,b=/y"
    config.optimizer.learning_rate = 1e-3
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert from_json(path) == config
    path.write_text('{"model": {"rope_base": 500.0}}')  # of a run before there was scaling
    assert from_json(path).model.rope_scaling == ""
    path.write_text('{"model": {"depth": 3}}')
    with pytest.raises(ValueError, match=r"config.json: unknown field model.depth"):
        from_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": 3}', r"config.json: model is 3; it should be a JSON object"),
        ('{"model": {"head_size": 3}}', r"config.json: unknown field model.head_size"),
        ('{"modle": {}}', r"config.json: unknown section 'modle'"),
        ("[]", r"config.json holds a list; it should be a JSON object"),
        ("{", r"config.json is not readable as JSON"),
        ("[" * 100_000, r"config.json is not readable as JSON"),
        (
            '{"model_type": "baichuan", "num_hidden_layers": 32}',
            r"config.json is of a released checkpoint.*convert_checkpoint --from_hf=\S+ --to=DIR",
        ),
    ],
)
def test_what_is_no_config_of_a_run_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_json(tmp_path / "config.json")


def test_the_released_vocabulary_needs_no_padding():
    assert config_module.ModelConfig().padded_vocab_size == 125_696
    assert config_module.ModelConfig(vocab_size=1_000).padded_vocab_size == 1_024


def test_flags_take_several_sources_and_weights():
    flags = [
        "--config.data.sources=zh=/data/zh/*.jsonl.gz,en=/data/en",
        "--config.data.weights=zh.zh=2,en=1",
        "--config.optimizer.learning_rate=1e-3",
        "--config.model.rope_scaling=yarn",
        "--config.model.rope_factor=8",
    ]
    program = (
        "from absl import app; from ml_collections import config_flags;"
        "c = config_flags.DEFINE_config_file('config');"
        "app.run(lambda _: print(c.value.data.sources, c.value.data.weights,"
        " c.value.optimizer.learning_rate, c.value.model.rope_scaling, c.value.model.rope_factor))"
    )
    command = [sys.executable, "-c", program, "--config=configs/ladder.py:704", *flags]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == [
        *("zh=/data/zh/*.jsonl.gz,en=/data/en", "zh.zh=2,en=1", "0.001"),
        *("yarn", "8.0"),
    ]
