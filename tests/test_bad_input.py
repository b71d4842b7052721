"""Whatever users bring: an error of ours that says what to do, or rows in quarantine; no good row is lost."""

from __future__ import annotations

import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from congrad_ray.cli.main import main
from congrad_ray.config.printable import brief, printable, shown
from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import Model, Prompts, Recipe, Select, Source, load_recipe
from congrad_ray.config.settings import SettingsError, apply_overrides, parse_yaml, to_yaml, validate
from congrad_ray.data.own_rows import write_own_rows
from congrad_ray.data.preferences import tokenize_arguments
from congrad_ray.data.reading import python_rows, read_records
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import prompt_id
from congrad_ray.modeling.source import ModelError, named_model
from congrad_ray.modeling.tokenization import MissingChatTemplate, chat_prompt_ids, tokenize_pair
from congrad_ray.pipeline.preferences import Reading, read_preferences
from congrad_ray.rundir.directory import RunDirectory, fingerprint
from congrad_ray.runtime.context import Context
from congrad_ray.stages.judge.pairwise import read_win
from congrad_ray.stages.judge.rubric import RubricError, load_rubric
from congrad_ray.stages.judge.scores import expected_score, read_score
from congrad_ray.stages.pair.best_and_worst import BestAndWorst, JudgedResponse, best_and_worst
from congrad_ray.stages.prompts import stage as prompts
from congrad_ray.stages.select.keep import keep_above, keep_pairs, keep_top_fraction, keep_within_tokens
from congrad_ray.stages.select.scores import Agreement, score_of

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
DEMO = parse_yaml((RECIPES / "demo.yaml").read_text())
LOCAL = parse_yaml((RECIPES.parents[1] / "congrad_ray" / "config" / "profiles" / "local.yaml").read_text())

OF_PAIR = ("prompt", "chosen", "rejected")

# --- what is generated --------------------------------------------------------------------------------------

NASTY = [
    *("", " ", "\t", "\x00", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\r", "\x7f", "\ufeff", "\u2028"),
    *(
        "\u202eabc",
        "سلام",
        "שלום\u200f",
        "\u200d",
        "\ud800",
        "a\udfffb",
        "e\u0301",
        "👩‍👩‍👧",
        "\uffff",
        "x" * 10_000,
    ),
    *("null", "NaN", "{", "]", "<script>", "[/red]", "{{ 7 * 7 }}", "%s%n", "../../etc/passwd", "~nobody/x"),
    *("en", "de", "EN", "en-", "i-klingon", "x-private", "und", "english", "ｅｎ", "user", "assistant", "role"),
]
TEXTS = st.one_of(
    st.sampled_from(NASTY), st.text(max_size=20), st.text(st.characters(codec=None, categories=["Cc", "Cf", "Cs"]))
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**30),
    st.floats(),
    TEXTS,
    st.sampled_from([0, 1, -1, 1e308]),
)
GARBAGE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
CHAT_ROLES = ("user", "assistant", "assistant")
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant"]) | TEXTS | GARBAGE,
            "content": st.just("Hello") | GARBAGE,
            "weight": GARBAGE,
        },
    ),
    max_size=3,
)


def as_line(value: Any) -> bytes:
    """JSON as careless programs write it: NaN, and lone surrogates as escapes."""
    return json.dumps(value).encode()


