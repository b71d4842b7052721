"""The stage `judge`: a score for every response, from one judge or several.

Every single judgement is a row of `judgements/samples/`, which makes the judges' work resumable; the table
JUDGEMENTS has one row per response, of one judge that scores responses by themselves the mean of its readable
judgements.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.judging import OneJudge
from congrad_ray.config.profile import PoolName, Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import row_id
from congrad_ray.modeling.source import ModelSource, policy, policy_input
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import RunDirectoryError, StageFolder
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.asking import ask
from congrad_ray.runtime.attempts import attempts
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.endpoint import check_endpoint, endpoint_key
from congrad_ray.runtime.engines import (
    engine_failures,
    judge_source,
    load_chat_tokenizer,
    with_length,
)
from congrad_ray.runtime.pools import let_go, positions
from congrad_ray.runtime.requests import read_grouped_requests, read_requests
from congrad_ray.runtime.resources import Demand, pool_demand, tasks_demand
from congrad_ray.runtime.rows import Counts, outcome_of, pool_arguments, write_rows
from congrad_ray.stages.base import Stage
from congrad_ray.stages.judge.combine import COLUMNS, disagreeing, scores_of
from congrad_ray.stages.judge.estimate import ESTIMATE
from congrad_ray.stages.judge.figures import STEP, figures
from congrad_ray.stages.judge.pairwise import ORDERS, fill_pairwise, pairwise_template
from congrad_ray.stages.judge.questions import Questions, questions_for
from congrad_ray.stages.judge.results import counters_of, write_combined, write_means
from congrad_ray.stages.judge.reward import RewardModel, load_reward_model
from congrad_ray.stages.judge.rubric import load_rubric, structured_endings
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES, JUDGEMENTS
from congrad_ray.stages.judge.scores import score_texts, score_token_ids
from congrad_ray.stages.judge.unreadable import Tally, by_reason, counts_by_language, explain, keep_failed

if TYPE_CHECKING:
    from ray.data import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# A mean probability of the score tokens below this is reported: what is left over says little.
_TINY_MASS = 0.01
# What a server or an engine did not answer is asked again when the stage is resumed.
_UNANSWERED = ("inference_error", "killed_worker")


@dataclass(frozen=True)
class _Judge:
    """One of the judges, ready to be asked."""

    questions: Questions
    source: ModelSource | None
    """None: a server."""
    missing: int
    """Judgements that are still to be made."""


def run(context: Context) -> Outcome:
    """Judges every response by every judge.

    Raises RubricError, ModelError, SettingsError or ValueError before any engine starts, and RunDirectoryError as
    soon as more judgements are unreadable than `limits.unreadable_share` allows.
    """
    output, recipe = context.output, context.recipe
    responses = context.input("responses")
    prompts = responses.read_table(["prompt_id", "language"]).group_by(["prompt_id", "language"])
    groups = prompts.aggregate([([], "count_all")]).to_pylist()
    samples = StageFolder(output.filesystem, f"{output.path}/samples")
    first = next(iter(recipe.judge.judges))
    _tidy(samples, first)
    done = samples.ids("judgement_id")
    judges = recipe.judge.judges
    wanted = {name: _expected(judge, groups) for name, judge in judges.items()}
    expected = sum(wanted.values(), Counter[str]())
    tally = Tally(expected)
    made: Counter[str] = Counter()
    if len(done):
        for language, row in counts_by_language(samples.read_table(["language", "unreadable"])).items():
            tally.add(language, row["asked"], row["asked"] - row["readable"])
        made.update(samples.read_table(["judge"])["judge"].to_pylist())
        _stop_if_unreadable(context, samples, tally)
    missing = {name: of_judge.total() - made[name] for name, of_judge in wanted.items()}
    ready = [_ready(context, name, judges[name], left) for name, left in missing.items() if left]
    for judge in ready:
        _ask(replace(context, output=samples), judge, responses, done, tally)
    outcome_of(samples, "judgement_id", expected=expected.total())  # none is there twice
    number = sum(group["count_all"] for group in groups)
    counters: dict[str, Any] = {}
    if len(judges) == 1 and recipe.judge.method != "pairwise":
        write_means(samples, output, recipe.judge.judgements_of(1))
    else:
        scores = scores_of(samples.read_table([*COLUMNS]), list(judges))
        write_combined(scores, output)
        if len(judges) > 1:
            counters["agreement"] = scores.agreement()
    outcome = outcome_of(output, "response_id", counters_of(samples, output, recipe) | counters, number)
    _warn(context, outcome.counters)
    return outcome


def _tidy(samples: StageFolder, first: str) -> None:
    """Takes out what was not answered, to be asked again; names the judge where an older version wrote without."""
    for path in samples.parts():
        table = samples.read_parquet(path)
        if "judge" not in table.column_names:
            names, none = pa.array([first] * len(table)), pa.nulls(len(table), pa.string())
            table = table.append_column("judge", names).append_column("compared_with", none)
            samples.write_table(path.rsplit("/", 1)[1], table.select(JUDGEMENT_SAMPLES.names))
        answered = pc.invert(pc.is_in(table["unreadable"], pa.array(_UNANSWERED)))
        if not pc.all(answered).as_py():
            samples.write_table(path.rsplit("/", 1)[1], table.filter(answered).select(JUDGEMENT_SAMPLES.names))
    if samples.parts():
        outcome_of(samples, "judgement_id")  # a retried task may write one twice


def _expected(judge: OneJudge, groups: Sequence[Row]) -> Counter[str]:
    """Judgements by language; `groups`: language and number of responses of each prompt."""
    expected: Counter[str] = Counter()
    for group in groups:
        expected[group["language"]] += judge.judgements_of(group["count_all"])
    return expected


def _ready(context: Context, name: str, judge: OneJudge, missing: int) -> _Judge:
    """Looks at the judge, so that what is wrong with it is known before any is asked."""
    recipe = context.recipe
    first = name == next(iter(recipe.judge.judges))
    setting = "judge.max_length" if judge.max_length or judge.method == "pairwise" else "model.max_length"
    if judge.endpoint is not None:
        texts = score_texts() if judge.method == "expected_score" else ()
        questions = questions_for(name, judge, first, recipe.seed, setting, score_texts=texts)
        _probe(questions, recipe)
        return _Judge(questions, None, missing)
    source = _source(context, judge)
    tokenizer = load_chat_tokenizer(source)
    if judge.method == "reward_model":
        load_reward_model(source, "meta")
        return _Judge(questions_for(name, judge, first, recipe.seed, setting), source, missing)
    _check_room(recipe, judge, source, tokenizer)
    tokens = score_token_ids(tokenizer.get_vocab()) if judge.method == "expected_score" else []
    return _Judge(questions_for(name, judge, first, recipe.seed, setting, tokens), source, missing)


def _probe(questions: Questions, recipe: Recipe) -> None:
    """Asks the judge's server about a question mark. Raises EndpointError, or SettingsError without its key."""
    endpoint = questions.judge.endpoint
    assert endpoint is not None
    row = {"judgement_id": "", "language": recipe.prompts.languages[0], "response": "?", "other": "?"}
    request = questions.task.request({**row, "prompt": [_user("?")], "order": ORDERS[0]})
    check_endpoint(endpoint, endpoint_key(endpoint), questions.task, request)


