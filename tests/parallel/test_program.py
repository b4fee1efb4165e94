"""What a compiled program's text says, by hand and on live programs with known collectives."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import MeshConfig
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.parallel.program import (
    Program,
    first_group,
    full_logits,
    overlapped_share,
    square_attention,
)

MESH = {"replica": 1, "fsdp": 4, "tensor": 2}


def stored(name: str) -> Program:
    """One of the programs beside this file; their first lines say what they are."""
    text = (pathlib.Path(__file__).parent / "programs" / f"{name}.hlo").read_text(encoding="utf-8")
    return Program(text)


def test_collectives_of_a_gpu_program():
    found = [
        (one.kind, one.axes(MESH), one.bytes, one.times, one.overlaps)
        for one in stored("gpu").collectives
    ]
    two_matrices = 2 * 512 * 512 * 2 * 3 / 4  # bfloat16, whole over `fsdp`, of four devices
    rows = 2 * 256 * 512 * 2 * 1 / 2  # to and from the other device of `tensor`
    assert found == [
        ("all-gather", ("fsdp",), two_matrices, 6, False),
        ("all-reduce", ("tensor",), rows, 6, False),
        ("all-gather", ("fsdp",), two_matrices, 6, False),
        ("reduce-scatter", ("fsdp",), two_matrices, 6, True),
        ("all-reduce", ("tensor",), rows, 6, False),
    ]


def test_share_of_bytes_that_overlaps():
    collectives = stored("gpu").collectives
    weights = [one for one in collectives if one.axes(MESH) == ("fsdp",)]
    assert overlapped_share(weights) == pytest.approx(1 / 3)
    assert overlapped_share(collectives) == pytest.approx(3 / (3 * 3 + 2))
    assert "rematted_computation" in weights[1].op_name


def test_collectives_of_a_tpu_program():
    """A gather is in three fusions, and a scatter is a fusion of an all-reduce."""
    found = [(one.kind, one.axes(MESH), one.bytes, one.times) for one in stored("tpu").collectives]
    matrix, rows = 2 * 1024 * 1024 * 3 / 4, 2 * 1024 * 1024 * 2 * 1 / 2
    assert sorted(found) == sorted(
        [
            *[("all-gather", ("fsdp",), matrix, 6)] * 4,
            *[("all-reduce", ("tensor",), rows, 6)] * 2,
            ("reduce-scatter", ("fsdp",), 2 * matrix, 6),
        ]
    )


def test_loops_without_a_count_are_read_from_their_condition():
    text = (pathlib.Path(__file__).parent / "programs" / "gpu.hlo").read_text(encoding="utf-8")
    without = Program(text.replace('"known_trip_count"', '"nothing"'))
    assert [one.times for one in without.collectives] == [6] * 5
    unknown = Program(text.replace('"known_trip_count"', '"nothing"').replace("=LT", "=NE"))
    with pytest.raises(ValueError, match="all-gather-start is in a loop"):
        _ = unknown.collectives


HEAD = "HloModule m, is_scheduled=true, num_partitions=8\n\n"
PRODUCT = """%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %b = f32[8,8] parameter(1)
  ROOT %d = f32[8,8] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""


def entry(*lines: str) -> str:
    return "ENTRY %main (x: f32[8,8]) -> f32[8,8] {\n  " + "\n  ".join(lines) + "\n}\n"


X = "%x = f32[8,8] parameter(0)"
GROUPS = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"
START = f"%s = (f32[4,8], f32[8,8]) all-gather-start(%half), {GROUPS}"


@pytest.mark.parametrize(
    ("between", "overlaps"),
    [
        ("%y = f32[8,8] fusion(%x, %x), kind=kCustom, calls=%product", True),
        ("%y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}", True),
        ('%y = f32[8,8] custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"', True),
        ('%y = f32[8,8] custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"', True),
        ("%y = f32[8,8] call(%x, %x), to_apply=%product", True),
        ("%y = f32[8,8] while(%x), condition=%never, body=%product", True),
        ('%y = f32[8,8] custom-call(%x), custom_call_target="AllocateBuffer"', False),
        ("%y = f32[8,8] add(%x, %x)", False),
    ],
)
def test_only_products_hide_a_collective(between, overlaps):
    lines = (X, "%half = f32[4,8] slice(%x)", START, between, "%e = f32[8,8] all-gather-done(%s)")
    (gather,) = Program(HEAD + PRODUCT + entry(*lines)).collectives
    assert (gather.kind, gather.bytes, gather.times) == ("all-gather", 8 * 8 * 4 / 2, 1)
    assert gather.overlaps == overlaps


def test_a_collective_that_only_looks_asynchronous_hides_nothing():
    product = "%y = f32[8,8] fusion(%x, %x), kind=kCustom, calls=%product"
    done = "%e = f32[8,8] all-gather-done(%s)"
    sync = ', backend_config={"collective_backend_config":{"is_sync":true}}'
    (gather,) = Program(HEAD + PRODUCT + entry(X, START + sync, product, done)).collectives
    assert not gather.overlaps
    after = Program(HEAD + PRODUCT + entry(X, START, done, product)).collectives
    assert not after[0].overlaps


