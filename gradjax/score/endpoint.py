"""A chat model behind any OpenAI-compatible endpoint, which is paid once for each answer.

Every answer is kept as soon as it is there, in an SQLite file, under a hash of who was asked what
(endpoint, model, prompt). Of answers that cannot be used the file counts the attempts, which end
after three, in however many calls; faults of the endpoint are not kept. The key is read from the
environment each time that it is needed, and goes nowhere but into the request.
"""

import asyncio
import dataclasses
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from absl import logging

from gradjax.errors import GradjaxError
from gradjax.hashing import sha256
from gradjax.score.answers import (
    KEY_VARIABLE,
    Failure,
    api_key,
    content_of,
    keep,
    keep_unusable,
    open_cache,
    shorten,
    unparsable,
    unusable,
)
from gradjax.score.budget import Budget, estimated_tokens, used_tokens
from gradjax.score.config import Done, nobody

# Of each attempt: an answer that cannot be used comes again word for word at temperature 0.
_TEMPERATURES = (0.0, 0.7, 0.7)
ATTEMPTS = len(_TEMPERATURES)
# So many requests in a row without an answer are the endpoint's fault, not that of the rows.
_GIVE_UP_AFTER = 20

T = TypeVar("T")


class _SpentError(openai.OpenAIError):
    """Instead of a request, where the budget is spent; of this class the client lets it through."""


