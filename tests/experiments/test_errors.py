"""What commands say of flags and recipes that are wrong, in one line."""

import sys

import pytest
from absl import app

from baichuan_jax.config import Config
from baichuan_jax.data.prepare.config import PrepareConfig
from baichuan_jax.training.checkpoint import CheckpointError
from experiments.errors import in_one_line
from experiments.recipe_flags import parse_flags


def told(main, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["command", *argv])
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize("error", [ValueError, OSError, CheckpointError])
def test_errors_of_users_are_told_and_others_are_raised(error, monkeypatch):
    @in_one_line()
    def main(_):
        raise error("x=3 is wrong")

    assert told(main) == f"{error.__name__}: x=3 is wrong"
    monkeypatch.setenv("BAICHUAN_JAX_TRACEBACK", "1")
    with pytest.raises(error):
        main(["command"])


def test_errors_of_the_program_are_raised():
    @in_one_line()
    def main(_):
        raise KeyError("x")

    with pytest.raises(KeyError):
        main(["command"])


def test_words_that_are_no_flags_are_refused():
    ran = []
    main = in_one_line()(ran.append)
    assert told(main, "training.remat=full").startswith("ValueError: 'training.remat=full' is no f")
    main(["command"])
    assert ran == [["command"]]


@pytest.mark.parametrize(
    "config, said",
    [
        ("none.py", "--config=none.py: there is no such file. Recipes are in configs/."),
        ("README.md", "--config=README.md makes no Config. SyntaxError: "),
        ("configs/__init__.py", "--config=configs/__init__.py makes no Config. KeyError: 'get_co"),
        ("configs/ladder.py:7", "makes no Config. ValueError: configs/ladder.py:7: choose one of"),
        ("configs/data.py", "makes a PrepareConfig; this command takes a recipe whose get_config"),
    ],
)
def test_recipes_that_cannot_be_taken(config, said):
    assert said in told(parse_flags, f"--config={config}")


def test_fields_that_are_not_there():
    assert "there is no 'layers' among vocab_size, " in told(parse_flags, "--config.model.layers=2")
    assert "among nothing: it is a value" in told(parse_flags, "--config.data.seed.x=2")


@pytest.mark.parametrize(
    "argv, config, default, parsed",
    [
        (["--x=1", "--config=configs/ladder.py:384"], Config, "", [1, 0]),
        (["--x=1"], PrepareConfig, "configs/data.py", [None, 0]),
        (["--x=1"], Config, "", [0]),
    ],
)
def test_the_recipe_comes_first(monkeypatch, argv, config, default, parsed):
    monkeypatch.setattr(app, "parse_flags_with_usage", lambda argv: argv)
    monkeypatch.setattr(sys, "argv", ["command"])
    recipe = f"--config={default}"
    expected = ["command", *(argv[i] if i is not None else recipe for i in parsed)]
    assert parse_flags(["command", *argv], config, default) == sys.argv == expected
