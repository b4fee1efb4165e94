"""What a compiled program does, read from its text: collectives, overlap, the shapes of buffers.

`compiled.as_text()` is XLA's HLO after all optimisation, in the order in which it runs. Read here:

- every collective with the bytes that it brings to a device, which devices take part, and how
  often it runs (loops inside loops multiplied out);
- whether a matrix product runs while it is under way: on NVIDIA, where its start and its end are
  two instructions;
- buffers of a given shape, such as full logits.

A TPU program shows a gather in several fusions, from its start to its end, which are one here, and
a reduce-scatter as a fusion of an all-reduce. Where shards are no whole tiles it has all-reduces in
place of both, so its bytes are not those of a formula; what overlaps is not in its text.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Of what all devices of a group hold of the result together, a device receives this much.
_MOVED = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,  # the operand is n times the result
    "all-reduce": lambda n: 2 * (n - 1) / n,  # scattered, then gathered
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: n - 1.0,  # between two, or nobody sends
    "collective-broadcast": lambda n: 1.0,
}
_PRODUCT_TARGETS = re.compile(r"cublas|cudnn|gemm|matmul|triton|mosaic", re.IGNORECASE)
_NAMES_ONLY = ("parameter", "tuple", "get-tuple-element", "while")  # of buffers made elsewhere
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype)
        if bits is None:  # bf16, f8e4m3fn, s32, c64, …
            bits = int(re.match(r"[a-z]+(\d+)", self.dtype)[1])
        return math.prod(self.dims) * bits / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shapes` has one entry, or those of a tuple one after the other."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str  # all that stands behind the operands

    @property
    def op_name(self) -> str:
        """Where in the source it comes from, e.g. 'jit(train_step)/jvp()/while/body/reshard'."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> dict[str, str]:
        """Computations by the attribute that names them: body, condition, calls, to_apply, …"""
        found = dict(re.findall(r"\b(\w+)=%([\w.\-]+)", self.attributes))
        branches = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
        return found | {f"branch{i}": name for i, name in enumerate(names)}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      bytes: that one device receives in one execution. All-gather: result · (n-1)/n;
        reduce-scatter: operand · (n-1)/n; all-reduce: twice that.
      times: executions in one run of the program.
      group: one group of devices, as positions in the mesh's device order.
      overlaps: whether a matrix product, or a loop that holds one, is scheduled between its
        start and its end.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    bytes: float
    times: int
    group: tuple[int, ...]
    op_name: str
    overlaps: bool

    @property
    def total(self) -> float:
        """Bytes that one device receives in one run of the program."""
        return self.bytes * self.times

    def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
        """Mesh axes along which its group lies, e.g. ('fsdp',); {'replica': 2, …} in order."""
        places = np.unravel_index(np.array(self.group), tuple(mesh_shape.values()))
        return tuple(
            axis for axis, at in zip(mesh_shape, places, strict=True) if len(np.unique(at)) > 1
        )


