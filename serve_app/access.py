"""Names of the environment variables that hold keys, and what callers of the gateway make of theirs."""

import os

# The gateway's: whom it lets in.
API_KEYS, API_KEYS_FILE = "SERVE_APP_API_KEYS", "SERVE_APP_API_KEYS_FILE"
# The gateway's and the operators', for /v1/rollouts.
ADMIN_KEY = "SERVE_APP_ADMIN_KEY"
# The caller's own.
API_KEY = "SERVE_APP_API_KEY"


def bearer(variable: str) -> dict[str, str]:
    """The header with the key in `variable`; none where it isn't set. Raises ValueError for one that no header
    carries."""
    key = os.environ.get(variable, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} has characters other than printable ASCII, which no header carries")
    return {"Authorization": f"Bearer {key}"}
