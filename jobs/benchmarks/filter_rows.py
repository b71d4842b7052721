"""Reading and writing the rows of `congrad filter` at length: seconds, and the process's memory at its most.

    python jobs/benchmarks/filter_rows.py make --rows 1000000
    python jobs/benchmarks/filter_rows.py measure --rows 1000000 --out filter-rows-results.jsonl

`make` writes chats of about 2 KB to --folder, as JSON Lines. `measure` does each step in a process of its own:
reading all rows to the table of pairs, writing every second row as selected.parquet, and as each trainer reads it.
What lies between, sketching and selecting, is in scaling.py and selection.py.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from congrad_ray.config.names import ExportFormat
from congrad_ray.config.recipe import Source
from congrad_ray.data.exports.card import ExportFacts
from congrad_ray.data.exports.write import ExportedRow, Rows, write_export
from congrad_ray.data.own_rows import write_own_rows
from congrad_ray.data.preferences import preference_of
from congrad_ray.pipeline.preferences import Reading, read_preferences

LANGUAGES = ("en", "de", "fr", "es", "ru", "zh", "ar", "sw")
WORDS = ("river", "Straße", "café", "ciudad", "слово", "城市", "مدينة", "kitabu")
FACTS = ExportFacts("model", ["rows.jsonl"], "top 50%", "pcgrad", {"en": (2, 1)}, 2048, "benchmark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure", *STEPS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "filter-rows-benchmark")
    parser.add_argument("--out", type=Path, help="add a line of JSON for each step to this file")
    arguments = parser.parse_args()
    folder: Path = arguments.folder / str(arguments.rows)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "make":
        make(folder, arguments.rows)
    elif arguments.what != "measure":
        start = time.monotonic()
        STEPS[arguments.what](folder)
        found = {
            "step": arguments.what,
            "rows": arguments.rows,
            "seconds": round(time.monotonic() - start, 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        print(json.dumps(found))
    else:
        for step in STEPS:
            command = [sys.executable, __file__, step, *sys.argv[2:]]
            line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(line + "\n")


def make(folder: Path, rows: int) -> None:
    random.seed(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            answers = [" ".join(random.choices(WORDS, k=110)) for _ in range(2)]
            messages = [[{"role": "assistant", "content": f"{answer} {number}"}] for answer in answers]
            row = {
                "prompt": [{"role": "user", "content": f"{number}: {' '.join(random.choices(WORDS, k=30))}"}],
                "chosen": messages[0],
                "rejected": messages[1],
                "language": LANGUAGES[number % len(LANGUAGES)],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(folder: Path) -> None:
    found = read_preferences(Reading([Source(name=str(folder / "rows.jsonl"))]), folder, 0.2)
    assert found.rows == found.pairs


def kept(folder: Path) -> tuple[list[Source], np.ndarray, dict[str, pa.Array]]:
    """Every second row."""
    numbers = np.arange(0, pq.read_metadata(folder / "pairs.parquet").num_rows, 2)
    return [Source(name=str(folder / "rows.jsonl"))], numbers, {"congrad_score": pa.array(np.zeros(len(numbers)))}


def write_selected(folder: Path) -> None:
    with (folder / "selected.parquet").open("wb") as sink:
        write_own_rows(*kept(folder), sink)


def export(to: ExportFormat, folder: Path) -> None:
    def pairs() -> Iterator[ExportedRow]:
        with pq.ParquetFile(folder / "pairs.parquet") as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield ExportedRow(preference_of(row), 0.5, row["row"] % 2 == 0)

    write_export(Rows(pairs, *kept(folder)), to, folder / to, FACTS)


STEPS: dict[str, Callable[[Path], None]] = {
    "read": read,
    "selected": write_selected,
    **{to: partial(export, to) for to in get_args(ExportFormat)},
}

if __name__ == "__main__":
    main()