def test_a_scatter_inside_an_asynchronous_call_counts_once():
    wrapped = (
        "%wrapped (p: f32[8,8]) -> f32[4,8] {\n"
        "  %p = f32[8,8] parameter(0)\n"
        f"  ROOT %r = f32[4,8] reduce-scatter(%p), {GROUPS}, to_apply=%add\n}}\n\n"
    )
    lines = (
        X,
        "%s = ((f32[8,8]), f32[4,8], u32[]) async-start(%x), calls=%wrapped",
        "%y = f32[8,8] fusion(%x, %x), kind=kCustom, calls=%product",
        "%u = ((f32[8,8]), f32[4,8], u32[]) async-update(%s)",
        "%e = f32[4,8] async-done(%u)",
    )
    (scatter,) = Program(HEAD + PRODUCT + wrapped + entry(*lines)).collectives
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 8 * 8 * 4 / 2)
    assert scatter.overlaps and scatter.group == (0, 1)


def test_other_kinds():
    lines = (
        X,
        "%p = (f32[8,8], f32[8,8]) collective-permute-start(%x), channel_id=1,"
        " source_target_pairs={{0,1},{1,0}}",
        "%q = f32[8,8] collective-permute-done(%p)",
        "%a = f32[8,8] all-to-all(%q), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}",
        "%b = (pred[8], s4[8]) all-reduce(%a, %a), channel_id=3, replica_groups={}",
    )
    permute, swap, reduce = Program(HEAD + entry(*lines)).collectives
    assert (permute.kind, permute.bytes, permute.group) == ("collective-permute", 256, (0, 1))
    assert (swap.kind, swap.bytes) == ("all-to-all", 256 * 3 / 4)
    assert (reduce.bytes, len(reduce.group)) == (2 * (8 + 4) * 7 / 8, 8)


def test_a_permute_in_which_nobody_sends():
    lines = (X, "%p = f32[8,8] collective-permute(%x), channel_id=1, source_target_pairs={}")
    (permute,) = Program(HEAD + entry(*lines)).collectives
    assert (permute.kind, permute.bytes, permute.group) == ("collective-permute", 0, (0,))
    assert permute.axes(MESH) == ()


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("{{0,2},{1,3}}, to_apply=%add", (0, 2)),
        ("{}, to_apply=%add", tuple(range(8))),
        ("[4,2]<=[8], dimensions={0}", (0, 1)),
        ("[2,4]<=[4,2]T(1,0), dimensions={0}", (0, 2, 4, 6)),
        ("[1,8]<=[8]", tuple(range(8))),
        ("mesh['a'=2,'b'=4] {'b'}, dimensions={0}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}, dimensions={0}", (0, 4)),
        ("mesh[a=2,b=4] {a,b}", tuple(range(8))),
        ("mesh['a'=2,'b'=4] {'b':(1)2}, dimensions={0}", (0, 2)),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}, dimensions={0}", (0, 1, 4, 5)),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", (3, 2)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
    ],
)
def test_groups_are_written_in_three_ways(text, group):
    assert first_group(f"channel_id=1, replica_groups={text}", num_devices=8) == group


def test_an_unknown_way_and_other_texts_are_refused():
    with pytest.raises(ValueError, match="unknown way: , replica_groups=<0>"):
        first_group(", replica_groups=<0>", 8)
    with pytest.raises(ValueError, match="no HLO text"):
        Program("module @jit_step { }")


def compiled(function, *arguments, mesh) -> Program:
    with jax.set_mesh(mesh):
        return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_live_programs_over_eight_devices():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shape = {axis: mesh.shape[axis] for axis in mesh.axis_names}

    def argument(*spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)

    def gather(w):
        def body(x, _):
            return jnp.sin(
                jax.reshard(jax.reshard(x, P("tensor", None)), P("tensor", "fsdp"))
            ), None

        return jax.lax.scan(body, w, length=5)[0]

    found = compiled(gather, argument("tensor", "fsdp"), mesh=mesh).collectives
    assert [(c.kind, c.axes(shape), c.bytes, c.times) for c in found] == [
        ("all-gather", ("fsdp",), 32 * 32 * 4 / 2, 5)
    ]

    def total(w):
        return jnp.sum(w, axis=0)

    (found,) = compiled(total, argument(("replica", "tensor"), None), mesh=mesh).collectives
    assert (found.kind, found.axes(shape)) == ("all-reduce", ("replica", "tensor"))
    assert (found.bytes, found.times) == (2 * 32 * 4 * 3 / 4, 1)
    assert not found.overlaps


def test_full_logits_and_square_attention_are_found():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    rows = NamedSharding(mesh, P("fsdp", None, None))
    x = jax.ShapeDtypeStruct((8, 48, 16), jnp.float32, sharding=rows)
    table = jax.ShapeDtypeStruct((640, 16), jnp.float32, sharding=NamedSharding(mesh, P()))

    def loss(x, table):
        return jnp.sum(jax.nn.logsumexp(jnp.einsum("btd,vd->btv", x, table), axis=-1))

    def in_chunks(x, table):
        parts = jnp.moveaxis(jnp.reshape(x, (8, 4, 12, 16), out_sharding=P("fsdp")), 1, 0)
        return jnp.sum(jax.lax.map(lambda part: loss(part, table), parts))

    def attend(x, table):
        weights = jnp.exp(jnp.einsum("btd,bsd->bts", x, x))
        return jnp.einsum("bts,bsd->btd", jnp.cumsum(weights, axis=1), x)

    whole = compiled(loss, x, table, mesh=mesh)
    assert any(
        "f32[1,48,640]" in one or "f32[48,640]" in one for one in full_logits(whole, 48, 640)
    )
    assert not full_logits(whole, 96, 640) and not square_attention(whole, 48)
    split = full_logits(whole, 48, 1280, tensor=2)
    assert split == full_logits(whole, 48, 640)
    assert not full_logits(compiled(in_chunks, x, table, mesh=mesh), 48, 640)
    assert square_attention(compiled(attend, x, table, mesh=mesh), 48)
