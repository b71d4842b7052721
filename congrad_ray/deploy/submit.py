"""A stage as a job on a cluster that is there: send the code, follow the log, end as the job ends.

Ray's own client does the work, and its token authentication: RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN,
in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from congrad_ray.config.printable import brief

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_CHECKOUT = Path(__file__).resolve().parents[2]
# What is sent to the cluster: the checkout, with the code. An installed package has to be installed there as well,
# and only the current folder is sent.
ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").exists() else Path.cwd()
# Ray's client takes these for the address that it is given.
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_RECONNECT_S = 5.0
_TRIES = 12


class SubmitError(ValueError):
    """The job could not be sent or followed; the text says what to do."""


class StillRunning(Exception):
    """Nobody follows the job any more, and it keeps running; the text says how to follow it again."""


def entrypoint(
    command: str,
    recipe: Path,
    run: str,
    profile: str,
    iteration: int | None = None,
    overrides: Sequence[str] = (),
    redo: bool = False,
    root: Path = ROOT,
) -> str:
    """The job's command line, which finds recipe and profile in the folder that is sent with it.

    Raises SubmitError for a file outside of `root`, which the cluster would not have.
    """
    words = [
        *("python", "-m", "congrad_ray", command),
        _inside(recipe, root),
        *("--run", run, "--profile", _profile(profile, root)),
    ]
    words += [] if iteration is None else ["--iteration", str(iteration)]
    for override in overrides:
        words += ["--set", override]
    return shlex.join([*words, *(["--redo"] if redo else [])])


def filter_entrypoint(
    arguments: Sequence[str], files: Collection[str], out: str, profile: str, redo: bool = False, root: Path = ROOT
) -> str:
    """The command line of `congrad filter` as a job; `arguments` are all others of the command.

    Those of them that are `files`, preferences or a model's folder, are found in the folder that is sent, unless
    their path begins with / and all nodes share it. Raises SubmitError for a file outside of `root`.
    """
    words = [_sent(word, root) if word in files else word for word in arguments]
    of_job = ["--out", out, "--profile", _profile(profile, root), *(["--redo"] if redo else [])]
    return shlex.join(["python", "-m", "congrad_ray", "filter", *words, *of_job])


def _sent(name: str, root: Path) -> str:
    is_here = "://" not in name and not name.startswith("/") and Path(name).exists()
    return _inside(Path(name), root) if is_here else name


def _profile(name: str, root: Path) -> str:
    return _inside(Path(name), root) if Path(name).suffix in (".yaml", ".yml") else name


def _inside(path: Path, root: Path) -> str:
    try:
        return path.resolve().relative_to(root).as_posix()
    except ValueError:
        raise SubmitError(
            f"{brief(path)} is not in {root}, which is what is sent to the cluster: copy it there, for example to "
            f"{'cluster' if path.parent.name == 'profiles' else 'jobs/recipes'}/"
        ) from None


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server, http://HEAD:8265. Raises SubmitError for no answer or a wrong token."""
    from ray.job_submission import JobSubmissionClient

    try:
        with _only_this_address():
            return JobSubmissionClient(address)
    except Exception as error:  # Ray raises its own, requests' and built-in ones here
        raise SubmitError(
            f"cannot reach the job server at {address}: {error}\nIs it the dashboard's address, http://HEAD:8265? "
            "For a head that is not in your network open a tunnel: ray dashboard cluster/aws.yaml, or kubectl "
            "port-forward service/NAME-head-svc 8265. For a cluster with a token set RAY_AUTH_MODE=token, and the "
            "token in ~/.ray/auth_token or RAY_AUTH_TOKEN."
        ) from error


@contextmanager
def _only_this_address() -> Iterator[None]:
    found = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


def send(client: JobSubmissionClient, command: str, root: Path = ROOT) -> str:
    """Submits a command line with the folder `root`, less what its .rayignore names, and returns the job's id.

    The command holds no CPUs: it runs on the head, which may have none. Raises SubmitError.
    """
    try:
        return client.submit_job(entrypoint=command, runtime_env={"working_dir": str(root)}, entrypoint_num_cpus=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise SubmitError(f"the cluster did not take the job: {error}") from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Writes the job's log as it comes, and returns its exit status: 0 done, its own when it failed, 130 stopped.

    A broken connection is made again, and the log continues where it was. Raises SubmitError when it cannot be.
    """
    import aiohttp

    log = _Log(write)
    failures = 0
    while True:
        try:
            asyncio.run(log.tail(client, job))
            details = client.get_job_info(job)
            if details.status.is_terminal():
                break
            failures = 0
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            failures += 1
            if failures > _TRIES:
                raise SubmitError(
                    f"lost the job server: {error}\nThe job keeps running. {again(client, job)}"
                ) from error
        time.sleep(_RECONNECT_S)
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return 130
    code = details.driver_exit_code
    if code is None:
        write(f"{details.message}\n")  # it did not get as far as to have a log
    return 1 if not code else 128 - code if code < 0 else code  # as a shell reports a signal


class _Log:
    """A job's log, of which every character is written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        """Writes what comes until the job ends; Ray begins with the log's first line every time."""
        seen = 0
        async for lines in client.tail_job_logs(job):
            if seen + len(lines) > self._written:
                self._write(lines[max(0, self._written - seen) :])
            seen += len(lines)
            self._written = max(self._written, seen)


def again(client: JobSubmissionClient, job: str) -> str:
    """How to find a job again."""
    address = client.get_address()
    return (
        f"Follow it again: ray job logs --follow --address {address} {job}\n"
        f"Stop it: ray job stop --address {address} {job}"
    )
