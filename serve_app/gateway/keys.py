"""Who may call, and how much: API keys by their SHA-256, each with a name and perhaps a rate in pairs a second.

Keys are long random strings (`serve-app key NAME` makes one), so that a plain hash of them tells nothing. They
stand in a file, which is read again when it changes, or in the environment:

    SERVE_APP_API_KEYS_FILE=/etc/serve-app/keys.yaml
    SERVE_APP_API_KEYS=shop:KEY,search:KEY
"""

import base64
import binascii
import hashlib
import hmac
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app import strictyaml
from serve_app.access import API_KEYS, API_KEYS_FILE
from serve_app.gateway.errors import ApiError

# A key may use up so many seconds of its rate at once.
_BURST_S = 2.0
_LEAST_LENGTH = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """`pairs_per_s`: of all gateway replicas together; None: no limit."""

    name: str
    sha256: str
    pairs_per_s: float | None = None


class KeysError(ValueError):
    """Keys that can't be read; the message names the place, and never a key."""


def read_keys(environment: Mapping[str, str]) -> tuple[Key, ...]:
    """All keys of the file and the environment. Raises KeysError."""
    keys: list[Key] = []
    if path := environment.get(API_KEYS_FILE, "").strip():
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KeysError(f"{API_KEYS_FILE} is {path!r}, which can't be read: {error}") from None
        keys += _from_yaml(text, path)
    keys += _from_list(environment.get(API_KEYS, ""))
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise KeysError(f"two API keys are called {name!r}; every key has a name of its own")
    return tuple(keys)


def new_key(name: str) -> tuple[str, str]:
    """A key, and its line for the file of keys. Raises KeysError for a name that is none."""
    key = secrets.token_urlsafe(32)
    made = _key(name, hashed(key), "serve-app key")
    return key, f"{made.name}: sha256:{made.sha256}"


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _password(credentials: str) -> str:
    """Of `Basic` credentials; empty where they are none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _from_yaml(text: str, path: str) -> list[Key]:
    try:
        parsed = strictyaml.parse(text)
    except strictyaml.YamlError as error:
        # Its message may quote what stands there.
        line = f", line {error.line}" if error.line else ""
        raise KeysError(f"{path}{line}: is not valid YAML, or a name stands twice") from None
    # An empty file would open the gateway to everybody.
    if not isinstance(parsed, dict) or not parsed:
        raise KeysError(f"{path}: is no mapping of names to keys, or has none")
    return [
        _key(str(name), value, f"{path}, entry {number}") for number, (name, value) in enumerate(parsed.items(), 1)
    ]


def _key(name: str, value: Any, place: str) -> Key:
    """Where anything is wrong, whatever was given may be a key that stands in the wrong place."""
    given = value if isinstance(value, dict) else {"sha256": value}
    if not _NAME.fullmatch(name):
        raise KeysError(f"{place}: this is no name for a key; allowed: letters, digits, . _ -")
    if given.keys() - {"sha256", "pairs_per_s"}:
        raise KeysError(f"{place}: has something unknown; allowed: sha256, pairs_per_s")
    sha256 = str(given.get("sha256", "")).removeprefix("sha256:").lower()
    if not _SHA256.fullmatch(sha256):
        raise KeysError(f"{place}: has no sha256 of 64 hexadecimal digits (serve-app key NAME makes one)")
    rate = given.get("pairs_per_s")
    if rate is not None and not (isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1e12):
        raise KeysError(f"{place}: pairs_per_s is no number above 0")
    return Key(name, sha256, None if rate is None else float(rate))


def _from_list(text: str) -> list[Key]:
    keys = []
    for i, entry in enumerate(filter(None, (part.strip() for part in text.split(",")))):
        name, colon, key = (part.strip() for part in entry.partition(":"))
        if not colon or not _NAME.fullmatch(name):
            raise KeysError(f"{API_KEYS}: entry {i + 1} is not NAME:KEY")
        if len(key) < _LEAST_LENGTH:
            raise KeysError(
                f"{API_KEYS}: the key of entry {i + 1} has {len(key)} characters; least: {_LEAST_LENGTH}"
            )
        keys.append(Key(name, hashed(key)))
    return keys


@dataclass(slots=True)
class _Bucket:
    """What a key may still use; below 0 it waits. So a call of any size passes, and is paid for afterwards."""

    left: float
    at: float


@dataclass(slots=True)
class Keys:
    """The keys in force, and what each has used. `gateways` share a key's rate evenly."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    clock: Callable[[], float] = time.monotonic
    known: tuple[Key, ...] = ()
    # Why the file's last version isn't in force.
    problem: str | None = None
    _by_hash: dict[str, Key] = field(default_factory=dict)
    _buckets: dict[str, _Bucket] = field(default_factory=dict)
    _read: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises KeysError."""
        self._read = self._version()
        self._put(read_keys(self.environment))

    def refresh(self) -> bool:
        """Reads the file again if it has changed; what can't be read leaves the old keys in force. Whether
        anything was read. Blocks for the disk."""
        version = self._version()
        if version == self._read:
            return False
        self._read = version
        try:
            self._put(read_keys(self.environment))
            self.problem = None
        except KeysError as error:
            self.problem = str(error)
        return True

    def check(self, authorization: str) -> Key | None:
        """The key of `Authorization: Bearer KEY`, or of the password of `Basic`; None where no keys are needed.
        Raises ApiError."""
        if not self.known:
            return None
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() == "basic":
            # From clients that have no place for a key but the URL: http://key:KEY@host.
            token = _password(token)
        digest = hashed(token)
        found = self._by_hash.get(digest)
        known_scheme = scheme.lower() in ("bearer", "basic")
        if not known_scheme or found is None or not hmac.compare_digest(found.sha256, digest):
            raise ApiError("unauthorized", "give an API key: Authorization: Bearer KEY")
        return found

    def spend(self, key: Key | None, pairs: int, gateways: int = 1) -> None:
        """Counts `pairs` against the key's rate. Raises ApiError when it is used up."""
        if key is None or key.pairs_per_s is None:
            return
        now, rate = self.clock(), key.pairs_per_s / max(1, gateways)
        bucket = self._buckets.setdefault(key.name, _Bucket(rate * _BURST_S, now))
        bucket.left = min(rate * _BURST_S, bucket.left + (now - bucket.at) * rate)
        bucket.at = now
        if bucket.left <= 0:
            raise ApiError(
                "rate_limited",
                f"key {key.name} has used up its {key.pairs_per_s:g} pairs_per_s",
                retry_after_s=max(1, math.ceil(-bucket.left / rate)),
            )
        bucket.left -= pairs

    def _put(self, keys: tuple[Key, ...]) -> None:
        self.known = keys
        self._by_hash = {key.sha256: key for key in keys}
        names = {key.name for key in keys}
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in names}

    def _version(self) -> tuple[int, ...] | None:
        """Of the file; a Kubernetes secret is a link that is changed, which stat follows. Who may read it shows in
        its ctime."""
        try:
            found = os.stat(self.environment.get(API_KEYS_FILE, "").strip())
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