def _source(context: Context, judge: OneJudge) -> ModelSource:
    """The judge's model with its length and dtype."""
    recipe = context.recipe
    if judge.model == "policy":
        source = policy(recipe, context.run, context.iteration)
    else:
        source = judge_source(judge.model, recipe)
    length = recipe.length_of(judge)
    if judge.method == "pairwise" and judge.max_length is None:
        length = min(length, positions(source) or length)
    source = with_length(source, length)
    if judge.dtype is not None:
        source = replace(source, settings=source.settings.model_copy(update={"dtype": judge.dtype}))
    return source


def _ask(context: Context, judge: _Judge, responses: StageFolder, done: Ids, tally: Tally) -> None:
    """Asks one judge what is missing and writes JUDGEMENT_SAMPLES."""
    questions, recipe, missing = judge.questions, context.recipe, judge.missing
    if len(recipe.judge.judges) > 1:
        logger.info(f"{missing:,} judgements by {questions.name}")
    if questions.together:
        requests = read_grouped_requests(responses, "prompt_id", questions.expand, questions.schema, done)
    else:
        requests = read_requests(responses, lambda row: questions.expand([row]), questions.schema, done)
    endpoint = questions.judge.endpoint
    cost = _Cost()

    def check(counts: Counts) -> None:
        for name, language, number in counts:
            if name == "congrad_judgements":
                tally.add(language, int(number), 0)
            elif name == "congrad_unreadable_judgements":
                tally.add(language, 0, int(number))
            elif name == "congrad_cost_usd":
                cost.add(number)
        _stop_if_unreadable(context, context.output, tally)

    def counted(row: Row) -> dict[str, float]:
        read, written = row["prompt_tokens"] or 0, row["output_tokens"] or 0
        dollars = endpoint.dollars(read, written) if endpoint else None
        return {
            "congrad_tokens": read + written,
            "congrad_judgements": 1,
            "congrad_unreadable_judgements": int(row["score"] is None),
            **({} if dollars is None else {"congrad_cost_usd": dollars}),
        }

    asked = _rewarded(context, judge, requests) if questions.judge.method == "reward_model" else None
    if asked is None:
        who = endpoint or judge.source
        assert who is not None
        pool: PoolName = "engines" if questions.judge.model == "policy" else "judge_engines"
        asked = ask(requests, missing, who, context.profile, questions.task, context.notify(), pool=pool)
    answers = asked.map_batches(
        lambda batch: keep_failed(batch, JUDGEMENT_SAMPLES), batch_format="pyarrow", batch_size=None
    )
    with engine_failures():
        write_rows(answers, context, JUDGEMENT_SAMPLES, "judgement_id", missing, counted, check)