def rows_like(columns: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows of garbage, and rows that are good but for one or two of their values."""
    values = st.one_of(GARBAGE, MESSAGES, st.sampled_from(["en", "de", "Hello", "Guten Tag"]))
    chat = {name: [{"role": role, "content": name}] for name, role in zip(columns, CHAT_ROLES, strict=False)}
    good = st.sampled_from([{name: name for name in columns} | {"language": "en"}, chat | {"language": "de"}])
    changes = st.dictionaries(st.sampled_from([*columns, "source"]), values, max_size=2)
    return st.one_of(
        st.fixed_dictionaries({}, optional={name: values for name in (*columns, "source")}),
        st.tuples(good, changes).map(lambda parts: parts[0] | parts[1]),
    )


def lines_like(columns: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    rows = rows_like(columns)
    text = rows.map(lambda row: json.dumps(row, ensure_ascii=False))
    return st.one_of(
        rows.map(as_line),
        text.map(lambda line: line.encode("utf-8", "surrogatepass")),
        text.map(lambda line: line.encode("latin-1", "replace")),
        text.map(lambda line: line.encode("utf-16", "surrogatepass")),
        text.map(lambda line: b"\xef\xbb\xbf" + line.encode("utf-8", "replace")),
        st.tuples(rows.map(as_line), st.integers(0, 40)).map(lambda cut: cut[0][: cut[1]]),
        st.sampled_from([b"", b"   ", b"\r", b"null", b"[]", b"[" * 5000, b'{"a":' * 990 + b"1" + b"}" * 990]),
        st.sampled_from([b"9" * 5000, b'"', b"{}", b"\x1b[2J", b'{"prompt": 1' + b"0" * 5000 + b"}"]),
        GARBAGE.map(as_line),
        st.binary(max_size=40),
    )


def parquet_types() -> st.SearchStrategy[Callable[[int], pa.Array]]:
    """Columns of every kind, by their number of rows."""
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    messages = pa.array([[{"role": "user", "content": None}]])
    values = [
        *(pa.array([value]) for value in (None, 1, 1.5, math.nan, True, b"\xff", "\x1b[31m", "x" * 1_000_000)),
        *(pa.array([value], kind) for value, kind in [(2**62, pa.timestamp("us")), (2**30, pa.date32())]),
        *(pa.array([value], kind) for value, kind in [(2**62, pa.duration("us")), (1, pa.timestamp("ns"))]),
        *(pa.array([["a"]]), pa.array([{"a": 1}]), messages, broken, pa.array(["a"]).dictionary_encode()),
        *(pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), pa.array(["y"], pa.large_string())),
        *(pa.array(["en"]), pa.array([["en"]]), pa.array([None], pa.string()), pa.array([1], pa.decimal128(5))),
    ]
    return st.sampled_from(values).map(lambda value: lambda rows: value.take(pa.array([0] * rows)))


# --- what must hold -----------------------------------------------------------------------------------------

OURS = (InputError, SettingsError, ModelError, MissingChatTemplate, RubricError)


def check_text(text: str) -> None:
    """A message must be fit for a terminal, whatever is quoted in it."""
    assert printable(text, lines=True) == text and len(text) < 20_000


@dataclass
class Place:
    """Where an example's files are; one after the other under the same names."""

    folder: Path
    model: Path

    def context(self, recipe: Recipe, name: str) -> Context:
        run = RunDirectory.open(self.folder / name)
        run.delete()
        return Context(recipe, Profile(name="test"), run, 0, run.stage(name, 0), lambda text: None)


GOOD_PROMPTS = [
    {"prompt": f"{text} {n}", "language": tag} for tag, text in (("en", "Count"), ("de", "Zähle")) for n in (1, 2)
]
GOOD_PAIRS = [
    {
        "prompt": f"Count to {n}",
        "chosen": "1 2 3",
        "rejected": "The fox \x1b[31m",
        "language": tag,
        "source": {"row": n},
    }
    for tag in ("en", "de")
    for n in (1, 2, 3, 4)  # more than bad ones, or those would decide the shape
]
GOOD_CHATS = [
    row
    | {
        name: [{"role": role, "content": row[name]}]
        for name, role in zip(("prompt", "chosen", "rejected"), CHAT_ROLES, strict=True)
    }
    for row in GOOD_PAIRS
]


def mixed(good: list[dict[str, Any]], bad: list[bytes]) -> bytes:
    """The good rows with the bad lines between, before and after them."""
    lines = [as_line(row) for row in good]
    for i, line in enumerate(bad):
        lines.insert(i * 7 % (len(lines) + 1), line)
    return b"\n".join(lines)


def check_quarantine(context: Context) -> None:
    folder = context.output / "quarantine"
    for row in folder.read_table().to_pylist() if folder.files(".parquet") else []:
        assert row["reason"].isidentifier() and row["row_id"]
        check_text(row["row_id"] + row["detail"] + (row["language"] or ""))


def collect_prompts(path: Path, place: Place) -> set[str]:
    """The ids of the prompts that the stage takes from a file, or InputError."""
    source = {"name": str(path)}
    wanted = {"train": source, "evaluation": source, "languages": ["en", "de"], "evaluation_per_language": 1}
    context = place.context(validate(Recipe, {"name": "x", "prompts": wanted}, "test"), "prompts")
    try:
        outcome = prompts.run(context)
    finally:
        check_quarantine(context)
    table = context.output.read_table()
    assert outcome.rows == len(table)
    return set(table["prompt_id"].to_pylist())


def collect_pairs(path: Path, place: Place, chat: bool) -> tuple[set[str], pa.Table]:
    """The pairs that `congrad filter` would sketch, and what it would write if it kept all, or InputError."""
    source = Source(name=str(path))
    context = place.context(Recipe(name="x", prompts=Prompts(train=source, languages=["und"])), "pairs")
    with tempfile.TemporaryDirectory() as folder:
        found = read_preferences(Reading([source], chat=chat), Path(folder), 1.0)
        found.write_to(context.output)
    check_quarantine(context)
    pairs = context.output.read_table()
    assert len(pairs) == found.pairs
    texts = {as_key(tokenize_arguments(row), row["language"]) for row in pairs.to_pylist()}
    sink = io.BytesIO()
    scores = pa.array([0.5] * len(pairs))
    write_own_rows([source], pairs["row"].to_numpy(), {"congrad_score": scores}, sink)
    table = pq.read_table(sink)
    assert len(table) == len(pairs)
    return texts, table


def as_key(texts: dict[str, Any], language: str) -> str:
    return json.dumps([*(texts[name] for name in OF_PAIR), language])


def ids_of(rows: list[dict[str, Any]]) -> set[str]:
    return {prompt_id(r["language"], [{"role": "user", "content": r["prompt"]}]) for r in rows}


def texts_of(rows: list[dict[str, Any]]) -> set[str]:
    return {as_key(row, row["language"]) for row in rows}


def check_prompt_lines(bad: list[bytes], place: Place) -> None:
    path = place.folder / "prompts.jsonl"
    path.write_bytes(mixed(GOOD_PROMPTS, bad))
    assert ids_of(GOOD_PROMPTS) <= collect_prompts(path, place)
    path.write_bytes(b"\n".join(bad))
    check_refused_or_read(path, lambda: collect_prompts(path, place))


def check_pair_lines(bad: list[bytes], place: Place) -> None:
    path = place.folder / "pairs.jsonl"
    for good, chat, read_as in (
        (GOOD_PAIRS, False, GOOD_PAIRS),
        (GOOD_PAIRS, True, GOOD_CHATS),
        (GOOD_CHATS, False, GOOD_CHATS),
    ):
        path.write_bytes(mixed(good, bad))
        texts, _ = collect_pairs(path, place, chat)
        assert texts_of(read_as) <= texts
    path.write_bytes(b"\n".join(bad))
    check_refused_or_read(path, lambda: collect_pairs(path, place, True))


def check_refused_or_read(path: Path, *collects: Callable[[], object]) -> None:
    """Each reads the file, or ends in an error that names it."""
    for collect in collects:
        try:
            collect()
        except InputError as error:
            check_text(str(error))
            assert path.name in str(error)


def check_parquet(kinds: dict[str, Callable[[int], pa.Array]], place: Place) -> None:
    """Columns of other types in a file of their own, and beside good rows."""
    path = place.folder / "rows.parquet"
    good = pa.Table.from_pylist(GOOD_PAIRS)
    extra = {name: make(len(good)) for name, make in kinds.items() if name not in good.column_names}
    for name, column in extra.items():
        good = good.append_column(name, column)
    pq.write_table(good, path)
    assert ids_of(GOOD_PAIRS) <= collect_prompts(path, place)
    texts, table = collect_pairs(path, place, False)
    assert texts_of(GOOD_PAIRS) <= texts
    kept = set(good.column_names) - {"congrad_score"}
    assert {name: table.schema.field(name).type for name in kept} == {name: good[name].type for name in kept}
    pq.write_table(pa.table({name: make(2) for name, make in kinds.items()}), path)
    check_refused_or_read(path, lambda: collect_prompts(path, place), lambda: collect_pairs(path, place, True))


def check_damaged_parquet(damage: tuple[int, int, bytes], place: Place) -> None:
    """Cut after some bytes, or with some others inside."""
    path = place.folder / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist(GOOD_PAIRS * 50), path)
    data = path.read_bytes()
    cut, start, other = damage
    start %= len(data)
    path.write_bytes((data[:start] + other + data[start + len(other) :])[: len(data) - cut])
    check_refused_or_read(path, lambda: collect_prompts(path, place), lambda: collect_pairs(path, place, False))


