"""Time and memory of training against TRL's DPOTrainer, on a CPU: training.py MODEL PAIRS

The same model, pairs, pairs a step and threads, in float32, each in a process of its own, one after the other:

  ours              the train stage's trainer on one worker, with the reference that sketching left
  trl               DPOTrainer with its reference model
  trl-precomputed   DPOTrainer with precompute_ref_log_probs, precomputing counted
  ours-lora         as ours, training an adapter of rank 16 on all linear layers
  filter            sketch + select + train on the kept half, in one process

--measures names those to run; ratios are of the first against each of the others. PAIRS is JSONL with prompt,
chosen, rejected and language. Time and peak memory are of all that comes after the imports, loading the model
included. Prints a line of JSON for each and their ratios. Preparing runs the sketcher once over the pairs for the
reference, outside of every measure but `filter`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BATCH = 8  # pairs a step
TRL_PAIRS = 4  # pairs in one of TRL's passes: its two for a step are about what our budget of tokens makes of them


def recipe_of(arguments: argparse.Namespace) -> Any:
    from congrad_ray.config.recipe import Recipe
    from congrad_ray.config.settings import validate

    values = {
        "name": "training",
        "model": {"name": arguments.model, "dtype": "float32", "max_length": arguments.max_length},
        "prompts": {"languages": ["en"]},
        "generate": {"max_tokens": 16},
        "judge": {"max_tokens": 16},
        "evaluate": {"max_tokens": 16},
        "sketch": {"audit_pairs": 0},
        "train": {
            "learning_rate": 1e-6,
            "batch_size": BATCH,
            "warmup_ratio": 0.0,
            "lr_scheduler_type": "constant",
            "zero_stage": 0,
        },
    }
    return validate(Recipe, values, "training")


def source_of(arguments: argparse.Namespace) -> Any:
    from congrad_ray.modeling.source import ModelSource

    return ModelSource(arguments.model, recipe_of(arguments).model)


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes pairs.jsonl and selected.parquet; returns what the pairs are like."""
    from congrad_ray.modeling.tokenization import tokenize_pair

    tokenizer = source_of(arguments).load_tokenizer()
    rows = [json.loads(line) for line in Path(arguments.pairs_file).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    chosen: list[dict[str, Any]] = []
    lengths: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        messages: dict[str, Any] = {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}]
            for name in ("prompt", "chosen", "rejected")
        }
        try:
            pair = tokenize_pair(tokenizer, **messages, max_length=arguments.max_length)
        except ValueError:
            continue
        if len(pair.chosen_ids) + len(pair.rejected_ids) > arguments.max_responses:
            continue
        chosen.append({"pair_id": f"{number:06}", "language": row["language"], **messages})
        lengths.append((len(pair.prompt_ids), len(pair.chosen_ids) + len(pair.rejected_ids)))
        if len(chosen) == arguments.pairs:
            break
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    if "filter" not in arguments.measures:
        write_selected(folder, sketched(arguments, folder), [True] * len(chosen))
    count = len(chosen)
    return {
        "what": "pairs",
        "pairs": count,
        "prompt_tokens": sum(prompt for prompt, _ in lengths) / count,
        "response_tokens": sum(both for _, both in lengths) / count,
        "model": Path(arguments.model).name,
        "file": Path(arguments.pairs_file).name,
        "threads": arguments.threads,
    }


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def sketched(arguments: argparse.Namespace, folder: Path) -> Any:
    """The rows of the sketches table."""
    import pyarrow as pa

    from congrad_ray.data.tables import table_of
    from congrad_ray.stages.pair.schema import PAIRS
    from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica

    fields = [PAIRS.field(name) for name in ("pair_id", "language", "prompt", "chosen", "rejected")]
    table = table_of(read_rows(folder), pa.schema(fields))
    replica = SketchReplica(ReplicaSpec(source_of(arguments), recipe_of(arguments), threads=arguments.threads))
    found = replica(table)
    assert found["norm"].null_count == 0
    return found


def write_selected(folder: Path, found: Any, kept: list[bool]) -> None:
    from congrad_ray.data.tables import table_of
    from congrad_ray.rundir.directory import RunDirectory
    from congrad_ray.stages.select.schema import SELECTED, TOKENS

    rows = []
    known = {row["pair_id"]: row for row in found.drop_columns(["sketch"]).to_pylist()}
    for row, keep in zip(read_rows(folder), kept, strict=True):
        if keep:
            of = known[row["pair_id"]]
            more = {name: of[name] for name in TOKENS}
            logps = {"ref_chosen_logps": of["chosen_logps"], "ref_rejected_logps": of["rejected_logps"]}
            rows.append(
                {**row, **more, **logps, "congrad_score": 0.0, "chosen_score": None, "rejected_score": None}
            )
    RunDirectory.open(folder).write_table("selected.parquet", table_of(rows, SELECTED))