@dataclasses.dataclass
class Judge:
    """A chat model, how it is reached, and where its answers are kept.

    `cache` is a file on a local disk, made when it is missing, in a directory that is there;
    several processes may use it.
    """

    base_url: str
    model: str
    cache: Path
    prompt: str | None = None  # with {instruction} in it; by default each metric's own
    max_tokens: int = 4096  # of an answer, what a reasoning model thinks first included
    concurrency: int = 8  # requests at once
    timeout: float = 600.0  # seconds without a byte: what is cut off may have been paid for
    max_retries: int = 6  # per request: no connection, time-out, 408, 409, 429, 5xx
    budget: Budget = dataclasses.field(default_factory=Budget)
    _answered: bool = dataclasses.field(default=False, init=False, repr=False)
    _welcome: bool = dataclasses.field(default=False, init=False, repr=False)  # the key was good
    _faults: int = dataclasses.field(default=0, init=False, repr=False)  # in a row
    _takes_temperature: bool = dataclasses.field(default=True, init=False, repr=False)
    _limit: str = dataclasses.field(default="max_tokens", init=False, repr=False)  # its name
    _says_usage: bool = dataclasses.field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises GradjaxError where a flag is wrong."""
        _require_address(self.base_url)
        if not self.model:
            raise GradjaxError("--judge_model is empty: expected the name of a chat model")
        if self.concurrency < 1:
            raise GradjaxError(
                f"--judge_concurrency={self.concurrency} lets nothing through: expected 1 or more"
            )
        if self.max_tokens < 1:
            raise GradjaxError(
                f"--judge_max_tokens={self.max_tokens} leaves no answer: expected 1 or more"
            )

    def body(self, prompt: str, attempt: int = 0) -> dict[str, Any]:
        """What is asked, as JSON, without what the model turned out not to take."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": _TEMPERATURES[attempt],
            self._limit: self.max_tokens,
        }
        if not self._takes_temperature:
            del body["temperature"]
        return body

    def key(self, prompt: str) -> str:
        """What a prompt's answer is kept under: 32 hex digits."""
        return sha256(json.dumps([self.endpoint, self.model, prompt]))[:32]

    @property
    def endpoint(self) -> str:
        """The address as it is compared."""
        return self.base_url.rstrip("/")

    def ask(
        self, prompts: Sequence[str], parse: Callable[[str], T | None], done: Done = nobody
    ) -> list[T | Failure]:
        """What the model answers to each prompt, from the cache where it has been asked before.

        Equal prompts are asked once. Answers that `parse` gives None for are asked for again, up
        to three times in this call and earlier ones.

        Args:
          prompts: whole messages of a user.
          parse: an answer's meaning; None where it has none.
          done: is told of prompts that are answered.

        Raises:
          GradjaxError: if there is no such endpoint or model, it refuses the key, 20 requests in
            a row got no answer, or the cache cannot be used. Answers so far are kept.
        """
        with open_cache(self.cache) as cache:
            known = {prompt: self.known(cache, prompt, parse) for prompt in prompts}
            found = cache.execute("SELECT EXISTS (SELECT 1 FROM answers)").fetchone()
            self._welcome = self._welcome or bool(found[0])
            missing = [prompt for prompt, answer in known.items() if answer is None]
            times = Counter(prompts)
            done(sum(times[prompt] for prompt, answer in known.items() if answer is not None))

            def answered(prompt: str) -> None:
                done(times[prompt])

            new = {}
            if missing:
                new = asyncio.run(self._ask_all(missing, parse, cache, answered))
        return [new[p] if (answer := known[p]) is None else answer for p in prompts]

    def cached(
        self, cache: sqlite3.Connection, prompt: str, parse: Callable[[str], T | None]
    ) -> T | None:
        """The answer in the cache; None if it is not there, or cannot be parsed."""
        found = cache.execute("SELECT content FROM answers WHERE key = ?", [self.key(prompt)])
        row = found.fetchone()
        return parse(row[0]) if row else None

    def known(
        self, cache: sqlite3.Connection, prompt: str, parse: Callable[[str], T | None]
    ) -> T | Failure | None:
        """The answer in the cache, or that the prompt is given up; None if it is to be asked."""
        answer = self.cached(cache, prompt, parse)
        if answer is not None:
            return answer
        attempts, reason = unusable(cache, self.key(prompt), self.max_tokens)
        return _given_up(reason) if attempts >= ATTEMPTS else None

    def attempts(self, cache: sqlite3.Connection, prompt: str) -> int:
        """How many attempts at a prompt gave nothing usable."""
        return unusable(cache, self.key(prompt), self.max_tokens)[0]

    async def _ask_all(
        self,
        prompts: Sequence[str],
        parse: Callable[[str], T | None],
        cache: sqlite3.Connection,
        answered: Callable[[str], object],
    ) -> dict[str, T | Failure]:
        limit = asyncio.Semaphore(self.concurrency)
        hopeless: list[GradjaxError] = []

        async def ask_in_turn(prompt: str) -> T | Failure:
            async with limit:
                try:
                    if not hopeless:
                        answer = await self._ask_one(client, prompt, parse, cache)
                        answered(prompt)
                        return answer
                except GradjaxError as error:
                    # What is being answered is paid for: it is waited for and kept.
                    hopeless.append(error)
                return Failure("no answer", "not asked")

        client = openai.AsyncOpenAI(
            api_key=api_key() or "none",  # local servers need none, the client does
            base_url=self.base_url,
            timeout=openai.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
            max_retries=self.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._spend]}),
        )
        async with client:
            answers = await asyncio.gather(*map(ask_in_turn, prompts))
        if hopeless:
            raise hopeless[0]
        return dict(zip(prompts, answers, strict=True))

    async def _ask_one(
        self,
        client: openai.AsyncOpenAI,
        prompt: str,
        parse: Callable[[str], T | None],
        cache: sqlite3.Connection,
    ) -> T | Failure:
        failure = Failure("no answer", "not asked")
        attempts = self.attempts(cache, prompt)
        for _ in range(attempts, ATTEMPTS):
            try:
                reply = await self._post(client, prompt, attempts)
            except _SpentError:
                return Failure("not asked", f"--judge_budget={self.budget} is reached")
            except openai.APIError as error:
                self._stop_if_hopeless(error)
                failure = Failure("no answer", self._describe(error))
                if self._answered and _of_row(error):
                    return failure
                break  # the client has asked again where that can help
            content = content_of(reply)
            if isinstance(content, str) and (answer := parse(content)) is not None:
                self._answered, self._faults = True, 0
                keep(cache, self.key(prompt), content)
                return answer
            failure = unparsable(content) if isinstance(content, str) else content
            if failure.kind == "no usable answer":
                self._answered, self._faults = True, 0
                attempts += 1
                keep_unusable(cache, self.key(prompt), self.max_tokens, attempts, failure.reason)
        if failure.kind == "no answer":
            self._count_fault(failure.reason)
        return failure if attempts < ATTEMPTS else _given_up(failure.reason)

    async def _post(self, client: openai.AsyncOpenAI, prompt: str, attempt: int) -> object:
        """The reply as JSON, or as bytes where it is none."""
        body = self.body(prompt, attempt)
        try:
            reply = await client.chat.completions.with_raw_response.create(**body)
        except openai.BadRequestError as error:
            if error.param == "temperature" and "temperature" in body:
                self._takes_temperature = False
            elif error.param == "max_tokens" and "max_tokens" in body:
                self._limit = "max_completion_tokens"  # as OpenAI calls it today
            else:
                raise
            logging.info("%s does not take %s", self.model, error.param)
            return await self._post(client, prompt, attempt)
        data = _parsed(reply.http_response.content)
        self._count_tokens(prompt, data)
        return data

    async def _spend(self, _: object) -> None:
        """Counts a request that the client is about to send, the first time or again."""
        if self.budget.reached:
            raise _SpentError
        self.budget.requests += 1

    def _count_tokens(self, prompt: str, reply: object) -> None:
        tokens = used_tokens(reply)
        if tokens is None:
            if self._says_usage:
                self._says_usage = False
                logging.warning(
                    "%s does not say how many tokens it used (usage): they are estimated, one for "
                    "4 characters of the question and the answer",
                    self.base_url,
                )
            content = content_of(reply)
            written = len(content) if isinstance(content, str) else 0
            tokens = estimated_tokens(len(prompt) + written)
        self.budget.tokens += tokens

    def _stop_if_hopeless(self, error: openai.APIError) -> None:
        """Raises GradjaxError where no other request would fare better."""
        found = self._describe(error)
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        # Once there were answers, 403 is what some say to a row that their moderation dislikes.
        if status == 401 or (status == 403 and not (self._answered or self._welcome)):
            sent = f"the key in {KEY_VARIABLE}" if api_key() else "requests without a key"
            raise GradjaxError(
                f"--judge_base_url={self.base_url} refuses {sent} ({found}): set {KEY_VARIABLE} to "
                f"a key that may use --judge_model={self.model}"
            )
        if status == 404:
            raise GradjaxError(
                f"--judge_base_url={self.base_url} has no --judge_model={self.model} or no "
                f"/chat/completions ({found}): check both; the address often ends in /v1"
            )
        if not self._answered and _no_connection(error):
            raise GradjaxError(
                f"--judge_base_url={self.base_url} cannot be reached ({found}): check the address, "
                "and that the server runs"
            )

    def _count_fault(self, found: str) -> None:
        """Raises GradjaxError where the endpoint seems to have gone."""
        self._faults += 1
        if self._faults >= _GIVE_UP_AFTER:
            raise GradjaxError(
                f"--judge_base_url={self.base_url} gave no answer to {self._faults} requests in a "
                f"row (last: {found}): run the same command again when it does; answers so far are "
                f"kept in {self.cache}"
            )

    def _describe(self, error: openai.APIError) -> str:
        if isinstance(error, openai.APITimeoutError):
            return f"no reply within {self.timeout:g} s"
        if not isinstance(error, openai.APIStatusError):
            return f"no connection: {shorten(error.__cause__ or error)}"
        # A refused key may be spelt out in part by whoever refuses it.
        if error.status_code == 401:
            return "HTTP 401"
        body = error.body
        said = body.get("message") if isinstance(body, dict) else body
        return f"HTTP {error.status_code}: {shorten(said or error.response.reason_phrase)}"


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content


def _given_up(reason: str) -> Failure:
    return Failure("given up", f"{ATTEMPTS} answers, none usable, the last: {reason}")


def _require_address(base_url: str) -> None:
    try:
        url = urlsplit(base_url)
        named = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a malformed host or port
        url = named = None
    if not url or not named:
        raise GradjaxError(
            f"--judge_base_url={base_url!r} is no address: expected http:// or https://, as in "
            "http://localhost:8000/v1"
        )
    if url.username or url.password or url.query:
        raise GradjaxError(
            "--judge_base_url holds a user name, a password or a query, which would be stored with "
            f"the run: give the address alone and the key in {KEY_VARIABLE}"
        )


def _of_row(error: openai.APIError) -> bool:
    """Whether an error says that this prompt is not wanted: too long, or against the rules."""
    return isinstance(error, openai.APIStatusError) and error.status_code in (400, 403, 413, 422)


def _no_connection(error: openai.APIError) -> bool:
    # The client makes one error of a server that is slow and of an address where nobody is.
    if isinstance(error, openai.APITimeoutError):
        return type(error.__cause__).__name__ == "ConnectTimeout"
    return isinstance(error, openai.APIConnectionError)
