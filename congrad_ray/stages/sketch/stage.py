"""sketch: the gradient of every pair, count-sketched, by a Ray actor pool of model replicas."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from congrad_ray.config.loss import LossSettings
from congrad_ray.config.names import JUDGED
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsError
from congrad_ray.data.tables import MESSAGES
from congrad_ray.modeling.source import policy, policy_input
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder, RunDirectoryError
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.attempts import attempts
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.notices import heard
from congrad_ray.runtime.progress import Progress
from congrad_ray.runtime.resources import pool_demand, pool_sizes
from congrad_ray.runtime.rows import (
    MissingRows,
    PartWriter,
    follow,
    outcome_of,
    pool_arguments,
    read_missing_batches,
)
from congrad_ray.stages.base import Stage
from congrad_ray.stages.sketch.estimate import ESTIMATE, schema_of
from congrad_ray.stages.sketch.replicas import LANGUAGE_GRADIENTS, ReplicaSpec, SketchReplica, SummingReplica
from congrad_ray.stages.sketch.schema import PAIRS_PER_PART, PART_BYTES, sketches_schema
from congrad_ray.stages.view import Step, rows_by_language

if TYPE_CHECKING:
    from congrad_ray.stages.sketch.exact import LayerVectors

logger = logging.getLogger(__name__)

# About the pairs of a micro-batch. One drawn pair has its whole micro-batch audited, which then takes up to half
# as long again, so auditing a sixth of the micro-batches costs a twelfth of the time.
_PAIRS_PER_AUDIT = 8
_AUDITED_SHARE = 1 / 6
_BYTES_PER_TOKEN = 4  # of UTF-8, on the high side for text in many scripts


def run(context: Context) -> Outcome:
    """Sketches the pairs that have no sketch yet."""
    recipe, pool = context.recipe, context.profile.sketchers
    source = policy(recipe, context.run, context.iteration)
    # Report a model that is not there, or cannot chat, before actors start.
    tokenizer = source.load_tokenizer()
    device, threads = context.profile.device, context.profile.threads_of(pool)
    missing = read_missing_batches(
        context.input("pairs"), context.output, "pair_id", PAIRS_PER_PART, PART_BYTES[device]
    )
    check_judged(recipe, missing.schema.names)
    if missing.schema.field("prompt").type == MESSAGES:
        chat_prompt_ids(tokenizer, [{"role": "user", "content": "?"}])
    if missing.count:
        spec = ReplicaSpec(source, recipe, device, max(1, int(pool.gpus)), threads)
        languages = missing.languages
        exact = recipe.sketch.method == "exact"
        if exact and not context.output.exists(LANGUAGE_GRADIENTS):
            _sum_languages(context, missing, languages, spec)
        width = len(languages) if exact else recipe.sketch.width
        schema = sketches_schema(width, recipe.sketch.stored_dtype)
        parts = missing.dataset.map_batches(
            SketchReplica,
            fn_constructor_args=(spec,),
            fn_constructor_kwargs={
                "audited": None if exact else _drawn_for_audit(recipe, missing, device),
                "exact": context.output if exact else None,
                "attempts": attempts(),
                # By the replica itself: a batch is safe once it is computed and goes through no other process.
                "write": PartWriter(context.output, schema, "pair_id", _counted),
                "notify": context.notify(),
            },
            **pool_arguments(pool, context.profile, missing.batches),
        )
        follow(parts, context, missing.count)
    if not context.output.parts():
        raise RunDirectoryError(f"no pair could be sketched: {context.output.quarantine_counts()}")
    summary = _summary(context.output)
    context.output.write_json("summary.json", summary)
    if summary["audit"] is None and recipe.sketch.audit_pairs and recipe.sketch.method == "count_sketch":
        logger.info("no audit: the stage is so short that an audit would take more than a tenth of its time")
    if summary["audit"]:
        logger.info(
            "audit: cosines of {pairs} pairs differ from exact ones by {error:.4f} (root mean square), rank "
            "correlation {rank_correlation:.4f}".format(**summary["audit"])
        )
    return outcome_of(context.output, "pair_id", summary, len(missing.ids))


def check_judged(recipe: Recipe, columns: Sequence[str]) -> None:
    """Raises SettingsError where pairs with these columns cannot be weighted as the recipe has it."""
    if not recipe.train.margin_weighting:
        return
    lacking = [name for name in JUDGED if name not in columns]
    if lacking:
        raise SettingsError(
            f"train.margin_weighting needs pairs with a judge's scores; these have no {', '.join(lacking)}: "
            "set train.margin_weighting: false"
        )


def _counted(row: dict[str, Any]) -> dict[str, int]:
    prompt, responses = row["prompt_tokens"], row["chosen_tokens"] + row["rejected_tokens"]
    return {
        "congrad_tokens": prompt + responses,
        "congrad_attention_tokens": 2 * prompt + responses,
        "congrad_attention_padding": row["attention_padding"],
    }


def _drawn_for_audit(recipe: Recipe, pairs: MissingRows, device: str) -> Ids:
    """Pairs whose micro-batches are audited: as many as asked for, within a tenth of the stage's time."""
    tokens = pairs.text_bytes / _BYTES_PER_TOKEN
    batches = int(_AUDITED_SHARE * tokens / recipe.sketch.batch_tokens(device))
    count = min(len(pairs.ids), batches, math.ceil(recipe.sketch.audit_pairs / _PAIRS_PER_AUDIT))
    drawn = random.Random(recipe.sketch.seed).sample(range(len(pairs.ids)), count)
    return Ids.from_keys([pairs.ids.keys[drawn]])