def ours(arguments: argparse.Namespace, folder: Path, lora: bool = False) -> dict[str, float]:
    from congrad_ray.config.training import Lora
    from congrad_ray.rundir.directory import RunDirectory
    from congrad_ray.stages.train.loop import TrainingJob, train_alone

    recipe, run = recipe_of(arguments), RunDirectory.open(folder)
    if lora:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lora": Lora()})})
    train_alone(TrainingJob(recipe, source_of(arguments), run, run, arguments.threads))
    return {}


def filtered(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Sketch, select, train on the kept half: seconds of each."""
    from congrad_ray.config.recipe import Select
    from congrad_ray.stages.select.selection import select_pairs

    started = time.monotonic()
    found = sketched(arguments, folder)
    after_sketch = time.monotonic()
    selection = select_pairs(Select(keep=0.5), found.drop_columns(["failure"]))
    kept = dict(zip(selection.scores["pair_id"].to_pylist(), selection.kept.tolist(), strict=True))
    write_selected(folder, found, [kept[row["pair_id"]] for row in read_rows(folder)])
    after_select = time.monotonic()
    ours(arguments, folder)
    return {
        "sketch_s": after_sketch - started,
        "select_s": after_select - after_sketch,
        "train_s": time.monotonic() - after_select,
        "kept": float(sum(kept.values())),
    }


def trl(arguments: argparse.Namespace, folder: Path, precompute: bool) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(arguments.threads)
    names = ("prompt", "chosen", "rejected")
    rows = Dataset.from_list([{name: row[name] for name in names} for row in read_rows(folder)])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=TRL_PAIRS,
                gradient_accumulation_steps=BATCH // TRL_PAIRS,
                max_length=arguments.max_length,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                num_train_epochs=1,
                precompute_ref_log_probs=precompute,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=source_of(arguments).load_tokenizer(),
        )
        trainer.train()
    return {}


MEASURES: dict[str, Callable[[argparse.Namespace, Path], dict[str, float]]] = {
    "ours": ours,
    "trl": lambda arguments, folder: trl(arguments, folder, False),
    "trl-precomputed": lambda arguments, folder: trl(arguments, folder, True),
    "ours-lora": lambda arguments, folder: ours(arguments, folder, lora=True),
    "filter": filtered,
}


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """One measure, in this process; prints its line."""
    import trl as _  # noqa: F401

    import congrad_ray.stages.train.loop  # noqa: F401
    from congrad_ray.stages.sketch.memory import PeakResidentMemory

    with PeakResidentMemory() as memory:
        started = time.monotonic()
        more = MEASURES[arguments.measure](arguments, folder)
        seconds = time.monotonic() - started
    line = {
        "what": arguments.measure,
        "seconds": round(seconds, 1),
        "peak_gib": round((memory.peak - memory.before) / 2**30, 3),
        **{name: round(value, 1) for name, value in more.items()},
    }
    print(json.dumps(line), flush=True)


def in_its_process(name: str, folder: str) -> dict[str, Any]:
    """Runs a measure in a process of its own, prints its line and returns it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("pairs_file", help="JSONL with prompt, chosen, rejected, language")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt with a response")
    parser.add_argument("--max-responses", type=int, default=600, help="tokens of both responses of a pair taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=["ours", "trl", "trl-precomputed"])
    parser.add_argument("--measure", choices=["prepare", *MEASURES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure == "prepare":
        print(json.dumps(prepare(arguments, arguments.folder)))
        return
    if arguments.measure:
        measure(arguments, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        in_its_process("prepare", scratch)  # what it takes is free again for the measures
        for _ in range(arguments.rounds):
            found: dict[str, dict[str, Any]] = {}
            for name in arguments.measures:
                found[name] = in_its_process(name, scratch)
            us = found[arguments.measures[0]]
            ratios = {
                f"{quantity}_of_{name}": round(us[quantity] / found[name][quantity], 3)
                for name in arguments.measures[1:]
                for quantity in ("seconds", "peak_gib")
            }
            print(json.dumps({"what": "ratios", **ratios}), flush=True)


if __name__ == "__main__":
    main()
