"""What a conversion needs of memory, by the process's own peak: never the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_jax.config import ModelConfig
from baichuan_jax.convert.layout import our_shapes, their_shapes
from tests.convert import releases

# A tiny conversion comes first, so that imports and what libraries allocate once do not count.
PEAKS = """
import json, sys
from pathlib import Path
import jax
from baichuan_jax.config import MeshConfig
from baichuan_jax.convert.export import export_checkpoint
from baichuan_jax.convert.hugging_face import import_checkpoint, read_model
from baichuan_jax.convert.release import read_config
from baichuan_jax.parallel.mesh import make_mesh

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def quiet(_):
    pass

def work(what, folder):
    if what == "import":
        import_checkpoint(folder / "release", folder / "run", say=quiet)
    elif what == "export":
        export_checkpoint(folder / "run", folder / "back", say=quiet)
    else:
        release = read_config(folder / "release")
        return read_model(release, release.config.model, make_mesh(MeshConfig()))

what, tiny, large = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
work(what, tiny)
before = peak()
kept = work(what, large)
print(json.dumps(peak() - before))
"""


def fill(directory: Path, layers: int, files: str) -> tuple[int, int]:
    """A release of random bits; returns the bytes of all, and of the largest stacked tensor."""
    model = ModelConfig(
        vocab_size=4_096,
        hidden_size=1_024,
        intermediate_size=2_816,
        num_layers=layers,
        num_heads=16,
    )
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in their_shapes(model, "baichuan").items():
        bits = rng.integers(0, 1 << 16, shape, np.uint16) & 0xBFFF  # none is infinite or NaN
        tensors[name] = bits.view("bfloat16")
    directory.mkdir(parents=True)
    releases.write_weights(directory, tensors, files, shards=2)
    fields = releases.config_fields(model, 2, "rope", "baichuan", "bfloat16")
    (directory / "config.json").write_text(json.dumps(fields))
    sizes = [2 * int(np.prod(shape)) for shape in our_shapes(model).values()]
    return sum(sizes), max(sizes)


def growth(what: str, tiny: Path, large: Path, **environment: str) -> int:
    """Bytes by which the peak grows over that of a tiny conversion."""
    run = subprocess.run(
        [sys.executable, "-c", PEAKS, what, str(tiny), str(large)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": "", **environment},
    )
    assert run.returncode == 0, run.stderr[-2_000:]
    return json.loads(run.stdout.splitlines()[-1])


def check(
    tmp_path: Path, layers: int, files: str, share: float, whats: list[str], **environment: str
) -> None:
    releases.make_release(tmp_path / "tiny" / "release")
    size, stacked = fill(tmp_path / "large" / "release", layers, files)
    assert stacked < 0.5 * size
    for what in whats:
        allowed = share * size + (size + stacked if what == "load" else 0)
        grown = growth(what, tmp_path / "tiny", tmp_path / "large", **environment)
        print(f"{what} of {size / 1e6:,.0f} MB ({files}): {grown / 1e6:,.0f} MB more at the peak")
        assert grown < allowed, what
        assert grown > size or what != "load"  # it measures something


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from /proc"
)


@needs_proc
def test_the_model_is_never_held(tmp_path):
    """Few arenas: freed memory that glibc keeps for each thread hides so small a model."""
    check(tmp_path, 8, "safetensors", 0.4, ["import"], MALLOC_ARENA_MAX="1")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_the_model_is_never_held_at_a_gigabyte(tmp_path, files):
    check(tmp_path, 40, files, 0.25, ["import", "export", "load"])
