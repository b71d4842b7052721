"""`congrad submit` against a real head without CPUs for work, with Ray's token."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from congrad_ray.deploy.submit import ROOT, SubmitError, entrypoint, filter_entrypoint, follow
from heads import ray_head

DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
Done = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(ray_environment: dict[str, str]) -> dict[str, str]:
    return ray_environment | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def dashboard(ray_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head of no CPUs, as a cluster's head is."""
    with ray_head(tmp_path_factory.mktemp("head"), 0, ray_environment) as head:
        yield head.dashboard


@pytest.fixture(scope="module")
def done(environment: dict[str, str]) -> Done:
    """Runs a command to its end, with changes to the environment."""

    def run(command: list[str], **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment | changed, timeout=400, capture_output=True, text=True, check=False
        )

    return run


def submit(address: str, run: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "congrad_ray", "submit", "prompts", str(DEMO)),
        *("--run", str(run), "--address", address, *more),
    ]


def test_a_stage_runs_on_the_head_and_its_log_and_exit_code_come_back(
    dashboard: str, tmp_path: Path, done: Done
) -> None:
    # Another cluster's address in the environment is not the one that was asked for.
    job = done(submit(dashboard, tmp_path / "run"), RAY_ADDRESS="http://127.0.0.1:9")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "prompts: starting" in job.stdout
    assert (tmp_path / "run" / "prompts" / "_manifest.json").is_file()
    # Other settings than those of the stage that is done: refused by the job, with exit code 2.
    refused = done(submit(dashboard, tmp_path / "run", "--set", "seed=7"))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "--redo" in refused.stdout


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_find_it(
    dashboard: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    following = subprocess.Popen(
        submit(dashboard, tmp_path / "run"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None and following.stderr is not None
    line = following.stdout.readline()
    assert "job raysubmit_" in line, line + following.stderr.read()
    following.send_signal(signal.SIGINT)
    _, message = following.communicate(timeout=60)
    assert following.returncode == 130
    assert (
        "The job keeps running." in message
        and f"ray job logs --follow --address {dashboard} raysubmit_" in message
    )
    end = time.monotonic() + 200
    while not (tmp_path / "run" / "prompts" / "_manifest.json").is_file():
        assert time.monotonic() < end, "the job did not go on"
        time.sleep(0.5)


def test_a_wrong_token_and_a_wrong_address_are_reported(dashboard: str, tmp_path: Path, done: Done) -> None:
    wrong = done(submit(dashboard, tmp_path / "run"), RAY_AUTH_TOKEN="0" * 32)
    assert wrong.returncode == 2 and "RAY_AUTH_TOKEN" in wrong.stderr
    nowhere = done(submit("http://127.0.0.1:9", tmp_path / "run"))
    assert nowhere.returncode == 2 and "cannot reach the job server at http://127.0.0.1:9" in nowhere.stderr


def test_what_the_cluster_would_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match=r"is not in .*copy it there"):
        entrypoint("run", tmp_path / "mine.yaml", "s3://bucket/run", "local")
    with pytest.raises(SubmitError, match="copy it there"):
        entrypoint("run", DEMO, "s3://bucket/run", str(tmp_path / "mine.yaml"))


def test_the_job_is_the_same_command_in_the_folder_that_is_sent() -> None:
    command = entrypoint("sketch", DEMO, "s3://bucket/run", "aws-spot", 1, ["train.beta=0.2", "name='a b'"], True)
    assert command == (
        "python -m congrad_ray sketch jobs/recipes/demo.yaml --run s3://bucket/run --profile aws-spot "
        "--iteration 1 --set train.beta=0.2 --set 'name='\"'\"'a b'\"'\"'' --redo"
    )


def test_a_filter_runs_on_the_cluster(
    dashboard: str, tmp_path: Path, done: Done, tiny_model: Path, environment: dict[str, str]
) -> None:
    """As far as the head without CPUs lets it: its input is read, and a bad one ends as it does here."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "chosen": "y", "language": "en"}')
    command = [sys.executable, "-m", "congrad_ray", "submit", "filter", str(tmp_path / "rows.jsonl")]
    command += ["--model", str(tiny_model), "--out", str(tmp_path / "out"), "--keep=0.3", "--address", dashboard]
    job = done(command)
    assert job.returncode == 2, job.stdout + job.stderr
    assert "rows.jsonl has no column 'rejected'; columns found: chosen, language, prompt" in job.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["filter", "x.jsonl", "--out", "/o"], "Missing option '--model'"),
        (["filter", "x.jsonl", "--model", "m", "--out", "/o", "--modle", "m"], "No such option"),
        (["filter", "x.jsonl", "--model", "m", "--out", "o"], "--out o: a cluster's nodes share no such folder"),
        (["filter", "x.jsonl", "--model", "m", "--out", "/o", "--set", "a=b"], "--set are of stages"),
        (["sketch", str(DEMO)], "submit sketch needs --run DIR"),
        (["sketch", str(DEMO), "--run", "/r", "--rde"], "takes one RECIPE and --run, and no --rde"),
    ],
)
def test_a_submission_that_cannot_be_is_refused_here(congrad: Any, arguments: list[str], text: str) -> None:
    refused = congrad("submit", *arguments)
    assert refused.code == 2 and text in refused.err


def test_a_filter_as_a_job_is_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "jobs")
    rest = ["recipes/demo.yaml", "s3://b/x.jsonl", "/shared/y.jsonl", "--model", "my/model", "--columns", "a=b c"]
    command = filter_entrypoint(rest, {*rest[:3], "my/model"}, "s3://b/out", "aws-spot", True)
    assert command == (
        "python -m congrad_ray filter jobs/recipes/demo.yaml s3://b/x.jsonl /shared/y.jsonl --model my/model "
        "--columns 'a=b c' --out s3://b/out --profile aws-spot --redo"
    )
    (tmp_path / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SubmitError, match=r"mine.jsonl is not in .*copy it there"):
        filter_entrypoint(["mine.jsonl"], {"mine.jsonl"}, "s3://b/out", "local")


class Broken:
    """A job server whose connection breaks once, in the middle of the log."""

    def __init__(self, code: int | None) -> None:
        self.code, self.tails = code, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "one\ntw"
        await asyncio.sleep(0)
        if self.tails == 1:
            raise RuntimeError("closed")
        yield "o\nthree\n"

    def get_job_info(self, job: str) -> Any:
        status = SimpleNamespace(is_terminal=lambda: True)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="could not start")


@pytest.mark.parametrize(("code", "exit_code"), [(2, 2), (None, 1), (-9, 137)])
def test_a_connection_that_breaks_loses_and_repeats_nothing(
    code: int | None, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    client: Any = Broken(code)
    written: list[str] = []
    assert follow(client, "job", written.append) == exit_code
    assert "".join(written).removesuffix("could not start\n") == "one\ntwo\nthree\n"
