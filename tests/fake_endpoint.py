"""An OpenAI-compatible HTTP server that misbehaves as a test asks it to."""

import collections
import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the server sends back; with status 0 it closes the connection instead."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


DROP = Reply(status=0)


def completion(content: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion, as JSON."""
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]}


def answer(content: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    """A reply with a chat completion."""
    return Reply(body=json.dumps(completion(content, finish_reason, **message)).encode())


def error(status: int, message: str, param: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI words it."""
    body = {"error": {"message": message, "type": "error", "param": param, "code": None}}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(body).encode(), headers)


_ROW = re.compile(r"<(text-[0-9a-f]{16})>\n(.*)\n</\1>", re.DOTALL)


def row_in(prompt: str) -> str:
    """The row of a prompt that holds nothing else, without its tags; any other prompt as it is."""
    found = _ROW.fullmatch(prompt)
    return found[2] if found else prompt


# The n-th request (from 1) with this prompt gets this reply.
Behaviour = Callable[[str, int], Reply]


class FakeEndpoint:
    """What the server is to do, and what it saw."""

    def __init__(self, behaviour: Behaviour):
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()  # that came with the requests
        self.answered: collections.Counter[str] = collections.Counter()  # paid for, by prompt
        self.most_at_once = 0
        self.base_url = ""
        self.closing = threading.Event()
        self._at_once = 0
        self._lock = threading.Lock()

    @property
    def prompts(self) -> list[str]:
        """The prompts that came, in order, as `row_in` shows them."""
        return [row_in(body["messages"][0]["content"]) for body in self.bodies]

    def hang(self) -> Reply:
        """For a behaviour: keeps the connection open without a byte."""
        self.closing.wait(60)
        return DROP

    def serve(self, key: str, path: str, body: dict[str, Any]) -> Reply:
        """Answers one request."""
        prompt = row_in(body["messages"][0]["content"])
        with self._lock:
            self.bodies.append(body)
            self.keys.add(key)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            number = self.prompts.count(prompt)
        try:
            if path != "/v1/chat/completions":
                return error(404, f"no {path}")
            reply = self.behaviour(prompt, number)
            if reply.status == 200:
                with self._lock:
                    self.answered[prompt] += 1
            return reply
        finally:
            with self._lock:
                self._at_once -= 1


@contextlib.contextmanager
def fake_endpoint(behaviour: Behaviour) -> Iterator[FakeEndpoint]:
    """A server on a free port, for as long as the context lasts."""
    endpoint = FakeEndpoint(behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # a reply is one packet, which nobody waits for in vain

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            reply = endpoint.serve(key, self.path, body)
            self.close_connection = reply.status == 0
            if reply.status:
                # Whoever asked may be gone.
                with contextlib.suppress(ConnectionError):
                    self.send_response(reply.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(reply.body)))
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    with Server(("127.0.0.1", 0), Handler) as server:
        endpoint.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.closing.set()
            server.shutdown()
            thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns once a condition holds; fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute in vain"
        time.sleep(0.01)
