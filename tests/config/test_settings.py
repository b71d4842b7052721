"""Recipes and profiles: what is wrong is reported with path, value and what is allowed."""

import json
from pathlib import Path

import pytest

from congrad_ray.config.profile import PROFILES, load_profile
from congrad_ray.config.recipe import Recipe, load_recipe, recipe_of_run
from congrad_ray.config.settings import SettingsError, apply_overrides, parse_yaml, to_yaml, validate

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
DEMO = RECIPES / "demo.yaml"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_is_valid_and_survives_a_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert validate(Recipe, parse_yaml(to_yaml(recipe)), "again") == recipe


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_in_the_repository_is_valid(path: Path) -> None:
    assert load_profile(path.stem).name == path.stem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rte=1", ["train.learning_rte", "no such setting", "learning_rate"]),
        ("train.zero_stage=7", ["train.zero_stage", "0, 1, 2 or 3", "7"]),
        ("sketch.parameters=trained", ["'trained' means the adapter of train.lora, which is null", "'linear'"]),
        ("train.lora.rank=4", ["train.lora.rank", "no such setting", "r, lora_alpha"]),
        ("train.lora.r=0", ["train.lora.r", "at least 1"]),
        ("train.lora.lora_dropout=1.0", ["train.lora.lora_dropout", "less than 1"]),
        ("train.lora.target_modules=[]", ["train.lora.target_modules", "at least 1"]),
        ("train.lora.quantization=int8", ["train.lora.quantization", "'nf4'"]),
        ("train={lora: {quantization: nf4}, zero_stage: 3}", ["nf4", "zero_stage 3", "2 or less"]),
        ("generate.max_tokens=abc", ["generate.max_tokens", "integer", "'abc'"]),
        ("generate.max_tokens=5000", ["generate.max_tokens", "5000", "model.max_length"]),
        (
            "judge={method: sampled, max_tokens: 200}",
            ["generate.max_tokens (96)", "(200)", "judge.max_length (256"],
        ),
        ("judge.max_length=97", ["generate.max_tokens (96)", "judge.max_tokens (1)", "judge.max_length (97"]),
        ("generate.stop=['']", ["generate.stop.0", "must not be empty"]),
        ("judge.stop=['']", ["judge.stop.0", "must not be empty"]),
        ("evaluate.judge_max_length=704", ["evaluate.max_tokens (96)", "judge_max_tokens (512)", "(704)", "null"]),
        ("generate.top_p=1.5", ["generate.top_p", "at most 1", "1.5"]),
        ("prompts.languages=[inglish]", ["prompts.languages.0", "BCP-47", "did you mean english"]),
        ("prompts.languages=[]", ["prompts.languages", "at least 1"]),
        ("prompts.unseen_languages=[English]", ["seen and unseen", "en"]),
        ("prompts.languages=[ar, arb]", ["named twice", "ar"]),
        ("prompts.unseen_languages=[en]", ["seen and unseen", "en"]),
        ("iterations=true", ["iterations", "integer", "True"]),
        ("train.batch_size=0", ["train.batch_size", "at least 1", "0"]),
        ("wrong", ["setting", "section.key=value"]),
        ("name.x=1", ["'name' is a value"]),
        ("train.beta=[1", ["not YAML"]),
    ],
)
def test_a_wrong_setting_names_its_path_its_value_and_what_is_allowed(override: str, message: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        load_recipe(DEMO, [override])
    for text in message:
        assert text in str(error.value)


def test_a_setting_that_is_gone_says_what_to_do_and_is_left_out_of_what_a_run_keeps() -> None:
    sections = {name: getattr(field.annotation, "gone", {}) for name, field in Recipe.model_fields.items()}
    gone = [(section, setting, advice) for section, of in sections.items() for setting, advice in of.items()]
    assert ("train", "micro_batch_size") in {(section, setting) for section, setting, _ in gone}
    for section, setting, advice in gone:
        with pytest.raises(SettingsError, match=rf"{section}\.{setting}: no longer a setting: ") as error:
            load_recipe(DEMO, [f"{section}.{setting}=2"])
        assert advice in str(error.value)
        kept = load_recipe(DEMO).model_dump(mode="json")
        kept[section][setting] = 2
        assert recipe_of_run(json.dumps(kept).encode(), "RUN/recipe.yaml") == load_recipe(DEMO)
    with pytest.raises(SettingsError, match=r"RUN/recipe\.yaml has 1 wrong setting:\n +train\.betta"):
        recipe_of_run(b"{name: x, prompts: {languages: [en]}, train: {betta: 1}}", "RUN/recipe.yaml")


def test_an_adapter_is_no_part_of_a_recipe_without_one() -> None:
    plain = load_recipe(DEMO)
    assert plain.train.lora is None and plain.sketched_adapter is None
    assert "lora" not in plain.train.model_dump() and "parameters" not in plain.sketch.model_dump()
    lora = load_recipe(DEMO, ["train.lora={r: 4, target_modules: [q_proj]}"])
    assert lora.sketched_adapter == lora.train.lora
    assert validate(Recipe, parse_yaml(to_yaml(lora)), "again") == lora
    assert load_recipe(DEMO, ["train.lora={}", "sketch.parameters=linear"]).sketched_adapter is None


def test_a_comparison_has_room_for_a_prompt_with_two_answers_and_a_verdict() -> None:
    recipe = load_recipe(RECIPES / "gemma2-2b.yaml")
    longest = recipe.model.max_length + recipe.evaluate.max_tokens + recipe.evaluate.judge_max_tokens
    assert recipe.comparison_length > longest + 162  # the instruction in tokens of SmolLM2
    assert load_recipe(DEMO, ["evaluate.judge_max_length=800"]).comparison_length == 800
    assert load_recipe(DEMO).judgement_length == 256
    assert load_recipe(DEMO, ["judge.max_length=300"]).judgement_length == 300


def test_all_wrong_settings_are_reported_at_once() -> None:
    with pytest.raises(SettingsError, match="2 wrong setting") as error:
        load_recipe(DEMO, ["train.beta=-1", "pair.truncated=maybe"])
    assert "train.beta" in str(error.value) and "pair.truncated" in str(error.value)


def test_overrides_are_yaml_and_leave_the_original_alone() -> None:
    values = {"a": {"b": 1}}
    assert apply_overrides(values, ["a.b=1e-4", "a.c=[x, y]", "d.e=null"]) == {
        "a": {"b": 1e-4, "c": ["x", "y"]},
        "d": {"e": None},
    }
    assert values == {"a": {"b": 1}}


def test_a_chat_template_is_read_where_the_recipe_is_and_stored_with_it(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    recipe = load_recipe(DEMO, [f"model.chat_template={template}"])
    assert recipe.model.chat_template == "{{ messages[0]['content'] }}"
    assert validate(Recipe, parse_yaml(to_yaml(recipe)), "again") == recipe
    with pytest.raises(SettingsError, match=r"model.chat_template: cannot read.*nowhere.jinja"):
        load_recipe(DEMO, ["model.chat_template=nowhere.jinja"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "mapping"), ("a: [", "cannot read"), ("a: !!python/object:os.system x\n", "cannot read")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_recipe(path)


def test_a_missing_recipe_or_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(SettingsError, match="local"):
        load_profile("nowhere")


def test_settings_of_a_selection_that_contradict_each_other_are_refused() -> None:
    for overrides, message in [
        (["select.keep_rule=threshold", "select.band=middle"], "band 'middle' needs another keep_rule"),
        (["select.strategy=judge_agreement"], "name more of them in judge.also"),
    ]:
        with pytest.raises(SettingsError, match=message):
            load_recipe(DEMO, overrides)
    # What was not there before leaves the fingerprints of older runs as they were.
    assert "band" not in load_recipe(DEMO).select.model_dump(mode="json")


def test_a_profile_that_contradicts_itself_is_refused() -> None:
    for override, message in [
        ("engines.gpus=1", "device is cpu but engines.gpus is 1"),
        ("sketchers.min_actors=4", "exceeds max_actors"),
        ("engines.tensor_parallel_size=2", "tensor_parallel_size 2 needs gpus: 2"),
    ]:
        with pytest.raises(SettingsError, match=message):
            load_profile("local", [override])


def test_threads_of_an_actor_are_the_machines_where_ray_is_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = load_profile("local", ["engines.cpus=1", "sketchers.max_actors=3", "trainers.num_workers=2"])
    assert [here.threads_of(pool) for pool in (here.engines, here.sketchers, here.trainers)] == [8, 2, 4]
    assert load_profile("local", ["threads=3"]).threads_of(here.engines) == 3
    on_a_cluster = load_profile("local", ["address=auto", "engines.cpus=3"])
    assert on_a_cluster.threads_of(on_a_cluster.engines) == 3
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert here.threads_of(here.engines) == 1


def test_a_batch_of_long_answers_is_small_on_a_cpu() -> None:
    cpu, gpu = load_profile("local").engines, load_profile("one-gpu").engines
    assert [cpu.rows_per_batch(tokens) for tokens in (1, 96, 512, 8192)] == [64, 42, 8, 4]
    assert [gpu.rows_per_batch(tokens) for tokens in (1, 512, 8192)] == [64, 64, 64]
    assert load_profile("local", ["engines.batch_size=5"]).engines.rows_per_batch(512) == 5
