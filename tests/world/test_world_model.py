from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from congrad_ray.world.corpus import judge_message
from congrad_ray.world.languages import ALL_LANGUAGES
from congrad_ray.world.model import biased_judge, world_model
from congrad_ray.world.tasks import best_answer, world_prompts


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_folder(cache_dir: Path) -> Path:
    return world_model(seed=1, cache_dir=cache_dir, training_tokens=20_000)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_folder)


def test_the_second_call_reads_the_cache(
    cache_dir: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modified = (model_folder / "model.safetensors").stat().st_mtime_ns
    assert world_model(1, cache_dir, 20_000) == model_folder
    assert caplog.messages == []
    assert (model_folder / "model.safetensors").stat().st_mtime_ns == modified
    assert not list(model_folder.parent.glob("*.unfinished-*"))


def test_training_is_reproducible(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.random.get_rng_state()
    first = world_model(1, tmp_path / "one", 3_000)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert any("tokens/s" in line for line in caplog.messages)
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path / "two"))
    second = world_model(1, None, 3_000)
    assert second == tmp_path / "two" / "world" / first.name
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert first.name != model_folder.name  # which was trained on more tokens


def test_two_that_race_build_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: world_model(1, tmp_path, 500), range(2)))
    assert folders[0] == folders[1]
    assert sum("training the tokenizer" in line for line in caplog.messages) == 1


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("congrad_ray.world.model._train", fail)
    with pytest.raises(InterruptedError):
        world_model(1, tmp_path, 500)
    assert [path.suffix for path in (tmp_path / "world").iterdir()] == [".lock"]


def test_a_biased_judge_starts_from_the_worlds_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("congrad_ray.world.model.TRAINING_TOKENS", 1_000)
    judge = biased_judge(1, {"fr": "inverted"}, tmp_path, 1_000)
    start = world_model(1, tmp_path)
    assert (judge / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (start, judge)]
    moved = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]]
    assert 0.0 < max(moved) < 0.5, "trained further, not anew"
    said = len(caplog.messages)
    assert biased_judge(1, {"fr": "inverted"}, tmp_path, 1_000) == judge
    assert len(caplog.messages) == said
    assert biased_judge(1, {"fr": "verbose"}, tmp_path, 1_000) != judge
    with pytest.raises(ValueError, match="no language xx"):
        biased_judge(1, {"xx": "inverted"}, tmp_path)


def test_no_tokens_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training_tokens is 0"):
        world_model(cache_dir=tmp_path, training_tokens=0)


def test_the_checkpoint_loads_in_float32_and_stops_at_the_end_token(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.head_dim in (32, 64)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = world_prompts("en", 1, 0, "evaluation")[0]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=True)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert output.max() < len(tokenizer)


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_chat_template_begins_once_and_extends_the_prompt(
    tokenizer: PreTrainedTokenizerFast, language: str
) -> None:
    for prompt in world_prompts(language, 20, 0, "train"):
        answer = best_answer(prompt.task, language)
        for user, assistant in ((prompt.prompt, answer), (judge_message(prompt.prompt, answer), "4")):
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            whole = tokenizer.apply_chat_template(messages, return_dict=False)
            opening = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            assert whole[: len(opening)] == opening
            assert whole.count(tokenizer.bos_token_id) == 1
            assert whole[-1] == tokenizer.eos_token_id
            assert whole.count(tokenizer.eos_token_id) == 1
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            assert tokenizer.encode(text, add_special_tokens=False) == whole
            assert tokenizer.decode(whole[len(opening) : -1]) == assistant


def test_only_the_roles_it_was_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}])


def test_every_digit_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    digits = {}
    for digit in "0123456789":
        (digits[digit],) = tokenizer.encode(digit, add_special_tokens=False)
    tokens = tokenizer.encode("Zähle von 12 bis 345: 6,7, 89 से 0.", add_special_tokens=False)
    found = [token for token in tokens if token in digits.values()]
    assert found == [digits[digit] for digit in "1234567890"]
    assert tokenizer.encode("<|assistant|>3", add_special_tokens=False)[1] == digits["3"]


@pytest.mark.parametrize("text", ["日本語 🙂", "a  b\n\n c", "“सफ़ेद” ¿qué?", "l'été — 12½"])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