def check_settings(data: bytes, place: Place) -> None:
    path = place.folder / "settings.yaml"
    path.write_bytes(data)
    for load in (load_recipe, load_profile):
        try:
            loaded = load(path)
        except SettingsError as error:
            check_text(str(error))
            assert path.name in str(error)
        else:
            fingerprint("x", loaded.model_dump(mode="json"), {})
            assert validate(type(loaded), parse_yaml(to_yaml(loaded)), "again") == loaded


def check_override(override: str, place: Place) -> None:
    try:
        loaded = validate(Recipe, apply_overrides(DEMO, [override]), "recipe")
    except SettingsError as error:
        check_text(str(error))
    else:
        fingerprint("x", loaded.model_dump(mode="json"), {})
        to_yaml(loaded).encode()


def check_judgement(judged: tuple[str, dict[int, float]], place: Place) -> None:
    text, logprobs = judged
    for candidate in (text, f"Score: {text}", f"{text}\nScore: 4/{text}"):
        for language in ("en", "fr", "xx"):
            assert (score := read_score(candidate, language)) is None or 0 <= score <= 5
    assert read_win(f"Verdict: {text}", "model_first") in (None, 0.0, 0.5, 1.0)
    score, mass = expected_score(logprobs, [[k] for k in range(6)])
    assert score is None or (math.isfinite(mass) and 0 <= score <= 5 + 1e-9)


