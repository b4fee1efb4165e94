"""Machines by name: chips, how many, and what links them, with the source of every figure.

A machine is a chip (`chips.py`) and a shape: of a TPU slice the chips along each axis of its torus,
of GPUs nodes × GPUs of a node.

    v5e:16x16   v5p:8x8x16   v5p:8x8x8,slices=2   h200:1x8   a800:128x8

A machine that is not as the figures of its chip say is a file MACHINE.json. Only `chip` and `shape`
must be there; whatever else is left out is the chip's. One that has no name here is a GPU, and
needs all but `slices` and `source`. Figures are of one device, links one way:

    {"chip": "a800", "shape": [64, 8], "source": "the data sheet of the rack",
     "memory_gib": 73.6, "teraflops": 312, "memory_gb_per_s": 2039,
     "inside": {"kind": "NVLink", "gb_per_s": 200, "microseconds": 2},
     "across": {"kind": "InfiniBand", "gb_per_s": 12.5, "microseconds": 10}}
"""

import dataclasses
import difflib
import itertools
import json
import math
import pathlib
import re
import types
from collections.abc import Iterator

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS
from baichuan_jax.parallel.chips import GIB, Chip, Link, describe_shapes, known, slice_shapes

AXES = (*BATCH_AXES, TENSOR_AXIS)
MeshShape = tuple[int, int, int]  # sizes of these


