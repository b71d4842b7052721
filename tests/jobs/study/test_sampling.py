from __future__ import annotations

from pathlib import Path

import pytest
import torch

from study.sampling import nucleus_sample, sampled_answers


def test_a_nucleus_is_sampled_in_its_proportions() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = nucleus_sample(probabilities.log().repeat(20_000, 1), 0.7, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares[2:].tolist() == [0.0, 0.0], "0.5 + 0.3 reaches 0.7"
    assert shares[0].item() == pytest.approx(0.5 / 0.8, abs=0.02)


def test_a_flat_distribution_needs_more_than_the_likeliest_tokens() -> None:
    drawn = nucleus_sample(torch.zeros(50_000, 400), 0.9, torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 360


def test_answers_are_those_of_the_model_one_prompt_at_a_time(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from congrad_ray.modeling.tokenization import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompts = ["hi", "The quick brown fox jumps", "0 1 2 3 4 5 6 7 8 9 0 1 2", "Wie geht es dir?"]
    # So small a nucleus holds one token: sampling is greedy, and batches can be compared with single prompts.
    answers = sampled_answers(
        model, tokenizer, prompts, temperature=1.0, top_p=1e-6, max_tokens=12, batch_size=3, seed=0
    )
    for prompt, (text, count) in zip(prompts, answers, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        output = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=2)[0, ids.shape[1] :]
        assert text == tokenizer.decode(output, skip_special_tokens=True)
        assert count == len(output)