def check_scores(scores: list[float | None], place: Place) -> None:
    """NaN and infinity where stages read scores."""
    responses = [JudgedResponse(str(i), i, f"text {i}", s, False, False) for i, s in enumerate(scores)]
    pair = best_and_worst(responses, 0.0, "reject_only", "reject_only")
    if isinstance(pair, BestAndWorst):
        assert math.isfinite(pair.chosen.score) and pair.chosen.score > pair.rejected.score  # type: ignore[arg-type, operator]
    numbers = np.array([math.nan if score is None else score for score in scores])
    ids = [str(i) for i in range(len(scores))]
    table = pa.table(
        {"chosen_score": pa.array(scores, pa.float32()), "rejected_score": np.zeros(len(scores), "f4")}
    )
    table = table.append_column("pair_id", pa.array(ids, pa.string()))
    by_gap = Select(strategy="reward_gap", keep_rule="overall")
    nothing = Agreement(*[np.zeros(len(scores))] * 4)  # which this strategy does not go by
    for keep in (
        lambda: keep_top_fraction(numbers, ids, 0.5),
        lambda: keep_above(numbers, ids, 0.0),
        lambda: keep_within_tokens(numbers, ids, [1] * len(ids), 2),
        lambda: keep_pairs(by_gap, score_of(by_gap, table, nothing), table),
    ):
        if np.isfinite(numbers).all():
            assert keep().dtype == bool
        else:
            with pytest.raises(ValueError, match=r"not finite.*look for NaN"):
                keep()


def check_model(damage: tuple[str, str, bytes, str, Any], place: Place) -> None:
    """One file of a good model's folder missing, cut, replaced, or with another value of a setting."""
    name, kind, data, key, value = damage
    folder = place.folder / "broken-model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in place.model.iterdir():
        (folder / file.name).symlink_to(file)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind == "cut":
        (folder / name).write_bytes(whole[: len(data) * 20])
    elif kind == "other":
        (folder / name).write_bytes(data)
    elif kind == "setting":
        values = json.loads(whole) if name.endswith(".json") else {}
        (folder / name).write_text(json.dumps({**values, key: value}))
    source = named_model(str(folder), Model(dtype="float32"))
    for load in (lambda: chat_prompt_ids(source.load_tokenizer(), [{"role": "user", "content": "?"}]),) + (
        (lambda: source.load_model("cpu"),) if name not in ("tokenizer.json", "chat_template.jinja") else ()
    ):
        try:
            load()
        except ValueError as error:
            assert isinstance(error, OURS) or "chat template" in str(error), error
            check_text(str(error))
            assert folder.name in str(error)


