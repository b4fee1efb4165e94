"""Programs timed in turn, each in a process of its own.

A machine whose speed drifts then slows all of them alike, so that ratios hold.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable


def serve(side) -> None:
    """A worker's loop: for each line on standard input, a field of `side`, prints it as JSON.

    A field that can be called is called.
    """
    for line in sys.stdin:
        value = getattr(side, line.strip())
        print(json.dumps(value() if callable(value) else value), flush=True)


class Worker:
    """A side of a comparison, in a process of its own.

    Args:
      make: a function at the top of a module; it makes the side, in the process.
      settings: its keyword arguments, as JSON can hold them.
    """

    def __init__(self, make: Callable, settings: dict):
        code = (
            "import json, sys; from baichuan_jax import interleave;"
            f" from {make.__module__} import {make.__name__} as make;"
            " interleave.serve(make(**json.loads(sys.argv[1])))"
        )
        # Threads of OpenMP that spin after their work would slow the other side.
        quiet = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        quiet["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU has to hold all sides
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet,
        )

    def ask(self, what: str):
        """A field of the side.

        Raises:
          RuntimeError: the process has ended.
        """
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # told below
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("The benchmark's worker ended; its error stands above.")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process, if it has not ended by itself."""
        with contextlib.suppress(BrokenPipeError):  # it never read the last question
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def run(
    sides: dict[str, tuple[Callable, dict]], calls: list[str], about: list[str], rounds: int
) -> dict[str, dict]:
    """Calls each of `calls` once a round, of one side after the other.

    Args:
      sides: name to (make, settings), as `Worker` takes them.
      about: fields that are asked for once, at the end.

    Returns:
      By side: the answers to each of `calls` as a list, and the fields of `about`.

    Raises:
      RuntimeError: a worker has ended. The others are closed.
    """
    workers: dict[str, Worker] = {}
    results: dict[str, dict] = {name: {call: [] for call in calls} for name in sides}
    with contextlib.ExitStack() as stack:
        for name, (make, settings) in sides.items():
            workers[name] = Worker(make, settings)
            stack.callback(workers[name].close)
        for _ in range(rounds):
            for name, worker in workers.items():
                for call in calls:
                    results[name][call].append(worker.ask(call))
        for name, worker in workers.items():
            results[name] |= {field: worker.ask(field) for field in about}
    return results
