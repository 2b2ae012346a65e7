"""A language model behind an OpenAI-compatible server, as a function from text to text."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient

# HTTPError is that of whatever HTTP client the hub's release brings along.
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)

NO_KEY = "none"
"""Sent where no key is given: the client would send the user's Hugging Face token instead."""

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Answers of a server that is busy or stumbled."""


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """Asks a model at any OpenAI-compatible endpoint, such as vLLM's, llama.cpp's or a hub's.

    One question is one conversation with one turn of the user. Temperature is 0 and the seed fixed,
    so that a server that honours them answers the same again.

    Source: the client is `huggingface_hub.InferenceClient`; the rest is our choice.
    """

    base_url: str
    """Where the server is, with its "/v1", such as http://localhost:8000/v1."""

    model: str
    """Name of the model, as the server knows it."""

    api_key: str | None = field(default=None, repr=False)
    """The server's key. None sends a word that is no key; in particular the Hugging Face token of
    this machine is never sent unless it is given here."""

    max_tokens: int = 16
    """Most tokens of an answer; a model that reasons aloud needs hundreds."""

    seed: int = 0
    """Of the server's sampling, where it has any at temperature 0."""

    timeout: float = 60.0
    """Seconds to wait for an answer."""

    tries: int = 3
    """How often a question is asked while the server is busy (429), fails (500, 502 to 504) or
    can't be reached."""

    wait: float = 1.0
    """Seconds before the second try; each wait after that is twice as long."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    """More of the request's body, or other values of what is in it; None leaves an entry out."""

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(
                f"base_url={self.base_url!r} is no address of a server: give one such as "
                "http://localhost:8000/v1"
            )
        if url.username is not None or url.password is not None:
            raise ValueError(
                f"the base_url of {url.hostname} holds a user or a password, which would stand in "
                "every message: leave them out, and give the key as api_key"
            )
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                "api_key is empty, or has white space or characters that no key has: give the key "
                "alone, or None where the server wants none"
            )
        for name in ("max_tokens", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give 1 or more")
        if not (math.isfinite(self.wait) and self.wait >= 0 and self.timeout > 0):
            raise ValueError(
                f"wait={self.wait} and timeout={self.timeout} are not allowed: give seconds, 0 or "
                "more to wait and more than 0 to time out"
            )

    def __call__(self, question: str) -> str:
        """Return the model's answer.

        Raises:
            ConnectionError: the server can't be reached, or does not answer in time.
            RuntimeError: it answers with an error, or with something that is no chat completion.
        """
        for attempt in range(1, self.tries):
            try:
                return self._ask(question)
            except _Passing:
                time.sleep(self.wait * 2 ** (attempt - 1))
        try:
            return self._ask(question)
        except _Passing as passing:
            final = passing.final
        raise final

    def _ask(self, question: str) -> str:
        client = InferenceClient(
            base_url=self.base_url, api_key=self.api_key or NO_KEY, timeout=self.timeout
        )
        # "from None" throughout: the client's own message may repeat what the server said.
        try:
            output = client.chat_completion(
                [{"role": "user", "content": question}],
                model=self.model,
                max_tokens=self.max_tokens,
                temperature=0.0,
                seed=self.seed,
                extra_body=dict(self.extra),
            )
        except HfHubHTTPError as error:
            raise self._refused(error.response.status_code, error.response.text) from None
        except OfflineModeIsEnabled:
            raise ConnectionError(
                f"{self._shown_url} was not asked, because HF_HUB_OFFLINE is set: unset it, also "
                "for a server on this machine"
            ) from None
        except HTTPError as error:
            raise _Passing(
                ConnectionError(
                    f"no answer from {self._shown_url} within {self.timeout} s "
                    f"({type(error).__name__}): is the server up, and the address right?"
                )
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            # The client itself stumbles over an error whose body is JSON but no object.
            response = getattr(error.__context__, "response", None)
            if response is not None:
                raise self._refused(response.status_code, response.text) from None
            raise self._malformed(type(error).__name__) from None
        try:
            answer = output.choices[0].message.content
        except (AttributeError, IndexError, KeyError, TypeError):
            raise self._malformed(self._without_key(str(dict(output)))) from None
        if not isinstance(answer, str):
            raise RuntimeError(
                f"the model at {self._shown_url} answered without text: where it reasons first, "
                f"max_tokens={self.max_tokens} may be too few"
            )
        return answer

    def _refused(self, status: int, said: str) -> Exception:
        message = RuntimeError(
            f"{self._shown_url} answered with status {status}: {self._without_key(said)}"
        )
        return _Passing(message) if status in TRY_AGAIN else message

    def _malformed(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self._shown_url} answered with something that is no chat completion ({what}): does "
            "the base_url end where the server's OpenAI-compatible part begins, as in .../v1?"
        )

    @property
    def _shown_url(self) -> str:
        return self._without_key(urlsplit(self.base_url)._replace(query="", fragment="").geturl())

    def _without_key(self, text: str) -> str:
        """Return the beginning of a text, in which a server may have repeated the key."""
        text = text if self.api_key is None else text.replace(self.api_key, "[key]")
        return text if len(text) <= 300 else text[:300] + "..."


class _Passing(Exception):
    """Something that may be over when one asks again; `final` is raised where it is not."""

    def __init__(self, final: Exception) -> None:
        super().__init__(str(final))
        self.final = final
