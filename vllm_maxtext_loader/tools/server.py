"""A running `vllm serve`: vLLM's routes for new weights (VLLM_SERVER_DEV_MODE=1) and our worker's methods."""

from __future__ import annotations

import dataclasses
import urllib.parse
from typing import Any, Literal, get_args

import requests
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url

from vllm_maxtext_loader.checkpoint.storage.retry import redact, summarize
from vllm_maxtext_loader.errors import EngineError, OptionError, ReloadError, ServerError

InFlight = Literal["wait", "keep", "abort"]
"""What happens to requests in flight: they are finished first, go on with the new weights, or are aborted."""

TIMEOUT = 300.0
"""Seconds to wait for an answer. A pause with "wait" is answered when the requests in flight have ended."""

State = Literal["failed", "staging", "staged", "serving"]
_STATES = get_args(State)

_CONNECT_SECONDS = 10.0
_NOT_IMPLEMENTED = "is not implemented"
"""What vLLM says of a method that its worker does not have."""

_DEV_MODE = (
    "Start it with VLLM_SERVER_DEV_MODE=1, on a port that no user can reach: the API key does not protect "
    "these routes."
)


@dataclasses.dataclass(frozen=True)
class Serving:
    """The weights that a server answers with.

    Attributes:
        items: directory they were read from.
        step: training step, None where the directory's name does not tell.
        torn: whether an update failed halfway, so that the engine refuses to answer.
    """

    items: str
    step: int | None
    torn: bool


@dataclasses.dataclass(frozen=True)
class Staging:
    """How far a server has staged a step in its hosts' memory.

    Attributes:
        state: "staging", "staged", "failed", or "serving" where the step is what it answers with.
        read_bytes: bytes read so far, of all workers.
        total_bytes: bytes to read.
        seconds: since staging began; once it is over, how long it took.
        error: why it failed.
    """

    state: State
    read_bytes: int
    total_bytes: int
    seconds: float
    error: str | None


