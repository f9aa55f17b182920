"""Requests to an S3 server: repeated after temporary failures, and abandoned when they make no progress.

Refused and broken connections, 429, 500, 503 and garbled answers are followed by another attempt after a growing
pause. Permanent failures (403, a missing bucket) are errors at once. An attempt that moves less than `STEP_BYTES` in a
quarter of `timeout_seconds` is abandoned. A request fails after `timeout_seconds` without a success or a byte gained.
No server, however slow, therefore holds a program for longer than 1.25 `timeout_seconds` after its last progress.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from streaming_rwkv.config import UserError

logger = logging.getLogger(__name__)

STEP_BYTES = 1 << 17
_LONGEST_PAUSE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_MISCONFIGURED_SECONDS = 15.0  # for an address that has never answered: most likely misspelled
_CONNECTIONS = 64

T = TypeVar("T")


class StorageError(UserError):
    """A store that cannot be used, or an object that is damaged or unexpected."""


class ObjectMissing(StorageError):
    """An object that does not exist."""


class UploadMissing(StorageError):
    """A multipart upload that no longer exists: it was completed or aborted."""


class FaultyAnswer(Exception):
    """An answer that is wrong; the next attempt may get a right one."""


class Moved:
    """The progress of an attempt, updated by the thread that makes it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.abandoned = False
        self.lock = threading.Lock()


def shown_endpoint(endpoint: str | None) -> str:
    """Return an address without any user name and password in it."""
    if endpoint is None:
        return "AWS"
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class Connection:
    """A client of boto3, made on first use in each process, since its sockets must not be shared after a fork."""

    def __init__(
        self,
        *,
        endpoint: str | None,
        timeout_seconds: float,
        is_unsigned: bool = False,
        requester_pays: bool = False,
    ) -> None:
        """Configure the client; nothing is sent yet.

        Args:
            is_unsigned: send no credentials, for a public bucket.
            requester_pays: tell the server that the reader pays for the requests.
        """
        self.endpoint = endpoint
        self.timeout_seconds = timeout_seconds
        self.is_unsigned = is_unsigned
        self.requester_pays = requester_pays
        self._answered = False
        self._client: Any = None
        self._process = 0
        self._lock = threading.Lock()

    def ask(self, call: Callable[[Any, Moved], T], *, url: str, verb: str, gained: Callable[[], int] = lambda: 0) -> T:
        """Call `call(client, moved)` until it succeeds, and return its result.

        Args:
            url, verb: the object and the action, for errors.
            gained: returns the number of bytes that the next attempt need not fetch again.

        Raises:
            StorageError: names the problem and the remedy, and no secret.
        """
        begun = forward = time.monotonic()
        before, fruitless = gained(), 0
        for attempt in itertools.count(1):
            try:
                client = self._client_of_this_process()
                if attempt == 1:
                    begun = forward = time.monotonic()  # making the client takes seconds on a busy machine
                result = _watched(functools.partial(call, client), seconds=self.timeout_seconds / 4)
            except _failures() as error:
                problem = _diagnose(error, answered=self._answered, attempt=attempt)
            else:
                self._answered = True
                return result
            now = time.monotonic()
            fruitless += 1
            if gained() > before:
                before, forward, fruitless = gained(), now, 0
            patience = self.timeout_seconds
            if problem.unreachable and not self._answered:
                patience = min(patience, _MISCONFIGURED_SECONDS)
            pause = min(_LONGEST_PAUSE_SECONDS, 0.2 * 2 ** min(fruitless, 10)) * random.uniform(0.5, 1)
            if not problem.may_pass or now + pause - forward > patience:
                tried = f" ({attempt} attempts in {now - begun:.0f} s)" if attempt > 1 else ""
                where = shown_endpoint(self.endpoint)
                raise problem.kind(f"{url}: cannot {verb} it at {where}{tried}: {problem.text}") from None
            logger.info("%s: %s; trying again in %.1f s", url, problem.text.partition(";")[0], pause)
            time.sleep(pause)
        raise AssertionError

    def close(self) -> None:
        with self._lock:
            if self._client is not None and self._process == os.getpid():
                self._client.close()
            self._client = None

    def _client_of_this_process(self) -> Any:
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client, self._process = self._make_client(), os.getpid()
            return self._client

    def _make_client(self) -> Any:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        session = boto3.session.Session()
        if not self.is_unsigned:
            _check_credentials(session.get_credentials())
        config = Config(
            connect_timeout=min(_CONNECT_SECONDS, self.timeout_seconds / 4),
            read_timeout=self.timeout_seconds / 4,
            retries={"mode": "standard", "total_max_attempts": 1},  # `ask` repeats requests
            max_pool_connections=_CONNECTIONS,
            # Checksum trailers, boto3's default since 1.36, damage objects on servers that do not know them.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # Bodies carry a signed Content-MD5: hashing them once more would cost as much as sending them.
            s3={"addressing_style": "path" if self.endpoint else "auto", "payload_signing_enabled": False},
            **({"signature_version": UNSIGNED} if self.is_unsigned else {}),
        )
        # Servers other than Amazon's accept any region, but a signature needs one.
        region = session.region_name or ("us-east-1" if self.endpoint else None)
        client = session.client("s3", endpoint_url=self.endpoint, region_name=region, config=config)
        if self.requester_pays:
            client.meta.events.register("before-call.s3", _add_requester_pays)
        return client

    def __getstate__(self) -> dict[str, Any]:
        names = ("endpoint", "timeout_seconds", "is_unsigned", "requester_pays")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # sockets and locks cannot be pickled


_CREDENTIALS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
}


