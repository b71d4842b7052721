"""Real multilingual prompts and preferences are read whole; skipped where they are not to be had."""

from pathlib import Path

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe, Source
from congrad_ray.config.settings import validate
from congrad_ray.data.reading import read_records
from congrad_ray.data.records import clean_language, clean_messages
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.prompts import stage as prompts


def languages_of(path: Path) -> set[str]:
    records = read_records(Source(name=str(path)), ("prompt", "language"))
    return {clean_language(record.values["language"], {}) for record in records}


def test_every_real_preference_pair_can_be_read(shared_data: Path) -> None:
    records = list(read_records(Source(name=str(shared_data / "preferences.jsonl")), ("prompt", "chosen")))
    assert len(records) == 1982
    assert {clean_language(record.values["language"], {}) for record in records} == {"en", "es", "ru", "de", "fr"}
    for record in records:
        assert record.problem is None
        for column in ("prompt", "chosen", "rejected"):
            assert clean_messages(record.values[column], column, "user")


def test_real_prompts_and_evaluation_prompts_become_one_table(shared_data: Path, tmp_path: Path) -> None:
    train, evaluation = shared_data / "prompts.jsonl", shared_data / "eval_prompts.jsonl"
    both = sorted(languages_of(train) & languages_of(evaluation))
    recipe = validate(
        Recipe,
        {
            "name": "real",
            "prompts": {
                "train": {"name": str(train)},
                "evaluation": {"name": str(evaluation)},
                "languages": both,
                "train_per_language": 100,
                "evaluation_per_language": 20,
            },
        },
        "real",
    )
    run = RunDirectory.open(tmp_path / "run")
    manifest = run_stage(prompts.STAGE, recipe, Profile(name="test"), run)
    assert both and manifest.rows == 120 * len(both)
    assert "quarantined" not in manifest.counters