def check_printable(value: Any, place: Place) -> None:
    for text in (printable(value), brief(value), shown(value)):
        assert text.isprintable() and printable(text) == text
    assert len(shown(value)) < 2500


KEYS = sorted(
    {key for section in DEMO.values() if isinstance(section, dict) for key in section} | set(DEMO) | set(LOCAL)
)
SNIPPETS = [
    *(b"a: 2023-99-99", b"a: " + b"9" * 5000, b"a: " + b"[" * 3000, b"? [a]\n: b", b"a: !!int x", b"a: !!bool x"),
    *(
        b"a: !!timestamp x",
        b'a: !!int ""',
        b"a: &x [*x]",
        b'a: "\\U00110000"',
        b'name: "\\uD800"',
        b"\ta: 1",
        b"a: \x1b",
    ),
    *(
        b"a: !!python/object/apply:os.system [x]",
        b"a: !!python/name:os.system",
        b'"\\e[31m": 2',
        b"1: 2",
        b"<<: 3",
    ),
    *(
        b"name: x\nname: y",
        b"a: !!binary x",
        b"a: !!set {a, b}",
        b"--- a\n--- b",
        b"a: 0x" + b"f" * 5000,
        b"a: *x",
    ),
    *(
        "a: 1".encode("utf-16"),
        "name: é".encode("latin-1"),
        b"\xef\xbb\xbfname: x",
        b"",
        b"a: .nan",
        b"- a",
        b"a: |\n\tb",
    ),
    *(
        b"model: {chat_template: '~nobody/x'}",
        b"sketch: {layers: '('}",
        b"train: {beta: .inf}",
        b"seed: 99999999999999999999",
    ),
]


def with_garbage(values: dict[str, Any], key: str, garbage: Any) -> bytes:
    """Good settings with garbage as one of them, wherever the key is."""
    changed = {
        name: {**section, key: garbage} if isinstance(section, dict) and key in section else section
        for name, section in values.items()
    }
    return yaml.safe_dump({**changed, key: garbage} if key in values or changed == values else changed).encode()


