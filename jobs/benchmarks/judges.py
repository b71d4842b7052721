"""How often a judge prefers what people preferred, by language: judges.py MODEL PAIRS.jsonl JUDGE...

PAIRS has prompt, language, chosen, rejected and id, such as shared/data/tata.jsonl (human ratings; its README
tells what to beware of). The two responses of a pair go through the stage `judge` in an order drawn by the id. A
pair is right where the chosen one's score is higher; equal scores are half right, and a pair with a response that
could not be read counts as neither. Of each language `--pairs` pairs are drawn, with prompts up to 1,200
characters and responses up to 400; `--reward` trains the head of a reward model on pairs of other tables first.

JUDGE: sampled, structured, expected_score, pairwise, reward_model; and with server, server_structured and
server_expected_score a vLLM server for MODEL, which is started here. Appends a line of JSON for each to --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
Row = dict[str, Any]
MAX_TOKENS = 160


def judge_settings(name: str, model: str, url: str, reward: Path) -> Row:
    """The recipe's section `judge` for one of the names."""
    written: Row = {"method": "sampled", "samples": 1, "max_tokens": MAX_TOKENS, "temperature": 0.7}
    how: dict[str, Row] = {
        "sampled": written,
        "structured": written | {"structured": True},
        "expected_score": {"method": "expected_score"},
        "pairwise": {"method": "pairwise", "max_tokens": MAX_TOKENS},
        "reward_model": {"method": "reward_model", "model": str(reward)},
    }
    if name.startswith("server"):
        found = how[name.removeprefix("server").removeprefix("_") or "sampled"]
        return found | {"endpoint": {"url": url, "model": "judge", "max_concurrency": 32}, "max_length": 4096}
    return how[name] | {"max_length": 4096}


def table_of_pair(row: Row) -> str:
    """The table that a pair is about, in every language."""
    report, _, table = row["id"].split("/")[0].split("-", 2)
    return f"{report}-{table}"


def drawn(rows: Sequence[Row], each: int, test: bool) -> list[Row]:
    """So many pairs of each language, of tables for the test or of the others."""
    short = [row for row in rows if len(row["prompt"]) <= 1200 and max(map(len, responses(row))) <= 400]
    by_language: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(short, key=lambda row: hashed(row["id"])):
        if (int(hashed(table_of_pair(row)), 16) % 2 == 0) == test:
            by_language[row["language"]].append(row)
    return [row for language in sorted(by_language) for row in by_language[language][:each]]


