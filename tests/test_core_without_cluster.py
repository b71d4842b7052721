"""The gradient core works where neither a cluster's packages nor the pipeline's are installed."""

import subprocess
import sys

_PROGRAM = """
import sys

MISSING = {"ray", "vllm", "deepspeed", "pydantic", "datasets", "pyarrow", "trl", "peft", "typer", "langcodes"}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from congrad_ray.stages.sketch import audit, capture, countsketch, exact, layers, memory, sketcher
from congrad_ray.stages.sketch import storage
from congrad_ray.modeling import batching, logprobs, loss, packing, shared_prompts, tokenization
from congrad_ray.stages.select import advice, directions, keep, scores

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)
pairs = [
    tokenization.TokenizedPair([3, 4], [5 + n, 6, 7], [8, 9 + n]) for n in range(4)
]
with capture.GradientCapture(LlamaForCausalLM(config)) as captured:
    result = sketcher.sketch_pairs(captured, countsketch.CountSketch(256, 0), captured.layout(pairs))
sketches = result.sketches.double().numpy()
weights = directions.direction_weights(sketches @ sketches.T, "pcgrad")
kept = keep.keep_top_fraction(sketches @ (weights @ sketches), list("abcd"), 0.5)
assert kept.sum() == 2
assert not MISSING & {name.partition(".")[0] for name in sys.modules}
"""


def test_sketches_and_selects_without_ray_and_others():
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
