"""A plan as text: layout, memory, time, prediction, and what was assumed."""

import dataclasses
import textwrap
from collections.abc import Iterator

from baichuan_jax.config import PLACEMENTS
from baichuan_jax.parallel.chips import GIB
from baichuan_jax.parallel.layout import sizes
from baichuan_jax.parallel.memory import KINDS, MOMENTS
from baichuan_jax.parallel.plan import Plan
from baichuan_jax.parallel.topology import AXES, show


def lines(plan: Plan) -> Iterator[str]:
    """The whole plan."""
    yield from _head(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _time(plan)
    yield ""
    yield from _prediction(plan)


def _head(plan: Plan) -> Iterator[str]:
    job, layout, machine = plan.job, plan.layout, plan.topology
    whole = sizes(job.model, (1, 1, 1))
    parameters = whole.total("whole", job.shape.num_layers) + whole.gains
    links = {
        axis: " + ".join(f"{ring.size} by {ring.kind}" for ring in rings)
        for axis, rings in machine.rings(layout.mesh).items()
    }
    yield (
        f"{parameters:,} parameters, {job.rows:,} rows of {job.time:,} tokens a step, on"
        f" {machine.name}: {machine.num_devices:,} devices of"
        f" {machine.chip.memory / GIB:.1f} GiB and {machine.chip.flops / 1e12:,.0f} TFLOP/s"
    )
    yield ""
    yield f"Chosen of {plan.looked_at:,} layouts:" if plan.looked_at else "As the config says:"
    yield f"  mesh         {show(layout.mesh)}"
    for axis, text in links.items():
        if text:
            yield f"    {axis:10} {text}"
    yield (
        f"  micro-batch  {layout.micro_batches} a step, each of {layout.rows(job)} rows"
        f" ({layout.tokens(job):,} tokens) a device"
        + (f", shared by {layout.mesh[2]} over tensor" if layout.mesh[2] > 1 else "")
    )
    saved = f"  activations  {layout.remat}"
    yield saved + (f"; {layout.offload} in the host's memory" if layout.offload else "")
    yield f"  optimizer    float32 weights and moments, over all {machine.num_devices:,}"
    if layout.micro_batches > 1:
        yield f"  embedding    {_placed(plan, layout.embedding)}"
        yield f"  head         {_placed(plan, layout.head)}"
    else:
        yield "  embedding, head: gathered once a step, whatever their placement"
    start = 0
    for placement, count in zip(PLACEMENTS, layout.layers, strict=True):
        if count:
            yield f"  layers {start:3}-{start + count - 1:<3}  {_placed(plan, placement)}"
            start += count


def _placed(plan: Plan, placement: str) -> str:
    replica, fsdp, _ = plan.layout.mesh
    return {
        "replicated": "replicated (ZeRO-1): gathered once, held whole",
        "hierarchical": f"hierarchical: gathered over replica once, held over {fsdp:,} of fsdp",
        "full": f"full (ZeRO-3): held as stored, over {replica * fsdp:,}",
    }[placement]


def _memory(plan: Plan) -> Iterator[str]:
    memory, worst = plan.memory, plan.memory.worst
    yield f"Memory of a device, GiB:  {''.join(f'{moment:>12}' for moment in MOMENTS)}"
    for kind, meaning in KINDS.items():
        values = [memory.moments[moment].get(kind, 0.0) / GIB for moment in MOMENTS]
        yield f"  {kind:24}{''.join(f'{value:12.2f}' for value in values)}   {meaning}"
    totals = [sum(memory.moments[moment].values()) / GIB for moment in MOMENTS]
    yield f"  {'together':24}{''.join(f'{total:12.2f}' for total in totals)}"
    fits = "fits" if plan.fits else "does NOT fit"
    yield (
        f"  The worst is '{worst}': {float(memory.peak) / GIB:.2f} GiB, {fits} in"
        f" {plan.limit / GIB:.2f} ({plan.assumptions.margin:.0%} of"
        f" {plan.topology.chip.memory / GIB:.2f})."
    )
    if memory.host:
        yield f"  The host's memory has {memory.host / GIB:.2f} GiB for each device."


def _time(plan: Plan) -> Iterator[str]:
    step, layout = plan.step, plan.layout
    rings = plan.topology.rings(layout.mesh)
    axes = [axis for axis in AXES if rings[axis]]
    names = [f"{axis} ({rings[axis][-1].kind})" for axis in axes]
    yield (
        f"Time of one layer, ms:{'compute':>23}{''.join(f'{name:>22}' for name in names)}"
        f"{'waits':>10}{'sum':>10}"
    )
    for placement, count in zip(PLACEMENTS, layout.layers, strict=True):
        for when in ("forward", "backward") if count else ():
            phase = step.phases[placement, when]
            by_axis = "".join(f"{1e3 * (phase.links[axis]):22.3f}" for axis in axes)
            waits = phase.exposed + phase.inline
            yield (
                f"  {count:3} {placement:13}{when:10}{1e3 * phase.compute:17.3f}{by_axis}"
                f"{1e3 * waits:10.3f}{1e3 * phase.total:10.3f}"
            )
    yield (
        "  Links of all axes work at one time, behind compute; what is longer waits. Backward has"
        " what is computed again."
    )
    yield "Time of a step, ms:"
    total = float(step.seconds)
    for name, value in step.parts.items():
        if value:
            yield f"  {name:24}{1e3 * value:12,.1f}{value / total:9.1%}"
    yield f"  {'together':24}{1e3 * total:12,.1f}"
    for axis, name in zip(axes, names, strict=True):
        yield f"  links of {name:24} are busy for {step.links[axis] / total:.0%} of it"


def _prediction(plan: Plan) -> Iterator[str]:
    rate, devices = plan.tokens_per_second, plan.topology.num_devices
    yield (
        f"Predicted: {float(plan.step.seconds):.3f} s a step, {rate:,.0f} tokens/s"
        f" ({rate / devices:,.0f} a device), {plan.flops / 1e12:.0f} TFLOP/s a device, MFU"
        f" {plan.mfu:.1%}."
    )
    yield from textwrap.wrap(
        "Counted are 6 FLOPs a parameter of a matrix product and token (the head is one, the"
        " embedding is not) and 6·T·D a layer for causal attention; nothing for what is computed"
        " again. Nothing here was measured.",
        width=98,
        initial_indent="  ",
        subsequent_indent="  ",
    )
    yield "Assumed (change them by --assume=NAME=VALUE,…):"
    for field in dataclasses.fields(plan.assumptions):
        value = getattr(plan.assumptions, field.name)
        yield f"  {field.name:14}{value:<10g}{field.metadata['meaning']}"
    yield f"  {plan.topology.chip.name}: {plan.topology.chip.source}."
    yield "Settings:"
    settings = (f"--config.{name}={value}" for name, value in plan.layout.settings.items())
    yield from textwrap.wrap(
        " ".join(settings),
        width=98,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