@dataclass(frozen=True)
class Surface:
    """A place where bad input comes in: what is generated, what must hold, and its examples of 10,000."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any, Place], None]
    of_ten_thousand: int


COLUMNS = st.sampled_from(
    ["prompt", "chosen", "rejected", "language", "extra", "congrad_score", "a.b", "\x1b[31m"]
)
SURFACES = {
    "prompt lines": Surface(st.lists(lines_like(("prompt", "language")), max_size=6), check_prompt_lines, 1500),
    "pair lines": Surface(st.lists(lines_like((*OF_PAIR, "language")), max_size=6), check_pair_lines, 1000),
    "parquet": Surface(st.dictionaries(COLUMNS, parquet_types(), min_size=1, max_size=5), check_parquet, 700),
    "damaged parquet": Surface(
        st.tuples(st.sampled_from([0, 0, 1, 8, 100, 2000]), st.integers(0, 10**6), st.binary(max_size=30)),
        check_damaged_parquet,
        700,
    ),
    "settings": Surface(
        st.one_of(
            st.sampled_from(SNIPPETS),
            st.binary(max_size=40),
            GARBAGE.map(lambda value: json.dumps(value).encode()),
            st.builds(with_garbage, st.sampled_from([DEMO, LOCAL]), st.sampled_from(KEYS), GARBAGE),
        ),
        check_settings,
        1500,
    ),
    "overrides": Surface(
        st.one_of(
            TEXTS,
            st.tuples(st.sampled_from([*DEMO, "sketch", "select"]), st.sampled_from(KEYS), TEXTS).map(
                lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"
            ),
            st.tuples(st.sampled_from(KEYS), GARBAGE.map(json.dumps)).map("=".join),
        ),
        check_override,
        1600,
    ),
    "judgements": Surface(
        st.tuples(
            TEXTS | st.text("0123456789٣४４.,/-+ :*\n", max_size=12),
            st.dictionaries(st.integers(0, 7), st.floats()),
        ),
        check_judgement,
        1000,
    ),
    "scores": Surface(st.lists(st.none() | st.floats(width=32), min_size=1, max_size=6), check_scores, 1000),
    "models": Surface(
        st.tuples(
            st.sampled_from(
                ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] * 2
                + ["model.safetensors"]
            ),
            st.sampled_from(["missing", "cut", "other", "setting"]),
            st.binary(max_size=60) | GARBAGE.map(as_line) | st.just(b"{{ messages[0].nothing.at_all }}"),
            st.sampled_from(
                [
                    "model_type",
                    "hidden_act",
                    "eos_token",
                    "tokenizer_class",
                    "vocab_size",
                    "architectures",
                    "dtype",
                ]
            ),
            st.none() | st.booleans() | st.integers(-1, 100) | TEXTS | st.lists(st.integers(0, 9), max_size=2),
        ),
        check_model,
        300,
    ),
    "printable": Surface(GARBAGE, check_printable, 700),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Place]:
    # Every example starts as large a folder as the last one ended; what is written need not outlive the machine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield Place(tmp_path_factory.mktemp("bad"), tiny_model)


def check_examples(surface: Surface, place: Place, number: int) -> int:
    """Checks about this many examples, always the same; returns how many there were."""
    seen = 0

    def check(example: Any) -> None:
        nonlocal seen
        seen += 1
        surface.check(example, place)

    limits = settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(surface.inputs)(check))()
    return seen


@pytest.mark.parametrize("name", SURFACES)
def test_bad_input_ends_in_our_errors_and_no_good_row_is_lost(name: str, place: Place) -> None:
    check_examples(SURFACES[name], place, 50)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_bad_inputs(place: Place) -> None:
    seen = sum(check_examples(surface, place, surface.of_ten_thousand) for surface in SURFACES.values())
    assert seen >= 10_000


# --- what random input hardly ever finds --------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n \n", '{"prompt": "x"}'.encode("utf-16"), b"[1, 2]", b"\xe9\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows \x1b[31m.jsonl"])
def test_a_file_without_any_row_is_reported_with_its_name(place: Place, content: bytes, name: str) -> None:
    path = place.folder / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is empty|one JSON object on each line") as error:
        list(read_records(Source(name=str(path)), ("prompt",)))
    check_text(str(error.value))
    assert printable(path) in str(error.value)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "~nobody-here/rows.jsonl", "a\x00b", "", ".", "some\x1b[31m/data/set"]
)
def test_a_name_that_is_no_file(name: str) -> None:
    with pytest.raises((InputError, SettingsError)) as error:
        list(read_records(Source(name=name), ("prompt",)))
    check_text(str(error.value))


def test_a_role_that_is_no_text_costs_one_row(place: Place) -> None:
    messages = [{"role": "\ud800", "content": "x"}, {"role": "user", "content": "y"}]
    check_prompt_lines([as_line({"prompt": messages, "language": "en"})], place)


def test_files_put_together_with_their_marks(place: Place) -> None:
    path = place.folder / "marks.jsonl"
    path.write_bytes(b"".join(b"\xef\xbb\xbf" + as_line(row) + b"\n" for row in GOOD_PROMPTS))
    assert collect_prompts(path, place) == ids_of(GOOD_PROMPTS)


def test_each_row_goes_by_its_own_shape(place: Place) -> None:
    path = place.folder / "mixed.jsonl"
    rows = [row for both in zip(GOOD_PAIRS, GOOD_CHATS, strict=True) for row in both]
    path.write_bytes(b"\n".join(map(as_line, rows)))
    texts, table = collect_pairs(path, place, False)
    assert texts == texts_of(rows)
    assert datasets.Dataset(table).remove_columns("congrad_score").to_list() == rows


NESTED: Any = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    "values",
    [
        (1, "a"),
        (1, True),
        (2**70, 1),
        ("\ud800", "b"),
        ({}, {"a": 1}),
        ({}, {}),
        ([1, "a"], None),
        (NESTED, 1),
        (NESTED,),
    ],
    ids=lambda values: shown(values)[:40],
)
def test_columns_whose_values_have_no_common_type_are_written_as_json(
    place: Place, values: tuple[Any, ...]
) -> None:
    path = place.folder / "extra.jsonl"
    rows = [row | {"extra": values[i % len(values)], "\udfff": i} for i, row in enumerate(GOOD_PAIRS)]
    path.write_bytes(b"\n".join(map(as_line, rows)))
    texts, table = collect_pairs(path, place, False)
    assert texts == texts_of(GOOD_PAIRS)
    assert [row["extra"] for row in python_rows(table)] == [row["extra"] for row in rows]
    assert set(table.column_names) == {*GOOD_PAIRS[0], "extra", "\\udfff", "congrad_score"}
    assert table["source"].to_pylist() == [row["source"] for row in GOOD_PAIRS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y", "the key 'name' is there twice"),
        ('name: "\\uD800"', "no Unicode text"),
        ('model: {name: "\\uD800"}', "no Unicode text"),
        ("seed: 99999999999999999999", "more than 64 bits"),
        ("select: {threshold: .nan}", "select.threshold: must be a finite number"),
        ("train: {learning_rate: .inf}", "train.learning_rate: must be a finite number"),
        ("sketch: {layers: '('}", "sketch.layers: not a regular expression"),
        ("model: {chat_template: ~nobody-here/x}", "model.chat_template: cannot read"),
        ('"\\e[31m": 2', "\\x1b[31m: no such setting"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: 2023-99-99", "month must be in 1..12"),
        ("a: " + "[" * 3000, "RecursionError"),
    ],
)
def test_settings_that_would_pass_or_fail_elsewhere(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        load_recipe(path)
    assert message in str(error.value)
    check_text(str(error.value))


def test_merged_keys_are_not_twice_there() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}


class Pickled:
    """Leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "no file named model.safetensors"),
        ("tokenizer.json", "tokenizer.json and tokenizer_config.json, as save_pretrained"),
        ("config.json", "config.json"),
    ],
)
def test_a_model_with_a_file_missing(tmp_path: Path, tiny_model: Path, missing: str, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / missing).unlink()
    source = named_model(str(folder), Model())
    with pytest.raises(ModelError, match=message) as error:
        source.load_tokenizer() if missing == "tokenizer.json" else source.load_model("cpu")
    assert str(folder) in str(error.value)