class Program:
    """A compiled program's text, read.

    Raises:
      ValueError: the text has no HLO module in it.
    """

    def __init__(self, text: str):
        header = re.search(r"^HloModule .*$", text, re.MULTILINE)
        self.computations = dict(_computations(text))
        entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
        if not header or not entry:
            raise ValueError("This is no HLO text: it has no HloModule with an ENTRY computation.")
        self.entry = entry[1]
        partitions = re.search(r"\bnum_partitions=(\d+)", header[0])
        self.num_devices = int(partitions[1]) if partitions else 1

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """Executions of each computation in one run; nan inside loops of unknown length.

        Both branches of a condition count.
        """
        times = dict.fromkeys(self.computations, 0.0) | {self.entry: 1.0}
        # A computation stands before those that call it.
        for name in reversed(list(self.computations)):
            for instruction in self.computations[name] if times[name] != 0 else ():
                for attribute, callee in instruction.called.items():
                    if callee in times and attribute != "condition":
                        rounds = self._rounds(instruction) if attribute == "body" else 1
                        times[callee] += times[name] * rounds
        return times

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """All that run, in the order of the text.

        Raises:
          ValueError: one stands in a loop whose number of rounds the text does not have.
        """
        apart = self._callees("async-start") | self._callees("fusion", "all-reduce-scatter")
        fused, seen, found = self._callees("fusion"), set(), []
        for name, instructions in self.computations.items():
            if name in apart or self.times[name] == 0:
                continue
            for i, instruction in enumerate(instructions):
                if (source := self._collective(instruction)) is None:
                    continue
                if name in fused:  # TPU: one gather in several fusions, from its start to its end
                    channel = re.search(r"channel_id=(\d+)", source.attributes)
                    if channel and (channel[1] in seen or seen.add(channel[1])):
                        continue
                found.append(self._read(name, i, source))
        return tuple(found)

    def buffers(self, matches: Callable[[tuple[int, ...]], bool]) -> list[str]:
        """'name: shape' of each instruction that makes a buffer whose dimensions match.

        What is inside a fusion is in registers, not in memory, and is left out.
        """
        fused = self._callees("fusion")
        return [
            f"{instruction.name}: {shape}"
            for name, instructions in self.computations.items()
            if name not in fused
            for instruction in instructions
            if instruction.opcode not in _NAMES_ONLY
            for shape in instruction.shapes
            if matches(shape.dims)
        ]

    def _all(self) -> Iterator[Instruction]:
        return itertools.chain.from_iterable(self.computations.values())

    def _callees(self, opcode: str, part: str = "") -> set[str]:
        """Computations that such instructions call, those with `part` in their name."""
        callees = {one.called["calls"] for one in self._all() if one.opcode == opcode}
        return {name for name in callees if part in name}

    def _rounds(self, loop: Instruction) -> float:
        """Of a while loop; nan where only running it tells."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # A scan counts from 0 to a constant, the one whole number in its condition.
        condition = list(self._inside(loop.called["condition"]))
        limits = [int(x.operands[0]) for x in condition if x.opcode == "constant" and x.operands]
        compares = [x for x in condition if x.opcode == "compare"]
        if len(limits) != 1 or len(compares) != 1 or "direction=LT" not in compares[0].attributes:
            return math.nan
        return limits[0]

    def _inside(self, computation: str) -> Iterator[Instruction]:
        """Instructions of a computation and of all that it calls."""
        for instruction in self.computations.get(computation, ()):
            yield instruction
            for callee in instruction.called.values():
                yield from self._inside(callee)

    def _is_product(self, instruction: Instruction) -> bool:
        """A matrix product or an attention kernel, or what holds one."""
        inside = itertools.chain.from_iterable(map(self._inside, instruction.called.values()))
        return any(map(_is_product, itertools.chain((instruction,), inside)))

    def _collective(self, instruction: Instruction) -> Instruction | None:
        """The instruction that says kind and groups: itself, or what it starts or fuses."""
        if instruction.opcode == "async-start":
            inside = self.computations[instruction.called["calls"]]
            return next((one for one in inside if one.opcode in KINDS), None)
        if instruction.opcode == "fusion" and "all-reduce-scatter" in instruction.called["calls"]:
            inside = self.computations[instruction.called["calls"]]
            reduce = next((one for one in inside if one.opcode == "all-reduce"), None)
            return reduce and dataclasses.replace(reduce, opcode="reduce-scatter")
        return instruction if instruction.opcode.removesuffix("-start") in KINDS else None

    def _read(self, computation: str, at: int, source: Instruction) -> Collective:
        instructions, times = self.computations[computation], self.times[computation]
        start = instructions[at]
        if math.isnan(times):
            raise ValueError(f"{start.name} is in a loop, and the program does not say how long.")
        kind = source.opcode.removesuffix("-start")
        end = _end(instructions, at) if start.opcode.endswith("-start") else at
        shapes, group = instructions[end].shapes, self._group(source)
        asynchronous = '"is_sync":true' not in start.attributes
        overlaps = asynchronous and any(map(self._is_product, instructions[at + 1 : end]))
        moved = _MOVED[kind](len(group)) * sum(shape.bytes for shape in shapes)
        op_name = source.op_name or start.op_name
        return Collective(start.name, kind, shapes, moved, int(times), group, op_name, overlaps)

    def _group(self, instruction: Instruction) -> tuple[int, ...]:
        pairs = re.search(r"source_target_pairs=\{(?:\{(\d+),(\d+)\})?", instruction.attributes)
        if pairs:
            return (int(pairs[1]), int(pairs[2])) if pairs[1] else (0,)
        return first_group(instruction.attributes, self.num_devices)


def overlapped_share(collectives: Iterable[Collective]) -> float:
    """Share of the bytes, over all executions, whose collective overlaps; nan without any."""
    total = overlapped = 0.0
    for collective in collectives:
        total += collective.total
        overlapped += collective.total * collective.overlaps
    return overlapped / total if total else math.nan


def full_logits(program: Program, tokens: int, vocabulary: int, tensor: int = 1) -> list[str]:
    """Buffers with the logits of all `tokens` of a device, whole or split over `tensor`.

    A matrix of [vocabulary, D] is one, too, where D is `tokens`.
    """
    columns = (vocabulary, vocabulary // tensor)
    return program.buffers(
        lambda dims: any(n in dims and math.prod(dims) == n * tokens for n in columns)
    )


def square_attention(program: Program, time: int) -> list[str]:
    """Buffers of T × T numbers, or of so many for each row and head.

    Activations of [T, D] are such, too, where D is T.
    """
    return program.buffers(lambda dims: dims.count(time) >= 2)


def first_group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Members of the first of `replica_groups=`, in any of the three ways that XLA writes them.

    `{{0,1},{2,3}}`, where `{}` is all devices; `[2,4]<=[4,2]T(1,0)`: the numbers from 0 on as a
    4 × 2 table, transposed, read as a 2 × 4 table whose rows are the groups; `mesh['a'=2,'b'=4]
    {'b'}`: along the axes in the last braces, where `'b':(2)2` is a part of an axis, two wide with
    two parts before it.

    Raises:
      ValueError: it is written in another way.
    """
    if listed := re.search(r"\breplica_groups=\{(?:\{([\d,]*)\})?", attributes):
        return tuple(map(int, re.findall(r"\d+", listed[1] or ""))) or tuple(range(num_devices))
    if table := re.search(r"\breplica_groups=\[\d+,(\d+)\]<=(\S+?)(?:,? |,?$)", attributes):
        return tuple(_table(table[2])[: int(table[1])].tolist())
    mesh = re.search(
        r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if not mesh:
        raise ValueError(f"replica_groups are written in an unknown way: {attributes[:200]}")
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])}
    # The group of the device at the origin: on each axis, the places that its parts lead to.
    places = {name: np.zeros(1, int) for name in sizes}
    for name, before, width in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", mesh[3]):
        width = int(width or sizes[name])
        steps = np.arange(width) * (sizes[name] // (int(before or 1) * width))
        places[name] = np.add.outer(places[name], steps).reshape(-1)
    devices = _table(mesh[2] or f"[{math.prod(sizes.values())}]")
    return tuple(devices.reshape(tuple(sizes.values()))[np.ix_(*places.values())].ravel().tolist())


def _table(text: str) -> np.ndarray:
    """Device numbers of `[4,2]T(1,0)` (see `first_group`) or of `3,1,2,0`, in one row."""
    if not text.startswith("["):
        return np.array([int(x) for x in text.split(",")])
    dims, _, order = text[1:].partition("]")
    dims = [int(x) for x in dims.split(",")]
    table = np.arange(math.prod(dims)).reshape(dims)
    return (table.transpose([int(x) for x in order[2:-1].split(",")]) if order else table).ravel()


def _computations(text: str) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
    name, instructions = None, []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, instructions = header[1], []
        elif line.startswith("}") and name is not None:
            yield name, tuple(instructions)
            name = None
        elif name is not None and (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            instructions.append(_instruction(match[1], line[match.end() :]))


def _instruction(name: str, rest: str) -> Instruction:
    """From `bf16[8,4]{1,0} add(%a, %b), metadata={…}`."""
    stop = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:stop], rest[stop:].lstrip()
    opcode, _, _ = rest.partition("(")
    stop = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : stop - 1]
    shapes = tuple(
        Shape(dtype, tuple(int(x) for x in re.findall(r"\d+", dims)))
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", types)
    )
    operands = re.findall(r"%([\w.\-]+)", inside)
    if opcode == "constant" and inside.isdigit():
        operands = [inside]
    return Instruction(name, opcode, shapes, tuple(operands), rest[stop:])


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"A parenthesis is not closed: {text[:200]}")


def _end(instructions: tuple[Instruction, ...], start: int) -> int:
    """Where what starts at `start` is done; some go through updates before."""
    name = instructions[start].name
    for i in range(start + 1, len(instructions)):
        if name in instructions[i].operands:
            if instructions[i].opcode.endswith("-done"):
                return i
            if instructions[i].opcode.endswith("-update"):
                name = instructions[i].name
    raise ValueError(f"{instructions[start].name} is never done.")


def _is_product(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        return bool(target and _PRODUCT_TARGETS.search(target[1]))
    return instruction.opcode in ("dot", "convolution")
