"""In a process of its own: the peak resident memory of a sketch replica or a training worker, as JSON.

python measure.py sketch|train MODEL_FOLDER MAX_LENGTH SCRATCH_FOLDER
"""

import json
import sys
from typing import Any

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select.schema import SELECTED, TOKENS
from congrad_ray.stages.sketch.memory import PeakResidentMemory

WORKERS = 1


def recipe_for(max_length: int, **sections: object) -> Recipe:
    """Micro-batches of one pair with rows of `max_length`."""
    settings = {
        "name": "measured",
        "prompts": {"languages": ["en"]},
        "model": {"name": "measured", "dtype": "float32", "max_length": max_length},
        "generate": {"max_tokens": 1},
        "judge": {"max_tokens": 1},
        "evaluate": {"max_tokens": 1},
        "sketch": {"max_tokens_per_batch": 2 * max_length, "audit_pairs": 0},
        "train": {"batch_size": 2, "max_tokens_per_batch": 2 * max_length, "zero_stage": 2, "max_steps": 3},
    }
    return validate(Recipe, {**settings, **sections}, "measured")


def rows(source: ModelSource, max_length: int, count: int) -> list[dict[str, Any]]:
    """Pairs whose rows have `max_length` tokens, or a few less."""
    from congrad_ray.modeling.tokenization import tokenize_pair

    tokenizer = source.load_tokenizer()

    def pair(words: int, number: int) -> dict[str, Any]:
        text = " ".join(str(place % 10) for place in range(words))
        return {
            "pair_id": f"pair-{number}",
            "language": "en",
            "prompt": [{"role": "user", "content": "0"}],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": [{"role": "assistant", "content": text[::-1]}],
        }

    words = max_length
    while True:
        row = pair(words, 0)
        try:
            tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length)
        except ValueError:
            words -= 4
            continue
        return [pair(words, number) for number in range(count)]


def sketch(source: ModelSource, max_length: int) -> None:
    import pyarrow as pa

    from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica

    replica = SketchReplica(ReplicaSpec(source, recipe_for(max_length), threads=2))
    fields = [PAIRS.field(name) for name in ("pair_id", "language", "prompt", "chosen", "rejected")]
    table = replica(table_of(rows(source, max_length, 4), pa.schema(fields)))
    assert table["norm"].null_count == 0, table["failure"]


def write_selected(source: ModelSource, max_length: int, run: RunDirectory) -> None:
    """Four pairs with the log-probabilities of the model itself: training refuses another reference's."""
    import torch

    from congrad_ray.modeling.batching import collate_pairs
    from congrad_ray.modeling.logprobs import completion_logprobs
    from congrad_ray.modeling.tokenization import tokenize_pair

    tokenizer, causal = source.load_tokenizer(), source.load_model("cpu")
    selected = []
    for row in rows(source, max_length, 4):
        pair = tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length)
        with torch.no_grad():
            chosen, rejected = completion_logprobs(causal, collate_pairs([pair], 0)).tolist()
        tokens = (len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        known = dict(zip(TOKENS, tokens, strict=True))
        logps = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected, "congrad_score": 0.0}
        selected.append({**row, **known, **logps, "chosen_score": None, "rejected_score": None})
    run.write_table("selected.parquet", table_of(selected, SELECTED))


def train(source: ModelSource, max_length: int, run: RunDirectory) -> None:
    from congrad_ray.stages.train.loop import TrainingJob, train_alone

    train_alone(TrainingJob(recipe_for(max_length), source, run, run, 2))


if __name__ == "__main__":
    what, folder, length, scratch_folder = sys.argv[1:]
    model = ModelSource(folder, recipe_for(int(length)).model)
    scratch = RunDirectory.open(scratch_folder)
    if what == "train":
        write_selected(model, int(length), scratch)
    with PeakResidentMemory() as memory:
        if what == "sketch":
            sketch(model, int(length))
        else:
            train(model, int(length), scratch)
    print(json.dumps({"peak": memory.peak, "before": memory.before}))
