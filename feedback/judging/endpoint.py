"""Asks an OpenAI-compatible server, with a bounded number of requests in flight and in a minute.

The client is OpenAI's own. Where the server is busy or away (429, 5xx, no connection) it waits, as long as
the server says if it says so, and asks again. The key is in the headers of a request and nowhere else: it is
taken out of every text that comes back, since a server may repeat it.
"""

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from dpo_opt.feedback.judging.comparisons import Keep
from dpo_opt.feedback.judging.questions import Answer, Question
from dpo_opt.schemas.errors import ConfigError, DpoOptError, Interrupted, Preempted, first_line, quoted

# With the client's growing waits, a few minutes until a server that is away is given up.
_RETRIES = 8
_SECONDS = 600.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Endpoint:
    """A model behind an OpenAI-compatible server.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``.
        model: Name of the model there.
        key_variable: Name of the environment variable that holds the key; None: the server asks for none.
        concurrency: Most requests in flight.
        requests_per_minute: Most requests in a minute; None: no limit.
        fields: Fields of each request beside model and messages.

    Raises:
        ConfigError: The client is not installed, the URL is none or holds a password, or there is no key.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key_variable: str | None,
        concurrency: int,
        requests_per_minute: int | None,
        fields: Mapping[str, Any],
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("--endpoint needs openai", fix="pip install 'dpo-opt[judge]'") from error
        self._openai = openai
        self._url = _checked(url)
        self._model = model
        self._key = None if key_variable is None else _key(key_variable)
        self.concurrency = concurrency
        self.seconds_between = 0.0 if requests_per_minute is None else 60 / requests_per_minute
        self._fields = dict(fields)

    def __call__(self, questions: Sequence[Question], keep: Keep) -> None:
        """Ask all questions (``comparisons.Ask``).

        A signal to stop waits for the answers that are under way: each is paid for.

        Raises:
            DpoOptError: The server refuses, or does not answer.
            Preempted, Interrupted: A signal came.
        """
        if questions:
            asyncio.run(_Asking(self, keep).all(questions))

    def cleaned(self, text: str) -> str:
        """A text from the server: without the key, and without halves of characters."""
        text = text.encode("utf-8", "replace").decode()
        return text if self._key is None else text.replace(self._key, "[key]")

    async def answer(self, client: Any, question: Question) -> Answer:
        """One request.

        Raises:
            DpoOptError: The server refuses, does not answer, or answers in another form.
        """
        try:
            # Servers have fields that the client does not know, such as vLLM's structured_outputs.
            found = await client.chat.completions.create(
                model=self._model, messages=question.messages, extra_body=self._fields
            )
            choice = found.choices[0]
            usage = found.usage
            return Answer(
                self.cleaned(choice.message.content or ""),
                self.cleaned(str(choice.finish_reason)),
                self.cleaned(str(found.model)),
                _count(usage.prompt_tokens) if usage else None,
                _count(usage.completion_tokens) if usage else None,
            )
        except (self._openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            # Without the cause, whose request has the key in its headers.
            raise self._explained(error) from None

    def client(self) -> Any:
        """A client for one event loop."""
        return self._openai.AsyncOpenAI(
            base_url=self._url, api_key=self._key or "none", max_retries=_RETRIES, timeout=_SECONDS
        )

    def _explained(self, error: Exception) -> DpoOptError:
        status = getattr(error, "status_code", None)
        fix = "see the server's log, then run the same command again"
        if status in (401, 403):
            fix = "pass --key-variable with the name of the environment variable that holds the right key"
        elif status == 404:
            fix = f"see which models it has: curl {self._url}/models"
        elif status in (400, 422):
            fix = "pass --request-option, with which a field is changed, or left out (temperature=null)"
        elif isinstance(error, self._openai.APIConnectionError):
            fix = "start the server, or correct --endpoint; then run the same command again"
        return DpoOptError(
            f"the server did not answer ({self.cleaned(first_line(error, named=True))})",
            where=self._url,
            why="the answers so far are kept",
            fix=fix,
        )


class _Asking:
    """One round of questions; ends early at the first error or signal, once what is under way is answered."""

    def __init__(self, endpoint: Endpoint, keep: Keep) -> None:
        self._endpoint = endpoint
        self._keep = keep
        self._error: DpoOptError | None = None
        self._next_turn = 0.0

    async def all(self, questions: Sequence[Question]) -> None:
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop, number)
        try:
            async with self._endpoint.client() as client:
                shared = iter(questions)
                workers = min(self._endpoint.concurrency, len(questions))
                await asyncio.gather(*(self._work(client, shared) for _ in range(workers)))
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
        if self._error is not None:
            raise self._error

    async def _work(self, client: Any, questions: Iterator[Question]) -> None:
        while self._error is None:
            await self._turn()
            question = next(questions, None) if self._error is None else None
            if question is None:
                return
            try:
                self._keep(question, await self._endpoint.answer(client, question))
            except DpoOptError as error:
                self._error = self._error or error

    async def _turn(self) -> None:
        """Wait until the rate allows the next request."""
        now = asyncio.get_running_loop().time()
        own = max(self._next_turn, now)
        self._next_turn = own + self._endpoint.seconds_between
        await asyncio.sleep(own - now)

    def _stop(self, number: int) -> None:
        kind = Interrupted if number == signal.SIGINT else Preempted
        self._error = self._error or kind(
            f"stopped by {signal.Signals(number).name}",
            why="every answer is kept",
            fix="run the same command again, which asks what is left",
        )


def _count(said: object) -> int | None:
    """A number of tokens; the client hands on whatever a server says of it."""
    return said if isinstance(said, int) and 0 <= said < 2**63 else None


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{quoted(url)} is no URL of a server", fix="pass --endpoint such as http://localhost:8000/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query:
        raise ConfigError(
            "the URL holds more than an address",
            where=f"{parts.scheme}://{parts.hostname}",
            why="what stands in an option stands in the folder's records and in the list of processes",
            fix="pass the key by --key-variable NAME",
        )
    return url.rstrip("/")


def _key(variable: str) -> str:
    found = os.environ.get(variable, "")
    if not found.strip():
        raise ConfigError(
            f"the environment variable {quoted(variable)} is not set",
            why="the key is read from it, and from nowhere else",
            fix=f"export {quoted(variable)}=KEY, or leave --key-variable out",
        )
    return found.strip()
