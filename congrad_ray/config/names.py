"""Names that settings, tables and algorithms share; without pydantic, which the algorithms do not need."""

from typing import Literal

DirectionMethod = Literal[
    "pcgrad",
    "mean",
    "sum",
    "gradvac",
    "cagrad",
    "mgda",
    "nash_mtl",
    "equal_norm_mean",
    "consensus",
    "upgrad",
    "raco",
    "aligned_mtl",
    "imtl_g",
    "config",
    "krum",
]
LeaveOut = Literal["nothing", "pair", "language"]
Band = Literal["highest", "middle", "lowest"]

Trainer = Literal["trl", "llama-factory", "axolotl", "openrlhf"]
ExportFormat = Literal["trl", "llama-factory", "axolotl", "openrlhf", "parquet", "jsonl", "dataset"]

# The columns of the judge's scores in the table of pairs.
JUDGED = ("chosen_score", "rejected_score")
# What the select stage makes of several judges' scores: the least of their standardised margins of a pair.
LEAST_MARGIN = "least_margin"
