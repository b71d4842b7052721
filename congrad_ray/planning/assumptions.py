"""What nobody can know before a run, in one place. None of these numbers was measured by this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from congrad_ray.config.settings import Settings, apply_overrides, validate

Share = Annotated[float, Field(gt=0, le=1)]


class Assumptions(Settings):
    """Assumptions of a plan, each to be overridden by `congrad plan --assume name=value`.

    Lengths are taken from a run's manifests instead where `--run` names one that has them.
    """

    prompt_share: Share = Field(
        0.1, description="mean tokens of a prompt as a share of model.max_length - generate.max_tokens"
    )
    response_share: Share = Field(0.5, description="mean tokens of a response as a share of generate.max_tokens")
    judgement_share: Share = Field(
        0.35, description="mean tokens that a judge writes as a share of its max_tokens"
    )
    pairs_per_prompt: Share = Field(0.9, description="share of prompts that give a pair; ties are dropped")
    kept_above_threshold: Share = Field(0.5, description="share of pairs kept by select.keep_rule 'threshold'")
    bytes_per_token: float = Field(4.0, gt=0, description="UTF-8 bytes of text that make a token")
    text_compression: float = Field(2.5, gt=0, description="how many times zstd makes text smaller")

    prefill_mfu: Share = Field(0.4, description="share of the peak FLOP/s reached on prompts by vLLM")
    decode_mfu: Share = Field(0.08, description="and on generated tokens, which memory bandwidth limits")
    backward_mfu: Share = Field(0.35, description="and in forward and backward of sketching and training")
    core_gigaflops: float = Field(50.0, gt=0, description="peak GFLOP/s of one CPU, for profiles without a GPU")
    engine_start_s: float = Field(90.0, ge=0, description="seconds until a vLLM engine answers")
    replica_start_s: float = Field(60.0, ge=0, description="seconds until a sketch replica or training works")

    machine_cpus: float | None = Field(
        None,
        gt=0,
        description="CPUs of a machine to plan for that is not this one; no cluster section",
    )
    machine_gpus: int | None = Field(None, ge=1, description="its GPUs")
    machine_memory_gib: float | None = Field(None, gt=0, description="GiB of its memory")
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="GiB of one GPU where the profile has no cluster section that says it"
    )
    gpu_teraflops: float | None = Field(None, gt=0, description="and the dense bfloat16 TFLOP/s of one GPU")
    price_per_hour: float | None = Field(None, ge=0, description="and the US dollars an hour of the machine")
    device_overhead_gib: float = Field(
        1.5, ge=0, description="GiB of a GPU for the CUDA context, cuBLAS and NCCL of one process"
    )
    process_gib: float = Field(0.5, ge=0, description="GiB of a Python process with torch and transformers")
    allocator_overhead: float | None = Field(
        None,
        ge=0,
        description="what an allocator holds beyond the tensors, as a share of the working memory; null: 0.1, and "
        "0.35 on a CPU, where glibc keeps freed blocks",
    )

    def overhead(self, device: str) -> float:
        """`allocator_overhead` on a device."""
        if self.allocator_overhead is not None:
            return self.allocator_overhead
        return 0.35 if device == "cpu" else 0.1


def load_assumptions(overrides: Sequence[str] = ()) -> Assumptions:
    """The assumptions with `name=value` overrides applied. Raises SettingsError."""
    return validate(Assumptions, apply_overrides({}, overrides), "--assume")
