"""A plan as a person reads it."""

from __future__ import annotations

from rich.table import Table

from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.memory import GIB
from congrad_ray.planning.plan import Plan
from congrad_ray.planning.tokens import Lengths

# Counts below a thousand are whole.
_SUFFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plan_table(plan: Plan, title: str) -> Table:
    """One row a stage and one of totals."""
    table = Table(title=title)
    for column in ("stage", "rows", "tokens", "FLOPs", "replicas", "memory: needs / has", "sequences"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for column in ("time", "cost", "on disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            short(stage.rows),
            short(stage.tokens),
            short(stage.flops),
            str(stage.replicas) if stage.needed else "",
            _memory(stage.needed and stage.needed.peak, stage.available, stage.fits),
            "" if stage.sequences is None else str(stage.sequences),
            duration(stage.seconds),
            money(stage.dollars),
            size(stage.stored),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        short(plan.total(lambda stage: stage.tokens) or 0),
        short(plan.total(lambda stage: stage.flops) or 0),
        "",
        "",
        "",
        duration(plan.total(lambda stage: stage.seconds)),
        money(plan.total(lambda stage: stage.dollars)),
        size(plan.total(lambda stage: stage.stored) or 0),
    )
    return table


def memory_table(plan: Plan) -> Table:
    """What the memory of one replica is made of, in GiB. Parts that take turns do not add up."""
    table = Table("stage", "GiB of one replica", title="memory by part")
    for stage in plan.stages:
        if stage.needed and stage.stage not in ("judge", "evaluate"):
            parts = (f"{name.replace('_', ' ')} {bytes_ / GIB:.2f}" for name, bytes_ in stage.needed.parts.items())
            table.add_row(stage.stage, ", ".join(parts))
    return table


def told_lengths(lengths: Lengths, assumptions: Assumptions) -> str:
    """The lengths and shares that everything was reckoned with."""
    source = f"measured by {', '.join(lengths.measured)} where they know" if lengths.measured else "assumed"
    return (
        f"Mean tokens ({source}): prompt {lengths.prompt:.0f}, response {lengths.response:.0f}, of a pair "
        f"{lengths.paired_response:.0f}, judgement {lengths.judgement:.0f}; pairs per prompt "
        f"{lengths.pairs_per_prompt:.2f}. Assumed share of the peak FLOP/s: prompts {assumptions.prefill_mfu:g}, "
        f"generated tokens {assumptions.decode_mfu:g}, sketching and training {assumptions.backward_mfu:g}. This is "
        "a prediction; override any assumption with --assume name=value."
    )


def short(number: float) -> str:
    """A number in three digits: 950, 12.3k, 4.56M."""
    for factor, suffix in _SUFFIXES:
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.0f}" if number else ""


def size(count: float) -> str:
    """Bytes in binary units."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count:.0f} B" if count else ""


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours; nothing where it is not known."""
    if seconds is None:
        return ""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def money(dollars: float | None) -> str:
    """US dollars; nothing where they are not known."""
    return "" if dollars is None else f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def _memory(needed: float | None, available: float | None, fits: bool) -> str:
    if needed is None:
        return ""
    has = "?" if available is None else f"{available / GIB:.1f}"
    text = f"{needed / GIB:.1f} / {has} GiB"
    return text if fits else f"[red]{text}[/red]"