def _summary(output: Folder) -> dict[str, Any]:
    """Tokens, padding and the audit, from the rows written; goes to summary.json and the manifest."""
    from congrad_ray.stages.sketch.audit import audit

    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "positions", "attention_padding")
    table = output.read_table([*names, "audit_exact", "audit_sketched"])
    prompt, chosen, rejected, positions, padding = (int(np.sum(table[name].to_numpy())) for name in names)
    audited = table.filter(table["audit_exact"].is_valid())
    found = audit(audited["audit_exact"].to_numpy(), audited["audit_sketched"].to_numpy())
    in_attention = 2 * prompt + chosen + rejected
    return {
        "prompt_tokens": prompt,
        "response_tokens": chosen + rejected,
        "positions": positions,
        "prompts_shared": positions == prompt + chosen + rejected,
        "attention_padding_share": round(padding / (padding + in_attention), 4),
        "audit": None if found is None else asdict(found),
    }


def _sum_languages(context: Context, pairs: MissingRows, languages: list[str], spec: ReplicaSpec) -> None:
    """First pass of the exact method: writes the mean of c * u of every language, whole, to the stage's folder."""
    import ray
    import torch
    from ray.util import ActorPool
    from safetensors.torch import save

    profile = context.profile
    pool = profile.sketchers
    min_actors, max_actors = pool_sizes(pool, profile, pairs.batches)
    have = ray.cluster_resources()
    fitting = [int((have.get("CPU", 0) - profile.data_cpus) // pool.cpus)]
    if pool.gpus:
        fitting.append(int(have.get("GPU", 0) // pool.gpus))
    count = max(min_actors, min(max_actors, *fitting))
    replica: Any = ray.remote(SummingReplica).options(
        num_cpus=pool.cpus, num_gpus=pool.gpus or None, memory=pool.memory_bytes, resources=pool.resources or None
    )
    actors = [replica.remote(spec, languages, context.notify()) for _ in range(count)]
    logger.info("first of two passes: the languages' gradients")
    progress = Progress(pairs.count)
    tables: Any = pairs.dataset.iter_batches(batch_format="pyarrow", batch_size=None)
    with heard(context.notify()):
        for rows in ActorPool(actors).map_unordered(lambda actor, table: actor.add.remote(table), tables):
            progress.add(rows)
            context.progressed()
    sums: LayerVectors = {}
    counts = np.zeros(len(languages))
    for actor in actors:
        part, of_part = ray.get(actor.sums.remote())
        for name, values in part.items():
            sums[name] = sums[name] + values if name in sums else values
        counts += of_part
        ray.kill(actor)
    scales = torch.tensor(1.0 / np.maximum(counts, 1.0), dtype=torch.float32)[:, None, None]
    means = {name: (values * scales).contiguous() for name, values in sums.items()}
    if not all(bool(values.isfinite().all()) for values in means.values()):
        raise RunDirectoryError(
            "the exact gradients hold values that are not finite. Try model.dtype: float32, or sketch.method: "
            "count_sketch, which quarantines the pairs that cause them"
        )
    context.output.write_bytes(LANGUAGE_GRADIENTS, save(means))


def _settings(recipe: Recipe, iteration: int) -> Any:
    excluded = {"max_tokens_per_batch", "audit_pairs", "parameters"}
    sketch = recipe.sketch.model_dump(mode="json", exclude=excluded)
    # What earlier versions recorded of DPO, which is what the other settings of the loss add nothing to.
    sketch["average_log_prob"] = False
    train = recipe.train
    names = {field.name for field in fields(LossSettings)} - {"beta", "length_penalty"}
    rest = train.model_dump(mode="json", include=names)
    adapter = recipe.sketched_adapter
    if adapter is not None:
        # What the adapter's first numbers and its gradients depend on.
        rest["lora"] = adapter.model_dump(mode="json", exclude={"lora_dropout", "merge"})
        rest["seed"] = train.seed
    found = [recipe.model.model_dump(mode="json"), sketch, train.beta, train.length_penalty]
    return [*found, rest] if rest else found


STAGE = Stage(
    name="sketch",
    folder="sketches",
    summary="Count-sketch every pair's gradient on a pool of model replicas",
    example="sketch.width=65536",
    inputs=lambda iteration: [("pairs", iteration), *policy_input(iteration)],
    settings=_settings,
    run=run,
    demand=lambda recipe, profile: pool_demand(
        "sketch", rows_of(recipe).training, "model replicas", "sketchers", profile
    ),
    schema=schema_of,
    estimate=ESTIMATE,
    step=Step("sketched", "sketched", "of pairs", rows_by_language, "pairs"),
    parts=("",),
)
