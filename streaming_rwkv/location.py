"""Locations in settings and arguments: a local path, or `s3://bucket/prefix`.

Anything else with a scheme is refused by name: as a path it would become a folder `gs:/` beside the program. Names and
passwords within a location are refused too, and never shown: locations are saved with runs and data sets, and logged.
"""

from __future__ import annotations

import re
from pathlib import Path

from streaming_rwkv.config import UserError, without_credentials

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH = re.compile(r"s3:(?!//)", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_S3 = "s3://"
_LONGEST_PATH, _LONGEST_PART = 4095, 255  # bytes, of Linux and macOS


class LocationError(UserError):
    """A location that cannot be used: an unknown scheme, no bucket, credentials in it, or not on this machine."""


def checked_location(location: str | Path) -> str:
    """Return `location`, its scheme in lower case.

    Raises:
        LocationError: neither a local path nor s3://bucket/prefix, or with user information in it.
    """
    if not isinstance(location, (str, Path)):
        raise LocationError(f"found {location!r}, expected text or a Path; give a local path or s3://bucket/prefix")
    text = str(location)
    if not text or "\0" in text:
        raise LocationError(f"found {text!r}; give a local path or s3://bucket/prefix")
    found = _SCHEME.match(text)
    if found is None:
        encoded = text.encode(errors="surrogatepass")
        if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_PART:
            raise LocationError(
                f"{without_credentials(text[:100])}…: a path of {len(text):,} characters cannot be found here; give a "
                "shorter one"
            )
        if _ONE_SLASH.match(text):
            raise LocationError(f"{without_credentials(text)}: not a location; write s3://bucket/prefix")
        return text
    scheme, rest = found[1].lower(), text[found.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A secret key may hold slashes: s3://KEY:SE/CRET@bucket has no '@' before its first one, but no bucket has a colon.
    if "@" in authority or (scheme == "s3" and ":" in authority):
        remedy = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if scheme == "s3" else "the environment"
        raise LocationError(
            f"{scheme}://…: holds a user name or a password, and locations are saved and logged; write "
            f"s3://bucket/prefix and give credentials by {remedy}"
        )
    if scheme == "file":
        raise LocationError(f"{without_credentials(text)}: write a local path without file://")
    if scheme != "s3":
        raise LocationError(
            f"{without_credentials(text)}: scheme {scheme!r} is not supported; give a local path or s3://bucket/prefix "
            "(S3_ENDPOINT_URL for servers other than AWS)"
        )
    if not _BUCKET.fullmatch(authority) or rest[len(authority) :][:1] not in ("", "/"):
        raise LocationError(
            f"{without_credentials(_S3 + rest)}: not a place in object storage; write s3://bucket/prefix"
        )
    return _S3 + rest


def is_remote(location: str | Path) -> bool:
    """Return True if `location` is in object storage, False if it is a local path.

    Raises:
        LocationError: it is neither.
    """
    return checked_location(location).startswith(_S3)


def expand_user(path: str | Path) -> Path:
    """Return a local path with the home folder in place of a leading `~`.

    Raises:
        LocationError: the user has no home folder, as in containers without HOME, or there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise LocationError(f"{path}: has no home folder for ~; set HOME, or write the whole path") from None


def checked_local(location: str | Path, *, remedy: str = "give a local path") -> str:
    """Return `location`, a local path.

    Raises:
        LocationError: it is in object storage, or no location at all.
    """
    if is_remote(location):
        raise LocationError(f"found {checked_location(location)!r}, expected a local path; {remedy}")
    return str(location)
