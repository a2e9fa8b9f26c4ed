"""Names of the environment variables that hold keys and passwords, and what is made of them."""

import os

# The gateway's: whom it lets in.
API_KEYS, API_KEYS_FILE = "SERVE_APP_API_KEYS", "SERVE_APP_API_KEYS_FILE"
# The gateway's and the operators', for /v1/rollouts.
ADMIN_KEY = "SERVE_APP_ADMIN_KEY"
# The caller's own.
API_KEY = "SERVE_APP_API_KEY"
# Of every Redis whose url brings none, so that none need stand in a config file.
REDIS_PASSWORD = "SERVE_APP_REDIS_PASSWORD"


def bearer(variable: str) -> dict[str, str]:
    """The header with the key in `variable`; none where it isn't set. Raises ValueError for one that no header
    carries."""
    key = os.environ.get(variable, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} has characters other than printable ASCII, which no header carries")
    return {"Authorization": f"Bearer {key}"}


def redis_password() -> str | None:
    return os.environ.get(REDIS_PASSWORD) or None
