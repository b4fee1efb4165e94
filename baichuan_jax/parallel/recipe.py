"""A plan as a recipe: a Python file that `experiments.pretrain --config=FILE.py` takes."""

import copy
import dataclasses
import json
import pathlib
import re

from baichuan_jax.config import Config
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.parallel.plan import Plan

_FILE = '''"""For {machine}, as planned.

Command:
  python -m experiments.pretrain --config={path} --workdir=DIR \\
    '--config.data.sources=NAME=PATH' --config.data.tokenizer=FILE.model

Written by:
  {command}

Predicted: {gib:.1f} GiB of each device's {whole:.1f}, {seconds:.3f} s a step, {rate:,.0f} tokens/s,
{teraflops:.0f} TFLOP/s a device, MFU {mfu:.1%}. Not measured.
"""

from baichuan_jax.config import Config


def get_config() -> Config:
    config = Config()
{settings}
    return config
'''


def check(path: pathlib.Path) -> None:
    """Refuses a path that `write` must not write to.

    Raises:
      ValueError: it does not end in .py, or what is there was not written here.
    """
    if path.suffix != ".py":
        raise ValueError(f"{path} should end in .py, for --config to take it.")
    if path.exists() and not re.match('"""For .*, as planned\\.\n', path.read_text("utf-8")):
        raise ValueError(
            f"{path} is there, and the planner did not write it: name another file, or move that."
        )


def write(plan: Plan, config: Config, path: pathlib.Path, command: str) -> None:
    """Writes the config with the plan's layout, all that differs from `Config`'s defaults.

    Args:
      command: that the plan was made with, for the reader.

    Raises:
      ValueError: see `check`.
    """
    check(path)
    config = copy.deepcopy(config)
    plan.layout.apply(config)
    default, lines = Config(), []
    for section in dataclasses.fields(Config):
        mine, theirs = getattr(config, section.name), getattr(default, section.name)
        for field in dataclasses.fields(mine):
            value = getattr(mine, field.name)
            if value != getattr(theirs, field.name):
                shown = json.dumps(value) if isinstance(value, str) else repr(value)
                shown = f"{value:_}" if type(value) is int and value >= 1_000 else shown
                lines.append(f"    config.{section.name}.{field.name} = {shown}")
    machine = plan.topology
    text = _FILE.format(
        machine=f"{machine.num_devices:,} × {machine.chip.name} ({machine.name})",
        path=path,
        command=command,
        gib=float(plan.memory.peak) / GIB,
        whole=machine.chip.memory / GIB,
        seconds=float(plan.step.seconds),
        rate=plan.tokens_per_second,
        teraflops=plan.flops / 1e12,
        mfu=plan.mfu,
        settings="\n".join(lines),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
