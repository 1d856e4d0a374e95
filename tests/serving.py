"""A real local server that speaks OpenAI's chat API, and does what real servers do."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Reply = Callable[[dict[str, Any], int], tuple[int, str | Iterable[str]]]


def said(text: str | None, ended: str = "stop") -> tuple[int, str]:
    """The reply of a model that says this."""
    choice = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": text}}
    return 200, json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


Running = TypeVar("Running", bound=ThreadingHTTPServer)


@contextmanager
def running(server: Running) -> Iterator[Running]:
    """Have it serve while the block runs."""
    with server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class Server(ThreadingHTTPServer):
    """Replies to each request, of which it is told the number, by `reply`."""

    daemon_threads = True
    reply: Reply = staticmethod(lambda request, number: said("yes"))

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Message] = []

    @property
    def keys(self) -> list[str | None]:
        return [headers["Authorization"] for headers in self.headers]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        self.server.requests.append(request)
        self.server.headers.append(self.headers)
        status, body = self.server.reply(request, len(self.server.requests))
        html = isinstance(body, str) and body.startswith("<")
        with suppress(BrokenPipeError, ConnectionResetError):  # of a client that waited no longer
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if html else "application/json")
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            for part in [body] if isinstance(body, str) else body:  # an iterable's come one after another
                self.wfile.write(part.encode())

    def log_message(self, *args: Any) -> None:
        pass
