"""What will run where, and whether it fits: pure functions of recipe, profile and what the cluster has."""

from __future__ import annotations

from dataclasses import dataclass

from congrad_ray.profile import Pool, Profile
from congrad_ray.recipe import Recipe


class DoesNotFit(ValueError):
    """The cluster can never give what a stage needs; the text has both numbers."""


@dataclass(frozen=True)
class Machine:
    """What there is to run on: CPUs and GPUs as Ray counts them, memory in GiB."""

    cpus: float
    gpus: float
    memory_gib: float
    where: str


@dataclass(frozen=True)
class StageNeed:
    """What one stage asks for. `least_*` must be there for it to move at all, `most_*` is its full pool."""

    stage: str
    rows: int
    what: str
    least_cpus: float = 0.0
    least_gpus: float = 0.0
    most_cpus: float = 0.0
    most_gpus: float = 0.0


def between(least: float, most: float) -> str:
    """'2' or '1..8'; nothing for none."""
    if not most:
        return ""
    return f"{least:g}" if least == most else f"{least:g}..{most:g}"


def _pool(stage: str, rows: int, what: str, pool: Pool, profile: Profile) -> StageNeed:
    """A pool's actors hold their CPUs all the time; reading and writing needs some beside them."""
    return StageNeed(
        stage,
        rows,
        f"{what}: {between(pool.min_actors, pool.max_actors)}",
        pool.min_actors * pool.cpus + profile.data_cpus,
        pool.min_actors * pool.gpus,
        pool.max_actors * pool.cpus + profile.data_cpus,
        pool.max_actors * pool.gpus,
    )


def needs(recipe: Recipe, profile: Profile) -> list[StageNeed]:
    """The needs of every stage of one iteration, in order. Rows are upper bounds: pairs may be fewer."""
    prompts = recipe.prompts
    train = len(prompts.languages) * prompts.train_per_language
    evaluation = (len(prompts.languages) + len(prompts.unseen_languages)) * prompts.evaluation_per_language
    responses = train * recipe.generate.num_generations
    judged = responses * (recipe.judge.samples if recipe.judge.method == "sampled" else 1)
    answers = evaluation * (2 if recipe.evaluate.sampled else 1)
    kept = round(train * recipe.select.keep)
    workers = profile.trainers
    return [
        StageNeed("prompts", train + evaluation, "this process"),
        _pool("generate", responses, "vLLM engines", profile.engines, profile),
        _pool("judge", judged, "vLLM engines", profile.engines, profile),
        StageNeed("pair", train, "this process"),
        _pool("sketch", train, "model replicas", profile.sketchers, profile),
        StageNeed("select", train, "Ray Data tasks", profile.data_cpus, 0.0, profile.data_cpus, 0.0),
        StageNeed(
            "train",
            kept * recipe.train.num_train_epochs,
            f"DeepSpeed workers: {workers.num_workers}, ZeRO {recipe.train.zero_stage}",
            *(2 * (workers.num_workers * workers.cpus, workers.num_workers * workers.gpus)),
        ),
        _pool("evaluate", 2 * answers, "vLLM engines", profile.engines, profile),
        StageNeed("report", evaluation, "this process"),
    ]


def check_fits(need: StageNeed, machine: Machine) -> None:
    """Raises DoesNotFit with numbers when the stage's smallest form can never run on `machine`.

    Without this check Ray Data waits without a word: actors that hold all CPUs starve the map tasks that feed
    them.
    """
    short = []
    if need.least_cpus > machine.cpus:
        short.append(f"{need.least_cpus:g} CPUs, there are {machine.cpus:g}")
    if need.least_gpus > machine.gpus:
        short.append(f"{need.least_gpus:g} GPUs, there are {machine.gpus:g}")
    if short:
        raise DoesNotFit(
            f"{need.stage} ({need.what}) needs at least {' and '.join(short)} ({machine.where}): lower "
            "min_actors, cpus or gpus in the profile, or use a larger cluster"
        )


def most_cpus(recipe: Recipe, profile: Profile) -> float:
    """CPUs of the hungriest stage with its full pool: what a Ray started for this run is given."""
    return max(need.most_cpus for need in needs(recipe, profile))
