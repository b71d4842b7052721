"""Model folders as people have them: several chat templates, the day in one, tokens without rows, adapters.

Each is right, or refused before any work with both facts and the way out.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from congrad_ray.cli.main import main
from congrad_ray.config.recipe import Model, Recipe, load_recipe
from congrad_ray.config.settings import SettingsError, parse_yaml, to_yaml, validate
from congrad_ray.modeling import tokenization
from congrad_ray.modeling.source import ModelError, ModelSource, check_models, named_model, settings_of
from congrad_ray.modeling.tokenization import MissingChatTemplate, chat_prompt_ids, tokenize_pair
from congrad_ray.planning.shapes import read_shapes
from congrad_ray.runtime import engines as engine
from congrad_ray.runtime.engines import load_chat_tokenizer
from tiny_models import CHAT_TEMPLATE, TEXTS, make_tiny_model

QUESTION = [{"role": "user", "content": "How are you?"}]
SHOUTING = CHAT_TEMPLATE.replace("<|user|>", "<|user|>!").replace("message['content']", "'!' + message['content']")
# As Llama 3.2's: the day of rendering, where the renderer can tell it.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}Today Date: {{ date_string }}" + CHAT_TEMPLATE
)
ROOT = Path(__file__).resolve().parents[2]


def changed_tokenizer(model: Path, folder: Path, change: Callable[[PreTrainedTokenizerBase], Any]) -> Path:
    """A copy of the model whose tokenizer is changed."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(model)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def with_templates(model: Path, folder: Path, templates: Any) -> Path:
    return changed_tokenizer(model, folder, lambda tokenizer: setattr(tokenizer, "chat_template", templates))


def recipe_for(model: Path, **settings: Any) -> Recipe:
    return validate(
        Recipe,
        {"name": "test", "model": {"name": str(model), **settings}, "prompts": {"languages": ["en"]}},
        "test",
    )


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command says when it ends with code 2, without having started Ray."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest's own stay
    ray.shutdown()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert not ray.is_initialized()
    return capsys.readouterr().err


def refused_by_all(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What a run, a plan and a filter say of the model."""
    preferences = ROOT.parent / "shared" / "cases" / "17-tokenizer-larger" / "pairs.jsonl"
    if not preferences.exists():
        preferences = tmp_path / "preferences.jsonl"
        texts = {"prompt": "Count to 2", "chosen": "1 2", "rejected": "The fox", "language": "en"}
        preferences.write_text(json.dumps(texts) + "\n")
    recipe = str(ROOT / "jobs" / "recipes" / "demo.yaml")
    name = ["--set", f"model.name={model}"]
    commands = [
        ["run", recipe, "--run", str(tmp_path / "run"), *name],
        ["plan", recipe, *name],
        ["filter", str(preferences), "--model", str(model), "--out", str(tmp_path / "out"), "--chat"],
    ]
    said = [refused(command, capsys, monkeypatch) for command in commands]
    assert not [path for path in tmp_path.glob("*/**/*.parquet") if path.is_file()]  # before any work
    return said


# --- several chat templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "default", "tool_use"])
def test_generating_sketching_and_training_use_one_of_several_templates(
    tiny_model: Path, tmp_path: Path, name: str | None
) -> None:
    templates = {"default": CHAT_TEMPLATE, "tool_use": SHOUTING}
    folder = with_templates(tiny_model, tmp_path / "model", templates)
    source = named_model(str(folder), recipe_for(folder, chat_template=name).model)
    expected = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(
        QUESTION, chat_template=templates[name or "default"], add_generation_prompt=True
    )["input_ids"]
    assert len(expected) < 40
    answers = [[{"role": "assistant", "content": text}] for text in ("Fine", "The fox")]
    of_engine = engine._cached_tokenizer(source)
    assert chat_prompt_ids(load_chat_tokenizer(source), QUESTION) == expected
    assert chat_prompt_ids(of_engine, QUESTION) == expected
    assert tokenize_pair(source.load_tokenizer(), QUESTION, *answers, 64).prompt_ids == expected
    # The policy that is trained is saved with this tokenizer, and the name means the same there.
    of_engine.save_pretrained(tmp_path / "policy")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / file, tmp_path / "policy")
    trained = ModelSource(str(tmp_path / "policy"), source.settings).load_tokenizer()
    assert chat_prompt_ids(trained, QUESTION) == expected


def test_generating_judging_sketching_and_training_give_the_template_its_arguments(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Of a judge of its own, too; and a run without any has the fingerprints that it had before there were any."""
    template = CHAT_TEMPLATE + "{% if not thinking|default(true) %}<s>{% endif %}"
    folder = with_templates(tiny_model, tmp_path / "model", {"default": template})
    recipe = recipe_for(folder, chat_template_kwargs={"thinking": False})
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        QUESTION, add_generation_prompt=True, thinking=False
    )["input_ids"]
    answers = [[{"role": "assistant", "content": text}] for text in ("Fine", "The fox")]
    for settings in (recipe.model, settings_of("judge/of-its-own", recipe)):
        source = named_model(str(folder), settings)
        assert chat_prompt_ids(load_chat_tokenizer(source), QUESTION) == expected
        assert chat_prompt_ids(engine._cached_tokenizer(source), QUESTION) == expected
        assert tokenize_pair(source.load_tokenizer(), QUESTION, *answers, 64).chosen_ids[-1] == expected[-1]
    without = recipe_for(folder)
    bare = engine._cached_tokenizer(named_model(str(folder), without.model))
    assert chat_prompt_ids(bare, QUESTION) == expected[:-1]
    assert "chat_template_kwargs" not in without.model.model_dump(mode="json")
    assert parse_yaml(to_yaml(recipe))["model"]["chat_template_kwargs"] == {"thinking": False}