@dataclasses.dataclass(frozen=True)
class Ring:
    """One level of links that a mesh axis runs over.

    Attributes:
      size: devices in it.
      bandwidth: bytes/s that a device sends, one way, in a ring over all of its links here.
      latency: seconds of each of the `size` - 1 steps of a ring. (A torus of several axes takes
        fewer steps, which are counted as so many shorter ones.)
      kind: 'NVLink', 'InfiniBand', 'ICI', 'DCN', …
    """

    size: int
    bandwidth: float
    latency: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `slices` slices of chips in `shape`.

    Attributes:
      shape: of a TPU slice: chips along each axis of the torus, (16, 16) or (8, 8, 16); of GPUs:
        (nodes, GPUs of a node).
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        return self.chip.platform

    @property
    def name(self) -> str:
        """As `parse` reads it: 'v5p:8x8x8,slices=2', 'h200:1x8'."""
        slices = f",slices={self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name}:{_x(self.shape)}{slices}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.per_chip * self.slices

    @property
    def granules(self) -> int:
        """Nodes of GPUs or slices of TPUs: slower links lie between them."""
        return self.slices if self.platform == "tpu" else self.shape[0]

    def rings(self, mesh_shape: MeshShape) -> dict[str, tuple[Ring, ...]]:
        """For each mesh axis its levels of links, from the fastest (inner) to the slowest.

        An axis of size 1 has none. On a torus a mesh axis has the bandwidth of two links for each
        torus axis that it fills and that closes to a ring, of one for each other torus axis that
        it runs along, and less where it steps over the devices of another mesh axis, which use the
        same links (jax-ml.github.io/scaling-book/sharding).

        Raises:
          ValueError: the mesh does not fit the machine; names the nearest that do.
        """
        mesh_shape = tuple(mesh_shape)
        size = math.prod(mesh_shape)
        if size != self.num_devices:
            raise ValueError(
                f"A mesh of {show(mesh_shape)} has {size} devices, {self.name} has"
                f" {self.num_devices}; {nearest(mesh_shape, self.num_devices, self.granules)}"
            )
        inner, outer = split(mesh_shape, self.granules)
        levels = self._torus(inner) if self.platform == "tpu" else self._node(inner)
        return {
            axis: rings + _ring(self.chip.across, crossing)
            for axis, rings, crossing in zip(AXES, levels, outer, strict=True)
        }

    def _node(self, inner: MeshShape) -> list[tuple[Ring, ...]]:
        return [_ring(self.chip.inside, size) for size in inner]

    def _torus(self, inner: MeshShape) -> list[tuple[Ring, ...]]:
        """Levels inside a slice, by the places where JAX's mesh puts its devices."""
        from jax.experimental import mesh_utils  # slow to import, and only a torus needs it

        x, y, z = (*self.shape, 1)[:3]
        devices = [
            types.SimpleNamespace(
                platform="tpu",
                device_kind=self.chip.kinds[0],
                coords=(i, j, k),
                core_on_chip=core,
            )
            for k, j, i, core in itertools.product(*map(range, (z, y, x, self.chip.per_chip)))
        ]
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        levels = []
        for axis, size in enumerate(inner):
            line = [(*d.coords, d.core_on_chip) for d in grid.swapaxes(0, axis)[:, 0, 0]]
            *places, cores = (sorted(set(values)) for values in zip(*line, strict=True))
            rings = _ring(self.chip.between, len(cores))
            if size > len(cores):
                rings += (self._ici(size // len(cores), places),)
            levels.append(rings)
        return levels

    def _ici(self, size: int, places: list[list[int]]) -> Ring:
        """The ring of chips that stand at `places` along each axis of the torus."""
        links, steps = 0.0, 0
        for taken, span in zip(places, (*self.shape, 1), strict=False):
            if len(taken) > 1:
                stride = taken[1] - taken[0]
                closes = len(taken) * stride == span and self._wraps(span)
                links += (2 if closes else 1) / stride
                steps += taken[-1] - taken[0]
        if math.prod(map(len, places)) != size:  # a path through the slice, no box
            links = 1.0
        link = self.chip.inside
        bandwidth = links * link.bandwidth / self.chip.per_chip
        return Ring(size, bandwidth, link.latency * steps / (size - 1), link.kind)

    def _wraps(self, span: int) -> bool:
        """Whether a torus axis of so many chips closes to a ring: 16 in two dimensions; in three
        whole cubes of 4 × 4 × 4, which optical switches link."""
        return span == 16 if len(self.shape) == 2 else min(self.shape) >= 4


def _ring(link: Link | None, size: int) -> tuple[Ring, ...]:
    return (Ring(size, link.bandwidth, link.latency, link.kind),) if size > 1 else ()


def split(mesh_shape: MeshShape, granules: int) -> tuple[MeshShape, MeshShape]:
    """The mesh inside a granule (node or slice), and across granules: outer axes cross first.

    Raises:
      ValueError: a granule would hold no whole box of the mesh; names the nearest meshes that fit.
    """
    inner, outer, left = [], [], granules
    for size in mesh_shape:
        crossing = math.gcd(size, left)
        if crossing not in (size, left):
            break
        inner.append(size // crossing)
        outer.append(crossing)
        left //= crossing
    if left > 1 or len(inner) < len(mesh_shape):
        size = math.prod(mesh_shape)
        raise ValueError(
            f"A mesh of {show(mesh_shape)} cuts nodes or slices of {size / granules:g} devices in"
            f" pieces; {nearest(mesh_shape, size, granules)}"
        )
    return tuple(inner), tuple(outer)


def nearest(wanted: MeshShape, num_devices: int, granules: int = 1) -> str:
    """The end of a message: mesh shapes that fit so many devices, those most like `wanted` first.

    Args:
      wanted: sizes; those below 1 are free.
      granules: nodes or slices, none of which may be cut in pieces.
    """
    inside, fitting = num_devices // granules, []
    for replica in divisors(num_devices):
        for fsdp in divisors(num_devices // replica):
            shape = (replica, fsdp, num_devices // replica // fsdp)
            if all(math.gcd(n, inside) in (n, inside) for n in (shape[1] * shape[2], shape[2])):
                fitting.append(shape)

    def far(shape: MeshShape) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(shape, wanted, strict=True) if b > 0)

    return "the nearest that fit: " + "; ".join(map(show, sorted(fitting, key=far)[:4])) + "."


def show(mesh_shape: MeshShape) -> str:
    """(2, 8, 1) → 'replica=2 × fsdp=8 × tensor=1'."""
    return " × ".join(f"{axis}={size}" for axis, size in zip(AXES, mesh_shape, strict=True))


def divisors(number: int) -> list[int]:
    """All of a positive number, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def parse(text: str) -> Topology:
    """A machine by its name, 'v5p:8x8x8,slices=2', or by the path of a file that describes it.

    Raises:
      ValueError: names what is not known, and the nearest that is; of a file, the field.
      FileNotFoundError: there is no such file.
    """
    if text.endswith(".json"):
        return _read(pathlib.Path(text))
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)(?:,slices=(\d+))?", text)
    if not match:
        raise ValueError(
            f"topology {text!r} should be CHIP:SHAPE[,slices=N], such as v5e:16x16, h200:1x8 or"
            f" v5p:8x8x8,slices=2, or a .json file.{_like(text.partition(':')[0])}"
        )
    name, shape, slices = match.groups()
    chip = next((chip for chip in known() if chip.name == name), None)
    if chip is None:
        raise ValueError(f"topology {text!r}: no chip is called {name!r}.{_like(name)}")
    topology = Topology(chip, tuple(map(int, shape.split("x"))), int(slices or 1))
    _check(topology, f"topology {text!r}", most_gpus=8)
    return topology


def listing() -> Iterator[str]:
    """Every chip with its figures, shapes and sources, line by line: `--topology=list`."""
    yield "Of one device (of a v7x chip there are two), links one way:"
    yield (
        f"{'chip':6}{'GiB':>8}{'TFLOP/s':>9}{'GB/s':>8}   {'inside, GB/s':16}{'across, GB/s':18}"
        "shapes"
    )
    for chip in known():
        each = " × links" if chip.platform == "tpu" else ""
        inside = f"{chip.inside.kind} {chip.inside.bandwidth / 1e9:g}{each}"
        across = f"{chip.across.kind} {chip.across.bandwidth / 1e9:g}"
        yield (
            f"{chip.name:6}{chip.memory / GIB:8.2f}{chip.flops / 1e12:9.1f}"
            f"{chip.bandwidth / 1e9:8,.0f}   {inside:16}{across:18}{describe_shapes(chip)}"
        )
    yield "Sources:"
    for chip in known():
        yield f"{chip.name:6}{chip.source}"
    yield "A machine is CHIP:SHAPE, or CHIP:SHAPE,slices=N of TPUs."
    start = "A machine that is not as"
    yield from (start + (__doc__ or "").partition(start)[2]).rstrip().splitlines()


def _like(name: str) -> str:
    names = [chip.name for chip in known()]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    near = f" Did you mean {' or '.join(close)}?" if close and name not in names else ""
    return f"{near} Known are {', '.join(names)}."


def _check(topology: Topology, where: str, most_gpus: float) -> None:
    """Refuses shapes that the chip does not come in."""
    chip, shape = topology.chip, topology.shape
    if chip.platform == "gpu":
        if topology.slices != 1:
            raise ValueError(f"{where}: GPUs have no slices; the shape is nodes × GPUs of a node.")
        if len(shape) != 2 or min(shape) < 1 or shape[1] > most_gpus:
            raise ValueError(
                f"{where}: the shape of GPUs is nodes × GPUs of a node, 8 at most, such as"
                f" {chip.name}:{max(1, math.prod(shape) // 8)}x8."
            )
        return
    if topology.slices < 1:
        raise ValueError(f"{where}: slices={topology.slices} should be 1 or more.")
    if shape in slice_shapes(chip):
        return

    def far(other: tuple[int, ...]) -> float:
        longest_first = (sorted(edges, reverse=True) for edges in (shape, other))
        pairs = itertools.zip_longest(*longest_first, fillvalue=1)
        ratios = [math.log2(max(a, 0.5) / b) for a, b in pairs]
        return 2 * abs(sum(ratios)) + sum(map(abs, ratios))  # by the number of chips and by shape

    close = sorted(slice_shapes(chip), key=far)[:4]
    raise ValueError(
        f"{where}: {chip.name} has no slice {_x(shape)}; the nearest are"
        f" {', '.join(f'{chip.name}:{_x(other)}' for other in close)}. There are"
        f" {describe_shapes(chip)}."
    )


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


_FIGURES = {  # of a machine's file: the field of `Chip`, and its unit
    "memory_gib": ("memory", GIB),
    "teraflops": ("flops", 1e12),
    "memory_gb_per_s": ("bandwidth", 1e9),
}
_LINKS = ("inside", "across")


def _read(path: pathlib.Path) -> Topology:
    """A machine by its file, as the module's docstring describes it."""
    if not path.is_file():
        raise FileNotFoundError(f"topology {path}: there is no such file.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}.") from error

    def require(right: bool, field: str, what: str) -> None:
        if not right:
            raise ValueError(f"{path}: {field} {what}.")

    def number(field: str, value, least: float) -> float:
        right = type(value) in (int, float) and math.isfinite(value) and value >= least
        require(right, field, f"is {value!r} and should be a positive number")
        return float(value)

    require(isinstance(fields, dict), "the file", "should hold a JSON object")
    _require_known(path, fields, ("chip", "shape", "slices", "source", *_FIGURES, *_LINKS))
    name, shape, slices = fields.get("chip"), fields.get("shape"), fields.get("slices", 1)
    right = isinstance(name, str) and re.fullmatch(r"[a-z0-9_-]+", name)
    require(bool(right), "chip", f"is {name!r} and should be a name in small letters, as 'a800'")
    right = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    require(right, "shape", f"is {shape!r} and should be positive integers, as [64, 8]")
    require(type(slices) is int, "slices", f"is {slices!r} and should be an integer")
    base = next((chip for chip in known() if chip.name == name), None)
    if base is None:
        for field in (*_FIGURES, *_LINKS):
            require(field in fields, field, f"is missing: {name!r} is no chip that has a name here")

    given = {"source": str(fields.get("source", path))}
    for field, (attribute, unit) in _FIGURES.items():
        if field in fields:
            given[attribute] = number(field, fields[field], least=1e-9) * unit
    for level in _LINKS:
        if level not in fields:
            continue
        link = fields[level]
        names = ("kind", "gb_per_s", "microseconds")
        right = isinstance(link, dict) and all(name in link for name in names)
        require(right, level, f"is {link!r} and should have {', '.join(names)}")
        _require_known(path, link, names)
        given[level] = Link(
            str(link["kind"]),
            number(f"{level}.gb_per_s", link["gb_per_s"], least=1e-9) * 1e9,
            number(f"{level}.microseconds", link["microseconds"], least=0) * 1e-6,
        )
    if base is None:
        chip = Chip(name=name, platform="gpu", **given)
    else:
        chip = dataclasses.replace(base, **given)
    topology = Topology(chip, tuple(shape), slices)
    _check(topology, str(path), most_gpus=math.inf)
    return topology


def _require_known(path: pathlib.Path, fields: dict, names: tuple[str, ...]) -> None:
    for field in fields:
        if field not in names:
            close = difflib.get_close_matches(field, names, n=1)
            near = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}."
            raise ValueError(f"{path}: unknown field {field!r}; {near}")
