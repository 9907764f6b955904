"""A tiny HTTP server that speaks the OpenAI protocol over a real socket and gives scripted answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, Any]  # the text of an answer, or an HTTP status with a JSON or raw body


@dataclass
class Server:
    """The address of the server, the requests that it got, and the largest number (`most`) of concurrent ones."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    busy: int = 0
    most: int = 0
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


def text_of(request: dict[str, Any]) -> str:
    """The text of all messages of a request."""
    return "\n".join(message["content"] for message in request["messages"])


@contextmanager
def serving(respond: Callable[[dict[str, Any], int], Reply], seconds: float = 0.0) -> Iterator[Server]:
    """Serve `respond(request, number)` after `seconds`, as 10 + 5 tokens; errors ask for an immediate retry."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {"object": "list", "data": [{"id": "some", "object": "model"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(request)
                server.headers.append(dict(self.headers))
                number = len(server.requests)
                server.busy += 1
                server.most = max(server.most, server.busy)
            time.sleep(server.seconds)
            reply = respond(request, number)
            with server.lock:
                server.busy -= 1
            if isinstance(reply, str):
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
                usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
                reply = 200, {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
                              "choices": [choice], "usage": usage}  # fmt: skip
            self.send(*reply)

        def send(self, status: int, body: Any) -> None:
            raw = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            if status != 200:
                self.send_header("retry-after-ms", "1")
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
                self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_port}/v1", seconds=seconds)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
