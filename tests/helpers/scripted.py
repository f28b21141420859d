"""A server that answers as a test says: status, headers and the bytes of each answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SSE = {"Content-Type": "text/event-stream"}
LISTED = {"object": "list", "data": [{"id": "m", "object": "model"}]}
Answer = tuple[int, dict[str, str], bytes]


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def piece(content: Any = None, finish: str | None = None, **other: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **other}


DONE = event(b"[DONE]")
TOKEN = event(piece("ab"))
LAST = event(piece(None, "stop"))
COUNTS = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})
WHOLE = TOKEN * 4 + LAST + COUNTS + DONE


def streamed(stream: bytes) -> Callable[[dict[str, Any]], Answer]:
    return lambda body: (200, SSE, stream)


class Scripted:
    """`answer` is made of a request's body; `listed` is the answer to /v1/models: (status, text), or its JSON."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], listed: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, text = listed if isinstance(listed, tuple) else (200, json.dumps(listed))
                self.reply(status if self.path == "/v1/models" else 404, {}, text.encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.bodies.append(body)
                self.reply(*answer(body))

            def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def scripted(answer: Callable[[dict[str, Any]], Answer], listed: Any = LISTED) -> Iterator[Scripted]:
    script = Scripted(answer, listed)
    thread = threading.Thread(target=script.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.server.shutdown()
        script.server.server_close()
        thread.join(10)
