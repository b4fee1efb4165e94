"""Flags of commands that take a recipe: --config, and the fields that --config.* changes."""

import dataclasses
import os
import re
import runpy
import sys

from absl import app

from baichuan_jax.config import Config
from experiments.errors import told


@told()
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
