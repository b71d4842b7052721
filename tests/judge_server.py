"""A double of a server with OpenAI's chat completions: what it answers is decided by the test, not by a model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-double-0123456789"


@dataclass
class Reply:
    """What is sent back: a status, a body (JSON, or bytes as they are), headers, after a while."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0


@dataclass
class Double:
    """The server's address, and what it was asked."""

    url: str
    asked: list[dict[str, Any]]
    keys: list[str]
    most_at_once: int = 0
    at_once: int = 0


def chat(text: str | None, finish: str = "stop", usage: bool = True, **more: Any) -> dict[str, Any]:
    """The body of a chat completion of 7 tokens read and 3 written."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    body = {
        "id": "double",
        "object": "chat.completion",
        "created": 0,
        "model": "double",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None, **more}],
    }
    tokens = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return body | ({"usage": tokens} if usage else {})


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Double]:
    """Serves while the body runs. `reply` gets a request and how often the same messages were asked before."""
    lock = threading.Lock()
    seen: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                double.asked.append(request)
                double.keys.append(self.headers.get("Authorization", ""))
                double.at_once += 1
                double.most_at_once = max(double.most_at_once, double.at_once)
                text = json.dumps(request["messages"])
                before = seen.get(text, 0)
                seen[text] = before + 1
            answer = reply(request, before)
            time.sleep(answer.after_s)
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            with lock:
                double.at_once -= 1
            try:
                self.send_response(answer.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                for name, value in (headers | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # who asked waits no longer
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    double = Double(f"http://127.0.0.1:{server.server_port}/v1", [], [])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