def test_pickled_weights_are_not_loaded(tmp_path: Path, tiny_model: Path) -> None:
    import torch

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Pickled(tmp_path / "loaded")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle, which could run code.*save_pretrained"):
        named_model(str(folder), Model()).load_model("cpu")
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, "9 of its weights are in no file"),
        ({"hidden_size": 96}, "cannot load the model of"),
        ({"hidden_act": "nothing"}, "KeyError"),
    ],
)
def test_weights_that_do_not_belong_to_the_configuration(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | settings))
    with pytest.raises(ModelError, match=message):
        named_model(str(folder), Model()).load_model("cpu")


def test_a_template_that_refuses_a_row_concerns_the_row(tiny_model: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('users only') }}{% endif %}ab"
    tokenizer = named_model(str(tiny_model), Model(chat_template=template)).load_tokenizer()
    answer = [{"role": "assistant", "content": "x"}]
    with pytest.raises(ValueError, match=r"cannot render messages of 'system': TemplateError: users only"):
        tokenize_pair(tokenizer, [{"role": "system", "content": "x"}], answer, answer, 100)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "~nobody-here/model", "/no/such/\x1b[31mfolder", "a\x00b", "no such model"]
)
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError) as error:
        named_model(name, Model()).load_tokenizer()
    check_text(str(error.value))


def test_a_rubric_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_bytes("{prompt} {response} é".encode("latin-1"))
    with pytest.raises(RubricError, match="as UTF-8"):
        load_rubric(str(tmp_path))
    with pytest.raises(SettingsError, match="File name too long"):
        load_rubric("x" * 5000)


def test_nothing_on_the_terminal_acts_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest's own stay
    name = "\x1b[31m[/red][bold]"
    recipe = tmp_path / f"r{name.replace('/', '')}.yaml"
    recipe.write_text(yaml.safe_dump({**DEMO, "name": name}))
    run = tmp_path / "run[red]"
    run.mkdir()
    (run / "recipe.yaml").write_bytes(b"name: \xff")
    for arguments, code, message in (
        (["plan", recipe], 0, "[/red][bold]"),
        (["plan", recipe, "--set", f"train.{name}=1"], 2, "\\x1b[31m"),
        (["plan", recipe, "--set", "name=\udcff"], 2, "udcff"),
        (["status", "--run", run], 2, "cannot read"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = "".join(capsys.readouterr())
        assert (end.value.code or 0) == code and message in said, said
        check_text(said)
