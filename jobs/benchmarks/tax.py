"""Is the tax of a model that was damaged in some languages seen in these languages, and only there?

Damaged are the languages of some scripts: the rows of the embedding whose tokens have letters of a script change
places among themselves. Both models are measured by the stage `benchmark` on XCOPA, from a local file: by accuracy
and by the log-probability of the right answer, which says far more with few questions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import prompt_id, table_of
from congrad_ray.pipeline.order import STAGES
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.logs import configure
from congrad_ray.stages.prompts.schema import PROMPTS

_UTILS = """
def process_results(doc, results):
    likelihoods = [likelihood for likelihood, _ in results]
    right = doc["label"]
    return {"acc": float(likelihoods[right] == max(likelihoods)), "right_logprob": likelihoods[right]}
"""


def local_xcopa(file: Path, folder: Path, languages: list[str]) -> None:
    """The harness' own tasks of XCOPA on rows of a file, one question a line."""
    import lm_eval.tasks

    own = Path(str(lm_eval.tasks.__file__)).parent / "xcopa"
    rows: dict[str, list[str]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        rows[json.loads(line)["language"]].append(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(_UTILS)
    for language in languages:
        data = folder / f"{language}.jsonl"
        data.write_text("\n".join(rows[language]) + "\n", encoding="utf-8")
        (folder / f"xcopa_{language}.yaml").write_text(
            f"include: {own}/default_{language}.yaml\n"
            f"task: xcopa_{language}\n"
            "dataset_path: json\n"
            "dataset_name: null\n"
            "validation_split: null\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "process_results: !function utils.process_results\n"
            "metric_list:\n"
            "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "  - {metric: right_logprob, aggregation: mean, higher_is_better: true}\n"
        )


def damaged(model: str, scripts: list[str], folder: Path) -> dict[str, int]:
    """Writes the model with rows of its embedding exchanged; returns how many tokens each script has."""
    import regex
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = loaded.get_input_embeddings().weight
    texts = tokenizer.batch_decode([[token] for token in range(len(weights))])
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for script in scripts:
        letters = regex.compile(rf"\p{{Script={script}}}")
        rows = torch.tensor([token for token, text in enumerate(texts) if letters.search(text)])
        with torch.no_grad():
            weights[rows] = weights[rows[torch.randperm(len(rows), generator=generator)]]
        counts[script] = len(rows)
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return counts


def run_directory(folder: Path, model: str, scripts: list[str]) -> RunDirectory:
    """A run whose first iteration has trained the damaged model."""
    run = RunDirectory.open(folder / "run")
    prompts, policy = run.stage("prompts", None), run.stage("policy", 0)
    if prompts.manifest() is None:
        messages = [{"role": "user", "content": "?"}]
        row = {"prompt_id": prompt_id("en", messages), "language": "en", "prompt": messages, "split": "train"}
        prompts.begin("none", False, "prompts")
        prompts.write_table("part-0.parquet", table_of([row | {"seen": True, "task": None}], PROMPTS))
        prompts.commit("prompts", None, "none", {}, {}, 1, 0.0, {})
    if policy.manifest() is None:
        policy.begin("damaged", False, "train")
        print(damaged(model, scripts, Path(policy.path)), flush=True)
        policy.commit("train", 0, "damaged", {}, {}, 1, 0.0, {})
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("xcopa", type=Path, help="XCOPA as JSON Lines")
    parser.add_argument("folder", type=Path, help="where tasks, damaged model and results go")
    parser.add_argument("--scripts", nargs="+", default=["Thai", "Han"], help="scripts that are damaged")
    parser.add_argument("--languages", nargs="+", default=["et", "id", "it", "th", "vi", "zh"])
    parser.add_argument("--limit", type=int, help="questions of each language")
    parser.add_argument("--threads", type=int, help="of torch, in the engine")
    arguments = parser.parse_args()
    configure()
    tasks = arguments.folder / "tasks"
    local_xcopa(arguments.xcopa, tasks, arguments.languages)
    recipe = validate(
        Recipe,
        {
            "name": "tax",
            "model": {"name": arguments.model, "dtype": "float32", "max_length": 256},
            "prompts": {"languages": ["en"]},
            "generate": {"max_tokens": 16},
            "judge": {"max_tokens": 16},
            "evaluate": {"max_tokens": 16, "judge_max_tokens": 16},
            "benchmark": {
                "tasks": [f"xcopa_{language}" for language in arguments.languages],
                "include_path": str(tasks.resolve()),
                "limit": arguments.limit,
            },
        },
        "the recipe of this benchmark",
    )
    run = run_directory(arguments.folder, arguments.model, arguments.scripts)
    profile = load_profile("local", [] if arguments.threads is None else [f"threads={arguments.threads}"])
    run_stage(STAGES["benchmark"], recipe, profile, run)
    for row in run.stage("benchmarks", 0).read_json("summary.json")["changes"]:
        print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}))


if __name__ == "__main__":
    main()