def test_no_default_among_several_templates_is_refused_with_their_names(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_templates(tiny_model, tmp_path / "model", {"rag": CHAT_TEMPLATE, "tool_use": SHOUTING})
    message = r"several chat templates and none is the default; it has 'rag', 'tool_use'; set `model.chat_tem"
    with pytest.raises(MissingChatTemplate, match=message):
        load_chat_tokenizer(named_model(str(folder), Model()))
    with pytest.raises(MissingChatTemplate, match=message):
        check_models(recipe_for(folder), chats=True)
    check_models(recipe_for(folder, chat_template="rag"), chats=True)
    check_models(recipe_for(folder))  # texts need none
    with pytest.raises(MissingChatTemplate, match="no chat template named 'default'; it has 'rag', 'tool_use'"):
        check_models(recipe_for(folder, chat_template="default"))


def test_a_template_by_name_is_no_path(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model, chat_template="tool_use")
    assert validate(Recipe, parse_yaml(to_yaml(recipe)), "again") == recipe
    with pytest.raises(MissingChatTemplate, match=r"no chat template named 'tool_use'; it has 'default'; set"):
        named_model(str(tiny_model), recipe.model).load_tokenizer()
    (tmp_path / "empty.jinja").write_text("Hello")
    with pytest.raises(SettingsError, match="no Jinja"):
        recipe_for(tiny_model, chat_template=str(tmp_path / "empty.jinja"))


# --- templates that write the day ---------------------------------------------------------------------------


def on(day: datetime.datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)


def test_ids_of_a_template_that_writes_the_day_do_not_change_by_day(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_templates(tiny_model, tmp_path / "model", DATED)
    tokenization._on_day.cache_clear()
    found, plain = [], []
    answers = [[{"role": "assistant", "content": text}] for text in ("Fine", "The fox")]
    for day in (datetime.datetime(2026, 3, 1), datetime.datetime(2026, 11, 30)):
        on(day, monkeypatch)
        tokenizer = load_chat_tokenizer(named_model(str(folder), Model()))
        pair = tokenize_pair(tokenizer, QUESTION, *answers, 256)
        found.append((chat_prompt_ids(tokenizer, QUESTION), pair.prompt_ids, pair.chosen_ids))
        plain.append(tokenizer.apply_chat_template(QUESTION)["input_ids"])
    assert plain[0] != plain[1]  # transformers alone
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(found[0][0])
    assert [record.levelno for record in caplog.records if "2024-07-26" in record.getMessage()] == [
        logging.WARNING
    ]


def test_a_recipe_may_name_the_day(tiny_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "jobs/recipes/demo.yaml", ["model.chat_template_date=2025-01-02"])
    assert recipe.model.chat_template_date == "2025-01-02"
    assert validate(Recipe, parse_yaml(to_yaml(recipe)), "again") == recipe
    folder = with_templates(tiny_model, tmp_path / "model", DATED)
    source = named_model(str(folder), recipe.model)
    for tokenizer in (source.load_tokenizer(), engine._cached_tokenizer(source)):
        assert "Today Date: 02 Jan 2025" in tokenizer.decode(chat_prompt_ids(tokenizer, QUESTION))
        # A checkpoint keeps the template as it is: whoever serves it may write the day.
        assert tokenizer.chat_template == DATED
    for bad in ("tomorrow", "2025-13-01", "2025-01-02T03:04:05"):
        with pytest.raises(SettingsError, match=r"chat_template_date: (not a day|must be text)|is not YAML"):
            load_recipe(ROOT / "jobs/recipes/demo.yaml", [f"model.chat_template_date={bad}"])


def test_a_day_that_cannot_be_fixed_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    template = "{% set form = '%Y' %}{{ strftime_now(form) }}" + CHAT_TEMPLATE
    folder = with_templates(tiny_model, tmp_path / "model", template)
    with pytest.raises(MissingChatTemplate, match=r"asks for today's date.*set model.chat_template to the path"):
        check_models(recipe_for(folder), chats=True)
    harmless = "{# strftime_now(x) #}{% if strftime_now is not defined %}?{% endif %}" + CHAT_TEMPLATE
    folder = with_templates(tiny_model, tmp_path / "other", harmless)
    tokenizer = load_chat_tokenizer(named_model(str(folder), Model()))
    plain = chat_prompt_ids(load_chat_tokenizer(named_model(str(tiny_model), Model())), QUESTION)
    assert chat_prompt_ids(tokenizer, QUESTION) == plain


# --- tokens without rows ------------------------------------------------------------------------------------


def test_tokens_without_rows_in_the_embedding_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    beyond = changed_tokenizer(
        tiny_model, tmp_path / "larger", lambda t: [t.add_tokens(f"<|x{n}|>") for n in range(rows + 1 - len(t))]
    )
    with pytest.raises(ModelError, match=f"token ids up to {rows}, but the embedding has {rows} rows"):
        named_model(str(beyond), Model()).load_tokenizer()
    for said in refused_by_all(beyond, tmp_path, capsys, monkeypatch):
        assert f"token ids up to {rows}, but the embedding has {rows} rows: '<|x" in said
        assert f"resize_token_embeddings({rows + 1})" in said and "save_pretrained" in said


def test_a_placeholder_for_images_without_a_row_is_fine_and_a_text_with_it_is_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As in Gemma 3 of 270M and 1B."""
    folder = changed_tokenizer(
        tiny_model, tmp_path / "model", lambda tokenizer: tokenizer.add_tokens(["<image_soft_token>"], True)
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "image_token": "<image_soft_token>"}))
    rows = len(AutoTokenizer.from_pretrained(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    tokenizer = load_chat_tokenizer(named_model(str(folder), Model()))
    answers = [[{"role": "assistant", "content": text}] for text in ("Fine", "The <image_soft_token>")]
    assert max(chat_prompt_ids(tokenizer, QUESTION)) < rows
    message = f"holds the token '<image_soft_token>', but the model's embedding of {rows} rows has none"
    with pytest.raises(ValueError, match=message):
        tokenize_pair(tokenizer, QUESTION, *answers, 256)
    with pytest.raises(ValueError, match=message):
        tokenize_pair(tokenizer, "How are", " you", " <image_soft_token>", 256)
    with pytest.raises(ValueError, match=message):
        chat_prompt_ids(tokenizer, answers[1])


def test_the_way_out_of_tokens_without_rows_is_one(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer) + 7)  # padded vocabularies are common
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    check_models(recipe_for(tmp_path), chats=True)
    named_model(str(tmp_path), Model()).load_model("cpu")


def test_the_weights_are_believed_and_not_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10}))
    named_model(str(folder), Model()).load_tokenizer()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="embedding has 10 rows"):
        named_model(str(folder), Model()).load_tokenizer()


@pytest.mark.parametrize("shards", [False, True])
def test_rows_are_read_in_shards_too(tmp_path: Path, shards: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", TEXTS)
    if shards:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
        (folder / "model.safetensors").unlink()
        assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|x{n}|>" for n in range(600 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"token ids up to 599, but the embedding has 512 rows: '<\|x.*\.\.\. \(88 in"
    ):
        named_model(str(folder), Model()).load_tokenizer()


# --- adapters -----------------------------------------------------------------------------------------------


def adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter for the model, as peft saves it with a tokenizer beside it."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_an_adapter_is_refused_before_any_work_and_told_how_to_become_a_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tiny_model, tmp_path / "adapter")
    for said in refused_by_all(folder, tmp_path, capsys, monkeypatch):
        assert f"is a LoRA adapter for '{tiny_model}'" in said
        assert "merge_and_unload().save_pretrained(folder)" in said and "taken out" not in said
    # The way out is one.
    from peft import PeftModel

    whole = tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(whole)
    AutoTokenizer.from_pretrained(folder).save_pretrained(whole)
    check_models(recipe_for(whole), chats=True)
    assert read_shapes(recipe_for(whole)).policy.vocabulary == 512


def test_a_model_and_an_adapter_in_one_folder_are_ambiguous(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_model, folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"for a model that it does not name.*remove adapter_config.json from"):
        named_model(str(folder), Model())


def test_a_judge_is_looked_at_as_well(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_model, folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    for section in ("judge", "evaluate"):
        recipe = load_recipe(
            ROOT / "jobs/recipes/demo.yaml", [f"{section}.{'model' if section == 'judge' else 'judge'}={folder}"]
        )
        with pytest.raises(ModelError, match="LoRA adapter for 'some/base'"):
            check_models(recipe)
    # A folder that is on other machines only is theirs to look at.
    check_models(recipe_for(tmp_path / "nowhere"))


def test_attention_that_cannot_be_had_is_refused_by_name(tiny_model: Path) -> None:
    eager = Model(name=str(tiny_model), dtype="float32", attn_implementation="eager")
    assert ModelSource(str(tiny_model), eager).load_model("cpu").config._attn_implementation == "eager"
    flash = eager.model_copy(update={"attn_implementation": "flash_attention_2"})
    with pytest.raises(ModelError, match=r"attn_implementation: flash_attention_2 cannot be used.*leave it out"):
        ModelSource(str(tiny_model), flash).load_model("cpu")
