"""What a user can set right is told in one line."""

import contextlib
import dataclasses
import functools
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator

from absl import app

from baichuan_jax.config import Config

Main = Callable[[list[str]], None]


def in_one_line() -> Callable[[Main], Main]:
    """For the `main` of a command: it ends with exit code 1 and the message alone.

    With BAICHUAN_JAX_TRACEBACK in the environment, the traceback is shown, too. Words that are no
    flags are refused: no command takes any.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: list[str]) -> None:
            with _told():
                if len(argv) > 1:
                    raise ValueError(f"{argv[1]!r} is no flag: all settings are --NAME=VALUE.")
                main(argv)

        return run

    return decorate


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _of_users(error) or "BAICHUAN_JAX_TRACEBACK" in os.environ:
            raise
        sys.exit(f"{type(error).__name__}: {error}")


def _of_users(error: Exception) -> bool:
    if isinstance(error, (ValueError, OSError)):
        return True
    from baichuan_jax.training.checkpoint import CheckpointError  # slow to import
    from baichuan_jax.training.loop import NonFiniteError

    return isinstance(error, (CheckpointError, NonFiniteError))


@_told()
def parse_flags(argv: list[str], config: type = Config, default: str = "") -> list[str]:
    """As absl does, with --config first, wherever it stands, and with `default` where it is absent.

    A field that the config lacks is refused with those that it has, and so is a recipe that cannot
    be read, or that is of another command.
    """
    for argument in argv[1:]:
        if flag := re.match(r"--?config\.([^=]+)", argument):
            holder, path = config(), flag[1].split(".")
            for name in path:
                fields = dataclasses.fields(holder) if dataclasses.is_dataclass(holder) else []
                known = [field.name for field in fields]
                if name not in known:
                    among = ", ".join(known) or "nothing: it is a value"
                    sys.exit(f"{flag[0]}: there is no {name!r} among {among}.")
                holder = getattr(holder, name)
    given = [argument for argument in argv[1:] if re.match("--?config=", argument)]
    rest = [argument for argument in argv[1:] if argument not in given]
    given = given or [f"--config={default}"] * bool(default and "--config" not in rest)
    for argument in given:
        _check_recipe(argument.partition("=")[2], config)
    sys.argv = [argv[0], *given, *rest]  # where ml_collections looks for the fields
    return app.parse_flags_with_usage(sys.argv)


def _check_recipe(text: str, config: type) -> None:
    path, *argument = text.split(":", 1)
    if not os.path.isfile(path):
        raise ValueError(f"--config={text}: there is no such file. Recipes are in configs/.")
    try:
        made = runpy.run_path(path)["get_config"](*argument)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--config={text} makes no {config.__name__}. {reason}") from error
    if not isinstance(made, config):
        raise ValueError(
            f"--config={text} makes a {type(made).__name__}; this command takes a recipe whose"
            f" get_config() makes a {config.__name__}."
        )