def responses(row: Row) -> tuple[str, str]:
    return row["chosen"], row["rejected"]


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def train_reward(model: str, rows: Sequence[Row], folder: Path) -> None:
    """A logistic regression on the model's last hidden state: the head of a Bradley-Terry reward model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    features = []
    for row in rows:
        for response in responses(row):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": response}]
            encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            ids = encoded["input_ids"]
            with torch.no_grad():
                features.append(classifier.model(torch.tensor([ids])).last_hidden_state[0, -1])
    both = torch.stack(features).view(len(rows), 2, -1)
    difference = both[:, 0] - both[:, 1]
    head = torch.zeros(difference.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(difference @ head).mean() + 0.01 * head.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    classifier.score.weight.data = head.detach()[None]
    classifier.config.pad_token_id = None
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    right = (difference @ head > 0).float().mean().item()
    print(json.dumps({"reward_model": "trained", "pairs": len(rows), "accuracy_on_them": round(right, 3)}))


@contextmanager
def vllm_server(model: str, log: Path, length: int = 4096) -> Iterator[str]:
    """vLLM's own server with OpenAI's interface, on loopback, for sequences up to `length` tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As `vllm serve`, which the CPU build's package lacks the metadata for.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "judge"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(length)]
    command += ["--enforce-eager", "--max-num-seqs", "32", "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", str(length)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"the server ended:\n{log.read_text(errors='replace')[-3000:]}") from None
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def measure(name: str, model: str, rows: Sequence[Row], url: str, reward: Path, folder: Path) -> Row:
    """Runs the stage on the pairs; what came of them, by language."""
    from congrad_ray.config.profile import load_profile
    from congrad_ray.config.recipe import Recipe
    from congrad_ray.config.settings import validate
    from congrad_ray.data.tables import table_of
    from congrad_ray.pipeline.runner import run_stage
    from congrad_ray.rundir.directory import RunDirectory
    from congrad_ray.stages.generate.schema import RESPONSES
    from congrad_ray.stages.judge.stage import STAGE

    recipe = validate(
        Recipe,
        {
            "name": "judges",
            "model": {"name": model, "dtype": "float32", "max_length": 4096},
            "prompts": {"languages": sorted({row["language"] for row in rows})},
            "generate": {"num_generations": 2, "max_tokens": 256},
            "judge": judge_settings(name, model, url, reward),
            "limits": {"unreadable_share": 1.0},
        },
        "judges",
    )
    run = RunDirectory.open(folder / name)
    table = []
    for row in rows:
        first = int(hashed(row["id"]), 16) % 2  # the place of the chosen one
        for kind, text in zip(("chosen", "rejected"), responses(row), strict=True):
            about = {"response_id": f"{row['id']}/{kind}", "prompt_id": row["id"], "language": row["language"]}
            about |= {"prompt": [{"role": "user", "content": row["prompt"]}], "response": text, "seed": 0}
            sample = first if kind == "chosen" else 1 - first
            table.append(about | {"sample": sample, "prompt_tokens": 0, "response_tokens": 0, "truncated": False})
    table.sort(key=lambda row: (row["prompt_id"], row["sample"]))
    source = run.stage("responses", 0)
    source.begin("responses", False, "generate")
    source.write_table("part-0.parquet", table_of(table, RESPONSES))
    source.commit("generate", 0, "responses", {}, {}, len(table), 0.0, {})
    manifest = run_stage(STAGE, recipe, load_profile("local", ["engines.max_num_seqs=32"]), run)
    scores = {row["response_id"]: row["score"] for row in run.stage("judgements", 0).read_table().to_pylist()}
    right: dict[str, list[float]] = defaultdict(list)
    ties: Counter[str] = Counter()
    for row in rows:
        chosen, rejected = (scores[f"{row['id']}/{kind}"] for kind in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            right[row["language"]].append(0.5 if chosen == rejected else float(chosen > rejected))
            ties[row["language"]] += chosen == rejected
    languages = {}
    for language, counts in manifest.counters["judgements"].items():
        of_language = right[language]
        languages[language] = {
            "pairs": sum(row["language"] == language for row in rows),
            "read": len(of_language),
            "ties": ties[language],
            "accuracy": round(sum(of_language) / len(of_language), 3) if of_language else None,
            "unreadable": counts["unreadable"],
            "judgements": counts["asked"],
        }
    every = [value for of_language in right.values() for value in of_language]
    return {
        "judge": name,
        "model": re.sub(r".*/", "", model),
        "pairs": len(rows),
        "read": len(every),
        "ties": ties.total(),
        "accuracy": round(sum(every) / len(every), 3) if every else None,
        "judgements": sum(row["judgements"] for row in languages.values()),
        "unreadable": sum(sum(row["unreadable"].values()) for row in languages.values()),
        "mean_mass": manifest.counters.get("mean_mass"),
        "seconds": round(manifest.seconds, 1),
        "tokens_read": manifest.counters["mean_prompt_tokens"],
        "tokens_written": manifest.counters["mean_output_tokens"],
        "languages": languages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("judges", nargs="+")
    parser.add_argument("--pairs", type=int, default=30, help="of each language")
    parser.add_argument("--reward", type=Path, help="folder of the reward model; made where it is not there")
    parser.add_argument("--out", type=Path, default=Path("judges-results.jsonl"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    with tempfile.TemporaryDirectory(prefix="judges-") as temporary:
        folder = Path(temporary)
        reward = arguments.reward or folder / "reward"
        if "reward_model" in arguments.judges and not (reward / "config.json").exists():
            train_reward(arguments.model, drawn(rows, 2 * arguments.pairs, test=False), reward)
        test = drawn(rows, arguments.pairs, test=True)

        def each(names: Sequence[str], url: str) -> None:
            for name in names:
                found = measure(name, arguments.model, test, url, reward, folder)
                with arguments.out.open("a") as out:
                    out.write(json.dumps(found) + "\n")
                print(json.dumps({key: value for key, value in found.items() if key != "languages"}), flush=True)

        each([name for name in arguments.judges if not name.startswith("server")], "")
        if served := [name for name in arguments.judges if name.startswith("server")]:
            with vllm_server(arguments.model, folder / "server.log") as url:
                each(served, url)


if __name__ == "__main__":
    main()