def _check_credentials(credentials: Any) -> None:
    """Refuse credentials with a line break or a space, which those of a mounted file may have at their end.

    Raises:
        StorageError: names the credential, without its value.
    """
    found = credentials.get_frozen_credentials() if credentials else None
    for attribute, variable in _CREDENTIALS.items():
        if re.search(r"[^!-~]", getattr(found, attribute, None) or ""):
            raise StorageError(
                f"{variable}: has a line break, a space or another character that no credential has (found in: "
                f"{credentials.method}); set it without"
            )


def _add_requester_pays(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"


class _Stalled(Exception):
    """An attempt that makes no progress."""


def _watched(call: Callable[[Moved], T], *, seconds: float) -> T:
    """Return the result of `call`, run in its own thread for as long as it makes progress.

    Socket timeouts apply to each read alone, so a server that sends one byte a second defeats them.
    """
    moved = Moved()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(moved))
        except BaseException as error:  # noqa: BLE001  # raised again below, in the waiting thread
            future.set_exception(error)

    threading.Thread(target=run, name="storage", daemon=True).start()
    before = 0
    while not wait([future], timeout=seconds).done:
        with moved.lock:
            if moved.bytes - before < STEP_BYTES:
                moved.abandoned = True
                raise _Stalled
            before = moved.bytes
    return future.result()


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The meaning of an error, without any secret in it."""

    text: str
    may_pass: bool = False
    unreachable: bool = False
    kind: type[StorageError] = StorageError


def _failures() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ClientError, ResponseParserError, OSError, FaultyAnswer, _Stalled


_REPEATABLE = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout", "SlowDown", "Throttling"}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_ADDRESS_REMEDY = "check S3_ENDPOINT_URL, the network, and that the server runs"
_KEYS_REMEDY = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and what they are allowed to do in this bucket"
_TLS_REMEDY = "check whether S3_ENDPOINT_URL begins with http:// or https://, and the certificate (AWS_CA_BUNDLE)"


def _diagnose(error: Exception, *, answered: bool, attempt: int) -> _Problem:
    from botocore import exceptions as boto

    match error:
        case boto.ClientError():
            return _diagnose_answer(error, answered=answered, attempt=attempt)
        case boto.NoCredentialsError() | boto.PartialCredentialsError() | boto.CredentialRetrievalError():
            return _Problem(text=f"no credentials; {_KEYS_REMEDY}, or name it in S3_PUBLIC_BUCKETS if it is public")
        case boto.ProfileNotFound():
            return _Problem(text=f"{error}; check AWS_PROFILE")
        case boto.NoRegionError() | boto.InvalidRegionError():
            return _Problem(text=f"{error}; set AWS_DEFAULT_REGION, as to us-east-1")
        case boto.ParamValidationError():
            return _Problem(text=f"{error}; check the location")
        case boto.ConfigNotFound() | boto.ConfigParseError() | boto.InvalidConfigError():
            return _Problem(text=f"{error}; check the file (AWS_CONFIG_FILE, AWS_SHARED_CREDENTIALS_FILE)")
        case boto.EndpointProviderError():
            return _Problem(text=f"no address follows from the settings; {_ADDRESS_REMEDY}")
        case boto.SSLError():
            return _Problem(text=f"the TLS connection failed; {_TLS_REMEDY}")
        case boto.EndpointConnectionError() | boto.ConnectTimeoutError() | boto.ProxyConnectionError():
            return _Problem(text=f"cannot connect; {_ADDRESS_REMEDY}", may_pass=True, unreachable=True)
        case _Stalled() | boto.ReadTimeoutError():
            return _Problem(text=f"timed out, since the server stopped responding; {_ADDRESS_REMEDY}", may_pass=True)
        case FaultyAnswer():
            return _Problem(text=f"{error}; the server or something before it damages answers", may_pass=True)
        case OSError() if not isinstance(error, (ConnectionError, TimeoutError)):
            raise error  # of a local file
        case _:
            return _Problem(text=f"the connection broke ({type(error).__name__}); {_ADDRESS_REMEDY}", may_pass=True)


def _diagnose_answer(error: Any, *, answered: bool, attempt: int) -> _Problem:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    shown = f"{status} {code}" if code and code != str(status) else str(status)
    if code == "NoSuchBucket":
        return _Problem(text=f"{shown}: there is no such bucket; create it, or check its name and S3_ENDPOINT_URL")
    if code == "NoSuchUpload":
        return _Problem(text=f"{shown}: the upload was aborted by someone else", kind=UploadMissing)
    if code == "RequestTimeTooSkewed":
        return _Problem(text=f"{shown}: this machine's clock is wrong; set it")
    if code in _ELSEWHERE:
        return _Problem(text=f"{shown}: the bucket is in another region; set AWS_DEFAULT_REGION")
    if status == 403:
        # A request that was damaged on its way has a wrong signature too.
        may_pass = code == "SignatureDoesNotMatch" and answered and attempt < 3
        payer = ", and name it in S3_REQUESTER_PAYS_BUCKETS if its readers pay" if code == "AccessDenied" else ""
        return _Problem(text=f"{shown}: refused; {_KEYS_REMEDY}{payer}", may_pass=may_pass)
    if status == 404:
        return _Problem(text=f"{shown}: there is no such object", kind=ObjectMissing)
    if status in (412, 416):
        return _Problem(text=f"{shown}: it was replaced while it was read; run the command again")
    if code in _REPEATABLE or status == 429 or (status >= 500 and status != 501):
        return _Problem(text=f"the server answers {shown}; it is overloaded or broken: try again later", may_pass=True)
    return _Problem(text=f"the server answers {shown}; check the location and S3_ENDPOINT_URL")
