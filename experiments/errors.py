"""What a user can set right is told in one line."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

Main = Callable[[list[str]], None]


def in_one_line() -> Callable[[Main], Main]:
    """For the `main` of a command: it ends with exit code 1 and the message alone.

    With BAICHUAN_JAX_TRACEBACK in the environment, the traceback is shown, too. Words that are no
    flags are refused: no command takes any.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: list[str]) -> None:
            with told():
                if len(argv) > 1:
                    raise ValueError(f"{argv[1]!r} is no flag: all settings are --NAME=VALUE.")
                main(argv)

        return run

    return decorate


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What `in_one_line` does, for other functions than a command's `main`."""
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
