"""A language model behind an OpenAI-compatible server, as a function from text to text."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from sae_query_steer.arguments import check_number

MAX_BYTES = 2**20
"""Largest answer of a server that is read."""

PAUSE = 0.5
"""Seconds before a request is repeated; twice as many before each further one."""


class NoAnswerError(RuntimeError):
    """A reply without an answer, to one question: a `LanguageModelJudge` finds no class in it."""


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """Asks a model at any OpenAI-compatible endpoint, such as vLLM's, llama.cpp's or a hub's.

    A question is a conversation with one user message, at temperature 0 with a fixed seed. Requests
    that fail temporarily (connection errors, status 408, 409, 429 and 5xx) are repeated. Redirects
    are not followed, and at most 1 MiB of an answer is read.

    Needs the extra `judge`: pip install "sae-query-steer[judge]".

    Source: the client is `openai`.
    """

    base_url: str
    """Address of the server, with its "/v1", such as http://localhost:8000/v1."""

    model: str
    """Name of the model, as the server knows it."""

    api_key: str | None = field(default=None, repr=False)
    """The server's key. None sends the word "none"; no key is read from the environment."""

    max_tokens: int = 16
    """Most tokens of an answer; a reasoning model needs hundreds."""

    seed: int = 0
    """Of the server's sampling."""

    timeout: float = 120.0
    """Seconds for an answer, all tries together."""

    tries: int = 3
    """Most requests for one question."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request's body to add or replace; None leaves one out."""

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise ValueError(
                "base_url must be the address of a server without user and password (give the key "
                f"as api_key), such as http://localhost:8000/v1, got one of host {url.hostname}"
            )
        key = "none" if self.api_key is None else self.api_key
        if not (key and key.isascii() and key.isprintable()):
            raise ValueError("api_key must be printable ASCII and not empty; None sends no key")
        for name in ("max_tokens", "tries"):
            check_number(name, getattr(self, name), whole=True, least=1)
        check_number("timeout", self.timeout, above=0, most=threading.TIMEOUT_MAX)

    def __call__(self, question: str) -> str:
        """Return the model's answer.

        Raises:
            ConnectionError: the server cannot be reached, or has not answered in `timeout` seconds.
            RuntimeError: it answers with an error.
            NoAnswerError: it answers with more than 1 MiB, or with something that is no chat
                completion.
            ImportError: the client `openai` is not installed.
        """
        found: list[str | Exception] = []
        given_up = threading.Event()

        def ask() -> None:
            try:
                found.append(self._ask_repeatedly(question, given_up))
            except Exception as error:
                found.append(error)

        # A server that sends a byte now and then meets no timeout of the client.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.timeout)
        given_up.set()
        if not found:
            raise ConnectionError(f"no answer from {self._shown_url} within {self.timeout} s")
        if isinstance(found[0], Exception):
            raise found[0] from None
        return found[0]

    def _ask_repeatedly(self, question: str, given_up: threading.Event) -> str:
        """Repeat a request while it fails temporarily; `given_up` ends the waiting.

        The client's own repeats draw from Python's global random state, and go on after the
        deadline.
        """
        for n_before in range(self.tries - 1):
            try:
                return self._ask(question, given_up)
            except (ConnectionError, _BusyError):
                if given_up.wait(PAUSE * 2**n_before):
                    raise
        return self._ask(question, given_up)

    def _ask(self, question: str, given_up: threading.Event) -> str:
        """Send one request; `given_up` ends the reading of its answer."""
        try:
            import openai
        except ImportError:
            raise ImportError(
                'ChatEndpoint needs the client openai: pip install "sae-query-steer[judge]"'
            ) from None
        # Names of the user's organisation in the environment are for OpenAI's own server only.
        headers: dict[str, Any] = {
            "OpenAI-Organization": openai.Omit(),
            "OpenAI-Project": openai.Omit(),
            "Accept-Encoding": "identity",
        }
        body = {"max_tokens": self.max_tokens, "temperature": 0.0, "seed": self.seed, **self.extra}
        try:
            with (
                openai.DefaultHttpxClient(
                    follow_redirects=False,
                    event_hooks={"response": [partial(_limit, given_up=given_up)]},
                ) as http_client,
                openai.OpenAI(
                    base_url=self.base_url,
                    api_key=self.api_key or "none",
                    timeout=self.timeout,
                    max_retries=0,
                    default_headers=headers,
                    http_client=http_client,
                ) as client,
            ):
                output = client.chat.completions.create(
                    messages=[{"role": "user", "content": question}],
                    model=self.model,
                    extra_body={key: value for key, value in body.items() if value is not None},
                )
            answer = output.choices[0].message.content
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"no answer from {self._shown_url} ({type(error.__cause__ or error).__name__}): is "
                "the server running, and the address right?"
            ) from None
        except openai.APIStatusError as error:
            is_busy = error.status_code in (408, 409, 429) or error.status_code >= 500
            said = self._answered(f"status {error.status_code}: {error.response.text}")
            raise (_BusyError if is_busy else RuntimeError)(said) from None
        except _TooLongError as error:
            raise NoAnswerError(self._answered(str(error))) from None
        except (  # JSON of another form, or that is too deep
            *(ValueError, TypeError, AttributeError, LookupError, RecursionError),
            openai.OpenAIError,
        ) as error:
            said = f"no chat completion ({type(error).__name__}): does base_url end in /v1?"
            raise NoAnswerError(self._answered(said)) from None
        if not isinstance(answer, str):
            raise NoAnswerError(
                self._answered(f"no text: max_tokens={self.max_tokens} may be too few to reason")
            )
        return answer

    def _answered(self, what: str) -> str:
        """Return an error message without the key, which a server may have repeated."""
        what = what if self.api_key is None else what.replace(self.api_key, "[key]")
        return f"{self._shown_url} answered with {what[:300]}{'...' if len(what) > 300 else ''}"

    @property
    def _shown_url(self) -> str:
        return urlsplit(self.base_url)._replace(query="", fragment="").geturl()


class _BusyError(RuntimeError):
    """An answer with an error after which the request may be repeated."""


class _TooLongError(Exception):
    """An answer that is not read to its end."""


def _limit(response: Any, given_up: threading.Event) -> None:
    """Have a response raise when more than `MAX_BYTES` of it are read, or nobody waits for it."""
    from httpx2 import SyncByteStream

    class Limited(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            n = 0
            for part in stream:
                n += len(part)
                if n > MAX_BYTES or given_up.is_set():
                    raise _TooLongError(f"more than {MAX_BYTES} bytes")
                yield part

        def close(self) -> None:
            stream.close()

    if response.headers.get("content-encoding", "identity") != "identity":
        raise _TooLongError("compressed bytes, although asked not to")
    stream = response.stream
    response.stream = Limited()
