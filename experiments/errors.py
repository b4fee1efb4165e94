"""What a user can set right is told in one line."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator

from absl import app

from baichuan_jax.config import Config
from baichuan_jax.training.checkpoint import CheckpointError
from baichuan_jax.training.loop import NonFiniteError


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the command with exit code 1 and the message alone.

    With BAICHUAN_JAX_TRACEBACK in the environment, the traceback is shown, too.
    """
    try:
        yield
    except (ValueError, OSError, CheckpointError, NonFiniteError) as error:
        if "BAICHUAN_JAX_TRACEBACK" in os.environ:
            raise
        sys.exit(f"{type(error).__name__}: {error}")


def parse_flags(argv: list[str], config: type = Config, default: str = "") -> list[str]:
    """As absl does, with --config first, wherever it stands, and with `default` where it is absent.

    A field that the config lacks is refused with those that it has.
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
    sys.argv = [argv[0], *given, *rest]  # where ml_collections looks for the fields
    return app.parse_flags_with_usage(sys.argv)
