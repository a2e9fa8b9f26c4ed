"""Engines by themselves, without Ray."""

from tests.system.conftest import model_dir  # noqa: F401
