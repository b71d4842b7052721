"""Tokens a second of the stage `generate` against vLLM alone, on a CPU: generation.py MODEL PROMPTS

The same requests with the same seeds, engine arguments and threads: first by the stage (Ray Data, its tasks,
its writing and the manifest), then by `vllm.LLM` in a process of its own; start-up is in neither. PROMPTS is JSONL
with prompt and language. With `--threads 1 2` both are done for each number. Prints a line of JSON for each, and
their ratio.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Ray's workers give way to every other process of the machine by default; vLLM alone would not.
os.environ.setdefault("RAY_worker_niceness", "0")


def by_stage(arguments: argparse.Namespace, threads: int, folder: Path) -> dict[str, Any]:
    """Runs prompts and generate; leaves what vLLM alone shall do in `folder`/requests.json."""
    from congrad_ray.config.profile import load_profile
    from congrad_ray.config.recipe import Recipe
    from congrad_ray.config.settings import validate
    from congrad_ray.modeling.source import policy
    from congrad_ray.modeling.tokenization import chat_prompt_ids
    from congrad_ray.pipeline.order import STAGES
    from congrad_ray.pipeline.runner import run_stage
    from congrad_ray.rundir.directory import RunDirectory
    from congrad_ray.runtime import notices
    from congrad_ray.runtime.engines import end_of_turn_ids
    from congrad_ray.runtime.pools import engine_spec, keeping

    notices._LOOK_EVERY = 0.1  # "vLLM is ready" is the start of the clock
    source = {"name": str(arguments.prompts)}
    recipe = validate(
        Recipe,
        {
            "name": "generation",
            "model": {"name": arguments.model, "dtype": "float32", "max_length": 1024},
            "prompts": {
                "train": source,
                "evaluation": source,
                "languages": ["en"],
                "train_per_language": arguments.requests // 2,
                "evaluation_per_language": 1,
            },
            "generate": {"num_generations": 2, "max_tokens": arguments.max_tokens},
            "evaluate": {"max_tokens": 16},
        },
        "generation",
    )
    profile = load_profile("local", [f"threads={threads}", f"engines.max_num_seqs={arguments.seqs}"])
    run = RunDirectory.open(folder / "run")
    ready: list[float] = []

    class Clock(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), file=sys.stderr, flush=True)
            if record.getMessage().startswith("vLLM is ready"):
                ready.append(time.monotonic())

    package = logging.getLogger("congrad_ray")
    package.setLevel(logging.INFO)
    package.handlers = [Clock()]
    run_stage(STAGES["prompts"], recipe, profile, run)
    with keeping():  # ending the engine is not of the stage
        run_stage(STAGES["generate"], recipe, profile, run)
        seconds = time.monotonic() - ready[0]
    rows = run.stage("responses", 0).read_table().to_pylist()
    model = policy(recipe, run, 0)
    tokenizer = model.load_tokenizer()
    spec = engine_spec(model, profile, profile.engines)
    sampling = recipe.generate
    stop = end_of_turn_ids(model, tokenizer)
    requests = [
        {
            "ids": chat_prompt_ids(tokenizer, row["prompt"]),
            "sampling": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": row["seed"],
                "stop_token_ids": stop,
            },
        }
        for row in rows
    ]
    described = {"model": model.local_path(), "engine": spec.engine_kwargs, "environment": spec.environment}
    (folder / "requests.json").write_text(json.dumps({**described, "requests": requests}))
    return _figures("congrad generate", [row["response_tokens"] for row in rows], seconds)


def alone(folder: Path) -> dict[str, Any]:
    """The same by `vllm.LLM`."""
    from vllm import LLM, EngineArgs, SamplingParams

    asked = json.loads((folder / "requests.json").read_text())
    known = {field.name for field in fields(EngineArgs)}
    llm = LLM(asked["model"], **{name: value for name, value in asked["engine"].items() if name in known})
    prompts: Any = [{"prompt_token_ids": request["ids"]} for request in asked["requests"]]
    sampling = [SamplingParams(**request["sampling"]) for request in asked["requests"]]
    start = time.monotonic()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.monotonic() - start
    return _figures("vllm.LLM", [len(output.outputs[0].token_ids) for output in outputs], seconds)


def _figures(what: str, tokens: list[int], seconds: float) -> dict[str, Any]:
    return {
        "what": what,
        "requests": len(tokens),
        "tokens": sum(tokens),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(tokens) / seconds, 1),
    }


def compare(arguments: argparse.Namespace, threads: int) -> None:
    """Both, one after the other, with this number of torch threads."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stage = by_stage(arguments, threads, folder)
        print(json.dumps({"threads": threads, **stage}), flush=True)
        import ray

        ray.shutdown()
        environment = json.loads((folder / "requests.json").read_text())["environment"]
        command = [sys.executable, __file__, arguments.model, str(arguments.prompts), "--alone", scratch]
        result = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
        )
        vllm = json.loads(result.stdout.splitlines()[-1])
        print(json.dumps({"threads": threads, **vllm}))
        ratio = stage["tokens_per_second"] / vllm["tokens_per_second"]
        print(json.dumps({"threads": threads, "ratio": round(ratio, 3)}), flush=True)


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a chat model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--seqs", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments.alone)), flush=True)
        return
    for threads in arguments.threads:
        compare(arguments, threads)


if __name__ == "__main__":
    main()
