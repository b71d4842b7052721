"""For the tests: a tiny real model (a tokenizer trained here, a random Llama), preferences, and an S3 server."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest

from commands import Ended
from heads import RAY, connect_shared, free_port, head_environment
from tiny_models import TEXTS, make_tiny_model

# Whether an example is slow says something of the machine, not of the code.
hypothesis.settings.register_profile("congrad_ray", deadline=None)
hypothesis.settings.load_profile("congrad_ray")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Some virtual machines announce AMX and then trap on it, in any bfloat16 product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[None]:
    """The package's records reach `caplog` from INFO on, whatever a command of the test or of one before did."""
    logger = logging.getLogger("congrad_ray")
    logger.handlers.clear()
    logger.setLevel(logging.INFO)
    logger.propagate = True
    yield
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The package's warnings so far."""

    def warnings() -> list[str]:
        ours = [record for record in caplog.records if record.name.startswith("congrad_ray")]
        return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]

    return warnings


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Beside busy processes two threads mostly wait for each other, at every small product of a tiny model."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random chat model."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"), TEXTS)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and tools: CONGRAD_SHARED, or `shared` beside the repository; it may be missing."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("CONGRAD_SHARED", beside)).expanduser()


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """The folder of real multilingual text, where there is one."""
    path = shared / "data"
    if not path.is_dir():
        pytest.skip(f"no real data in {path} (CONGRAD_SHARED)")
    return path


@pytest.fixture(scope="session")
def preference_rows() -> Callable[[int, Sequence[str]], list[dict[str, object]]]:
    """So many preferences in the languages in turn."""

    def rows(count: int, languages: Sequence[str]) -> list[dict[str, object]]:
        return [
            {
                "prompt": f"Count to {n}",
                "chosen": " ".join(str(i) for i in range(n % 9 + 2)),
                "rejected": f"The fox says {n}",
                "language": languages[n % len(languages)],
            }
            for n in range(count)
        ]

    return rows


@pytest.fixture(scope="session")
def filter_command() -> Callable[[Path, Path, str | Path], list[str]]:
    """The command that filters preferences for a model into a folder or URI."""

    def command(preferences: Path, model: Path, out: str | Path) -> list[str]:
        return [
            *(sys.executable, "-m", "congrad_ray", "filter", str(preferences), "--model", str(model)),
            *("--out", str(out), "--width", "512", "--max-length", "256", "--chat"),
        ]

    return command


@pytest.fixture(scope="session")
def filter_here(filter_command: Callable[[Path, Path, str | Path], list[str]]) -> Callable[..., None]:
    """Filters in this process and on the Ray that tests share, which saves starting both."""

    def run(preferences: Path, model: Path, out: str | Path, *more: str) -> None:
        from congrad_ray.cli.main import app

        connect_shared()
        command = filter_command(preferences, model, out)
        app([*command[command.index("filter") :], *more], standalone_mode=False)

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on loopback, in a process of its own; what it holds is in its memory."""
    missing = [name for name in ("moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no S3 server to test against: {', '.join(missing)} not installed (the extra `dev` has them)")
    port = free_port()
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < end, "the S3 server did not start"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def ray_command() -> str:
    """Ray's command line, which a head's jobs find too."""
    return str(RAY)


@pytest.fixture(scope="session")
def ray_environment() -> dict[str, str]:
    """The environment of a head and its submitters: they share a token, which Ray 2.60 asks for by default."""
    return head_environment()


@pytest.fixture
def shared_ray() -> None:
    """This process is connected to the Ray that tests share.

    For tests that need a Ray and are not about its life. Those that are end it before they begin, and the next
    that needs it gets a new one.
    """
    connect_shared()


@pytest.fixture
def no_ray() -> Iterator[None]:
    """This process is connected to no Ray, and to none afterwards: for tests that start one of their own."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture
def store_query(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What follows the ? in a URI on the S3 server; the environment has keys for it, and no other settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"endpoint_override={s3_server}&scheme=http&region=us-east-1"


@pytest.fixture
def store_uri(store_query: str) -> str:
    """A run directory, still to be made, in a new bucket."""
    import pyarrow.fs as pafs

    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    store, _ = pafs.FileSystem.from_uri(f"s3://{bucket}?{store_query}&allow_bucket_creation=true")
    store.create_dir(bucket)
    return f"s3://{bucket}/run?{store_query}"


@pytest.fixture
def congrad(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ended]]:
    """Runs a command in this process to its end, on a screen of 140 columns: it takes no seconds to start."""
    from congrad_ray.cli.display import console
    from congrad_ray.cli.main import main
    from congrad_ray.cli.options import screen

    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest's own stay
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(console, "_width", 140)

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, written.out, written.err)

    yield run
    screen.json = False