def _rewarded(context: Context, judge: _Judge, requests: Dataset) -> Dataset:
    """The requests with the logits of a pool of reward models, where engines would be."""
    assert judge.source is not None
    # An engine that another stage left up may hold the GPU that they wait for.
    let_go("the reward model needs its room")
    profile = context.profile
    pool = profile.engines_of("judge_engines")
    batch = pool.rows_per_batch(1)
    return requests.repartition(target_num_rows_per_block=batch).map_batches(
        RewardModel,
        fn_constructor_args=(
            judge.source,
            profile.device,
            max(1, int(pool.gpus)),
            profile.threads_of(pool),
            judge.questions.task.length_setting,
            attempts(),
            context.notify(),
        ),
        **pool_arguments(pool, profile, -(-judge.missing // batch)),
    )


class _Cost:
    """Logs what a server's judgements have cost, each time that it has doubled."""

    def __init__(self, least: float = 0.01) -> None:
        self.dollars, self._next = 0.0, least

    def add(self, dollars: float) -> None:
        self.dollars += dollars
        if self.dollars >= self._next:
            logger.info(f"cost so far: ${self.dollars:.2f}")
            self._next = 2 * self.dollars


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _check_room(recipe: Recipe, judge: OneJudge, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a language's rubric leaves no room for the longest response to be judged."""
    length, written = source.settings.max_length, judge.writes
    if judge.method == "pairwise":
        texts = {"en": fill_pairwise(pairwise_template(), [_user("")], "", "")}
        what, judged, responses = "an instruction", "two responses", 2
    else:
        rubric = load_rubric(judge.rubric)
        texts = {tag: rubric.fill(tag, judge.ending, [_user("")], "") for tag in recipe.prompts.languages}
        what, judged, responses = "a rubric", "a response", 1
    asked = {tag: len(chat_prompt_ids(tokenizer, [_user(text)])) for tag, text in texts.items()}
    longest = max(asked, key=lambda tag: asked[tag])
    needed = asked[longest] + responses * recipe.generate.max_tokens + written
    if needed >= length:
        raise ValueError(
            f"judge: {what} of {asked[longest]} tokens ({longest}), {judged} of generate.max_tokens "
            f"({recipe.generate.max_tokens}) and a judgement of {written} are {needed} tokens: no room for a "
            f"prompt in judge.max_length ({length}; null: model.max_length). Raise it to {needed} and the tokens "
            "of your prompts, as far as the judge has positions, or give a folder of shorter texts as "
            "judge.rubric"
        )


def _ways_out(recipe: Recipe) -> dict[str, str]:
    judge = recipe.judge
    other = f"the server said so: look at judge.endpoint ({judge.endpoint.url})" if judge.endpoint else None
    return {
        "no_score": "the judge does not write the line that the rubric asks for, such as Score: 4, or it says two "
        "things: set judge.method: expected_score, which needs no such line, or judge.structured: true, or take a "
        "judge.model that follows instructions",
        "no_verdict": "the judge does not write the line that it is asked for, such as Verdict: A, or says two "
        "things: take a judge.model that follows instructions, or another judge.method",
        "truncated": f"raise judge.max_tokens ({judge.max_tokens}), or set judge.method: expected_score",
        "low_mass": f"lower judge.min_probability_mass ({judge.min_probability_mass:g})",
        "prompt_too_long": f"raise judge.max_length ({recipe.judgement_length})",
        "bad_request": other or "the judge's chat template refuses what it is asked: take another judge.model",
        "refused": "the server withheld its answers: take another judge",
        **({"inference_error": other} if other else {}),
    }


def _stop_if_unreadable(context: Context, samples: StageFolder, tally: Tally) -> None:
    """Raises RunDirectoryError where most judgements cannot be read, with what the judge wrote."""
    limit = context.recipe.limits.unreadable_share
    if tally.share() <= limit:
        return
    rows = samples.read_table(["unreadable", "output"]).to_pylist()
    raise RunDirectoryError(
        f"{explain('judgements', rows, _ways_out(context.recipe))}\n"
        f"That is more than limits.unreadable_share ({limit:g}) allows, so the stage stops here. All are in "
        f"{samples.path}. Change the setting and give --redo, or raise limits.unreadable_share and run the same "
        "command again."
    )


def _warn(context: Context, counters: Mapping[str, Any]) -> None:
    """Warns about languages of which few judgements can be read, or whose judges do not agree."""
    limit, judge = context.recipe.limits.unreadable_share, context.recipe.judge
    judgements = counters["judgements"]
    if apart := disagreeing(counters.get("agreement", {}), judge.min_agreement):
        named = ", ".join(f"{tag} ({'no tau' if tau is None else f'{tau:.2f}'})" for tag, tau in apart.items())
        follows = {
            "keep": "They are paired like the others; judge.disagreement: weight or leave_out changes that",
            "weight": "Their gradients count less in the direction (judge.disagreement)",
            "leave_out": "No pairs are made of them (judge.disagreement)",
        }
        logger.warning(
            f"the judges agree less than judge.min_agreement ({judge.min_agreement:g}) in {named}. "
            f"{follows[judge.disagreement]}"
        )
    for language, row in judgements.items():
        if row["asked"] - row["readable"] > limit * row["asked"]:
            logger.warning(
                f"{language}: {row['readable']} of {row['asked']} judgements can be read "
                f"({by_reason(row['unreadable'])})"
            )
    tiny = {
        tag: row["mean_mass"]
        for tag, row in judgements.items()
        if row["mean_mass"] is not None and row["mean_mass"] < _TINY_MASS
    }
    if tiny:
        logger.warning(
            f"the judge gives the score tokens a mean probability of "
            f"{', '.join(f'{mass:.1g} ({tag})' for tag, mass in tiny.items())}: it would have begun with other "
            "words, so its scores may say little. Look at the pairs; a judge.model that follows instructions helps"
        )


def settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the judgements beside the responses: the judges, their rubrics' texts, and the seed.

    How a server is reached and what it costs does not, nor what becomes of languages where judges disagree.
    """
    found = recipe.judge.model_dump(mode="json", exclude={"min_agreement", "disagreement"})
    for one in (found, *found.get("also", [])):
        if one.get("endpoint"):
            one["endpoint"] = {name: one["endpoint"][name] for name in ("url", "model")}
    also, every = recipe.judge.also, recipe.judge.judges.values()
    texts: dict[str, Any] = {"rubric": load_rubric(recipe.judge.rubric).digest()}
    if also:
        texts["rubrics"] = [load_rubric(judge.rubric).digest() for judge in also]
    if any(judge.method == "pairwise" for judge in every):
        texts["pairwise"] = row_id(pairwise_template())
    if any(judge.structured for judge in every):
        texts["structured"] = row_id(*structured_endings().values())
    return {"model": recipe.model.model_dump(mode="json"), "judge": found, **texts, "seed": recipe.seed}


def _demand(recipe: Recipe, profile: Profile) -> Demand:
    """The judges take turns; one behind HTTP takes next to nothing here."""
    rows, judges = rows_of(recipe).judgements, recipe.judge.judges.values()
    local = [judge for judge in judges if judge.endpoint is None]
    if not local:
        return replace(tasks_demand("judge", rows, profile), what="requests to a server")
    rewards = all(judge.method == "reward_model" for judge in local)
    what = "reward models" if rewards else "vLLM engines"
    own = all(judge.model != "policy" for judge in local) and profile.judge_engines is not None
    return pool_demand("judge", rows, what, "judge_engines" if own else "engines", profile)


STAGE = Stage(
    name="judge",
    folder="judgements",
    summary="Score the responses from 0 to 5 with the policy or another model",
    example="judge.method=expected_score",
    inputs=lambda iteration: [("responses", iteration), *policy_input(iteration)],
    settings=settings,
    run=run,
    demand=_demand,
    schema=lambda recipe: JUDGEMENTS,
    estimate=ESTIMATE,
    figures=figures,
    step=STEP,
    chats=True,
    parts=("", "samples"),
)