class Server:
    """A server.

    Args:
        url: "http://127.0.0.1:8000"; a path "/v1" at its end is left out.
        api_key: sent as a bearer token, for a gateway in front; None means none.
        timeout: seconds to wait for an answer.

    Raises:
        OptionError: `url` is none.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = TIMEOUT) -> None:
        self._url = _base(url)
        self._api_key = api_key
        self._timeout = timeout
        self.name = redact(self._url)
        """The URL, without a password in it."""

    def serving(self) -> Serving:
        """What the server answers with.

        Raises:
            ServerError: it cannot be reached, or its workers do not agree.
            EngineError: it cannot take new weights as it was started.
        """
        found = self._workers("weight_state", ("items", "step", "torn"))
        torn = any(worker["torn"] for worker in found)
        states = {Serving(worker["items"], worker["step"], torn) for worker in found}
        if len(states) > 1:
            steps = ", ".join(sorted(str(state.step) for state in states))
            raise ServerError(f"{self.name}: its workers hold different steps ({steps}). Restart it.")
        return states.pop()

    def pull(self, update: dict[str, Any]) -> Staging:
        """Begins to stage a step, or says how far that is; returns at once.

        Args:
            update: "path" and, where it is known, "step".

        Raises:
            ServerError, EngineError: as `serving`.
            ReloadError: the server refuses the step.
        """
        keys = ("state", "read_bytes", "total_bytes", "seconds", "error")
        found = self._workers("pull_weights", keys, update_info=update)
        # A failure of any worker counts, then what the slowest does.
        state: State = min((worker["state"] for worker in found), key=_STATES.index)
        errors = dict.fromkeys(_error_of(worker, len(found)) for worker in found if worker["error"])
        return Staging(
            state=state,
            read_bytes=sum(worker["read_bytes"] or 0 for worker in found),
            total_bytes=sum(worker["total_bytes"] or 0 for worker in found),
            seconds=max(worker["seconds"] or 0.0 for worker in found),
            error=" ".join(errors) or None,
        )

    def drop(self) -> None:
        """Has the server forget what it staged; not waited for long, as nothing depends on it."""
        Server(self._url, self._api_key, min(_CONNECT_SECONDS, self._timeout))._call("drop_weights")

    def pause(self, in_flight: InFlight) -> None:
        """Stops answering, and drops all caches: KV, prefix, multimodal and encoder."""
        self._ask("POST", f"/pause?mode={in_flight}&clear_cache=true")

    def start_update(self) -> None:
        """Opens an update; until it is finished the engine may have no KV cache."""
        self._ask("POST", "/start_weight_update")

    def update(self, update: dict[str, Any]) -> None:
        """Swaps the staged step in."""
        self._ask("POST", "/update_weights", {"update_info": update})

    def finish_update(self, version: str | None) -> None:
        """Closes the update.

        Args:
            version: how the new weights are called; None where the old ones stayed.
        """
        self._ask("POST", "/finish_weight_update", {} if version is None else {"weight_version": version})

    def resume(self) -> None:
        """Answers again."""
        self._ask("POST", "/resume")

    def is_paused(self) -> bool:
        """Whether it does not answer because a client paused it."""
        return bool(self._ask("GET", "/is_paused")["is_paused"])

    def _workers(self, method: str, keys: tuple[str, ...], **arguments: Any) -> list[dict[str, Any]]:
        """What each worker returns: an object with these keys."""
        results = self._call(method, **arguments).get("results")
        if isinstance(results, list) and results and all(_is_state(each, keys) for each in results):
            return results
        raise EngineError(
            f"{self.name}: {method} returned {summarize(str(results), 100)}, not the state of its "
            "workers. Install the same version of vllm-maxtext-loader there and here."
        )

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self._ask("POST", "/collective_rpc", {"method": method, "kwargs": arguments}, method)

    def _ask(
        self, verb: str, route: str, body: dict[str, Any] | None = None, method: str = ""
    ) -> dict[str, Any]:
        """The answer's JSON object.

        Args:
            method: the worker's method, where one is called.
        """
        try:
            # No kept connection: the server closes idle ones, and a request that meets that is lost.
            answer = requests.request(
                verb,
                f"{self._url}{route}",
                json=body,
                auth=self._authorize,
                headers={"Connection": "close"},
                timeout=(min(_CONNECT_SECONDS, self._timeout), self._timeout),
                allow_redirects=False,
            )
        except requests.Timeout as error:
            raise ServerError(
                f"{self.name}: did not answer {route.partition('?')[0]} within {self._timeout:g} s. "
                "--timeout raises the limit."
            ) from error
        except requests.RequestException as error:
            raise ServerError(
                f"{self.name}: cannot be reached ({_reason(error)}). Check the URL, and that the server runs."
            ) from error
        if answer.status_code == requests.codes.ok:
            try:
                content = answer.json() if answer.content else {}
            except requests.JSONDecodeError:
                content = None
            if isinstance(content, dict):
                return content
            raise EngineError(
                f"{self.name}: answers {route.partition('?')[0]} with no JSON: it is no vLLM server."
            )
        raise self._refusal(answer, route.partition("?")[0], method)

    def _refusal(self, answer: requests.Response, route: str, method: str) -> Exception:
        """The error for an answer that is none."""
        said = _message(answer)
        match answer.status_code:
            case 404 | 405:
                return EngineError(f"{self.name}: has no {route}: it takes no new weights. {_DEV_MODE}")
            case 401 | 403:
                return EngineError(
                    f"{self.name}: refuses the API key (HTTP {answer.status_code}). Set VLLM_API_KEY, or "
                    "give --api-key."
                )
            case status if status in (408, 429, 502, 503, 504) or 300 <= status < 400:
                return ServerError(f"{self.name}: {route} failed (HTTP {status}). {said}".strip())
        if method and _NOT_IMPLEMENTED in said:
            return EngineError(
                f"{self.name}: its engine has no {method}: it does not run on tpu-inference with "
                "--load-format maxtext and this version of vllm-maxtext-loader. Restart it so."
            )
        return ReloadError(
            f"{self.name}: {method or route} failed (HTTP {answer.status_code}): {said or 'no reason given'}"
        )

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Adds the API key, or what the URL has; left to itself, requests would send what is in ~/.netrc."""
        if self._api_key:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        elif any(login := get_auth_from_url(self._url)):
            return HTTPBasicAuth(*login)(request)
        return request


def _is_state(worker: Any, keys: tuple[str, ...]) -> bool:
    return (
        isinstance(worker, dict)
        and all(key in worker for key in keys)
        and worker.get("state", "failed") in _STATES
    )


def _error_of(worker: dict[str, Any], workers: int) -> str:
    """What a worker says is wrong; with its host, where there are several."""
    return (
        f"Host {worker['host']}: {worker['error']}" if workers > 1 and "host" in worker else worker["error"]
    )


def _reason(error: BaseException) -> str:
    """Why a connection failed: the innermost error, without the libraries' objects around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return summarize(str(error), 200) or type(error).__name__


def _message(answer: requests.Response) -> str:
    """What the server says of an error, on one line."""
    try:
        content = answer.json()
    except requests.JSONDecodeError:
        return summarize(answer.text, 200)
    found = content.get("error", content.get("detail", content)) if isinstance(content, dict) else content
    if isinstance(found, dict):
        found = found.get("message", found)
    return summarize(str(found))


def _base(url: str) -> str:
    """The URL without the OpenAI interface's path.

    Raises:
        OptionError: it is not a server's.
    """
    text = url.strip()
    parts = urllib.parse.urlsplit(text)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise OptionError(f"--url {redact(text)}: is not the URL of a server. Give http://HOST:PORT.")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")
