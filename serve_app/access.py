"""Names of the environment variables that hold keys and passwords, what is made of them, and who reaches Serve."""

import ipaddress
import os
import re
from urllib.parse import urlsplit

# The gateway's: whom it lets in.
API_KEYS, API_KEYS_FILE = "SERVE_APP_API_KEYS", "SERVE_APP_API_KEYS_FILE"
# The gateway's and the operators', for /v1/rollouts.
ADMIN_KEY = "SERVE_APP_ADMIN_KEY"
# The caller's own.
API_KEY = "SERVE_APP_API_KEY"
# Of every Redis whose url brings none, so that none need stand in a config file.
REDIS_PASSWORD = "SERVE_APP_REDIS_PASSWORD"
CACHE_REDIS_PASSWORD = "SERVE_APP_CACHE_REDIS_PASSWORD"


def secret(variable: str) -> str:
    """The key in `variable`, empty where it isn't set; without the newline that files often end in."""
    return os.environ.get(variable, "").strip()


def bearer(variable: str) -> dict[str, str]:
    """The header with the key in `variable`; none where it isn't set. Raises ValueError for one that no header
    carries."""
    key = secret(variable)
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} has characters other than printable ASCII, which no header carries")
    return {"Authorization": f"Bearer {key}"}


def redis_password(variable: str = REDIS_PASSWORD) -> str | None:
    """The rollouts' store and the score cache have servers of their own, and so passwords."""
    return os.environ.get(variable) or None


def refuse_strangers(host: str | None) -> None:
    """For a gateway without keys on Serve's `host` (None: all interfaces). Raises ValueError where other machines
    can reach it."""
    # Behind HAProxy every gateway replica also has a port of its own, on a cluster's nodes in reach of the others.
    everywhere = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    if everywhere or not _is_loopback(host):
        where = "a port of its own behind HAProxy" if everywhere else host or "0.0.0.0"
        raise ValueError(
            f"the gateway listens on {where}, where other machines reach it, and has no API keys; set "
            f"{API_KEYS_FILE} or {API_KEYS} in its environment (serve-app key NAME makes a key), or say "
            "args: {without_keys: true} in the gateway's application"
        )


def local_url(host: str | None, port: int) -> str:
    """Where this machine reaches Serve on `host` (None: all interfaces)."""
    if not host or host in ("0.0.0.0", "::", "localhost"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def shown(url: str) -> str:
    """`url` for people, without the user and password that it may hold: they are nobody else's."""
    return re.sub(r"^(.*?://)?.*@", r"\1", url, flags=re.DOTALL)


def why_uncallable(url: str, error: Exception) -> str:
    """What `error` says of `url`; only its name where it could quote a key: of a password with a / in it, httpx
    says that it is no port."""
    return str(error) if shown(url) == url else type(error).__name__


def is_elsewhere(url: str) -> bool:
    """Whether `url` is another machine's, which may be reached by a proxy of the environment (ALL_PROXY, …)."""
    try:
        return not _is_loopback(urlsplit(url).hostname or "elsewhere")
    except ValueError:
        return True


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:
        return False
