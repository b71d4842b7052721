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
    """What every stage works through, takes and leaves: one row a stage and one of totals."""
    table = Table(title=title)
    for column in ("stage", "rows", "tokens", "FLOPs", "time", "cost", "on disk"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            short(stage.rows),
            short(stage.tokens),
            short(stage.flops),
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
        duration(plan.total(lambda stage: stage.seconds)),
        money(plan.total(lambda stage: stage.dollars)),
        size(plan.total(lambda stage: stage.stored) or 0),
    )
    return table


def memory_table(plan: Plan) -> Table:
    """The replicas of every stage and the memory of one, by part; parts that take turns do not add up.

    So many of them as `fit` run at once; `sequences` of mean length find room in an engine's KV cache.
    """
    table = Table(title="one replica, GiB")
    for column in ("stage", "runs as", "fit", "needs", "has", "sequences", "made of"):
        table.add_column(column, justify="left" if column in ("stage", "runs as", "made of") else "right")
    for stage in plan.stages:
        if stage.needed is None:
            continue
        parts = (f"{name.replace('_', ' ')} {_gib(part)}" for name, part in stage.needed.parts.items())
        needs = _gib(stage.needed.peak)
        table.add_row(
            stage.stage,
            stage.what,
            str(stage.replicas),
            needs if stage.fits else f"[red]{needs}[/red]",
            "?" if stage.available is None else _gib(stage.available),
            "" if stage.sequences is None else str(stage.sequences),
            ", ".join(parts),
        )
    return table


def told_lengths(lengths: Lengths, assumptions: Assumptions) -> str:
    """The lengths and shares that everything was reckoned with."""
    source = f"measured by {', '.join(lengths.measured)} where they know" if lengths.measured else "assumed"
    return (
        f"Mean tokens ({source}): prompt {lengths.prompt:.0f}, response {lengths.response:.0f}, of a pair "
        f"{lengths.paired_response:.0f}, judgement {lengths.judgement:.0f}; pairs per prompt "
        f"{lengths.pairs_per_prompt:.2f}. Assumed share of the peak FLOP/s: prompts {assumptions.prefill_mfu:g}, "
        f"generated tokens {assumptions.decode_mfu:g}, sketching and training {assumptions.backward_mfu:g}. This "
        "is a prediction; override any assumption with --assume name=value."
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


def _gib(count: float) -> str:
    gib = count / GIB
    return f"{gib:.1f}" if gib >= 10 or not gib else f"{gib:.2f}"
