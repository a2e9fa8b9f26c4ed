"""Whatever fits the OpenAPI document, or nearly, gets an answer that the document describes, and no 5xx."""

from collections.abc import Mapping

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.system.conftest import System

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
# Paths of the calls that need rollouts: tests/rollout/test_openapi.py.
OF_ROLLOUTS = "/v1/(rollouts|events)"


def test_no_generated_call_gets_a_server_error(system):
    assert_answers_conform(system, rf"^(?!{OF_ROLLOUTS})")


def assert_answers_conform(
    system: System, paths: str, headers: Mapping[str, str] | None = None, examples: int = 25
) -> None:
    """Makes up to `examples` right and as many wrong calls, with the headers, of each operation whose path matches
    the pattern."""
    schema = schemathesis.openapi.from_url(f"{system.url}/openapi.json").include(path_regex=paths)
    operations = [result.ok() for result in schema.get_all_operations()]
    tried = 0
    for operation in operations:
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def conforms(case):
                nonlocal tried
                tried += 1
                response = case.call(base_url=system.url, headers=headers, timeout=70)
                if response.status_code == 504 and is_short(case):
                    # A deadline that nothing can meet is the caller's.
                    return
                if response.status_code == 503 and "is its disk slow? try again" in response.text:
                    return
                assert response.status_code < 500, response.text
                case.validate_response(response, checks=CHECKS)

            try:
                conforms()
            except Unsatisfiable:
                # Operations without a body cannot be called wrongly.
                assert mode is GenerationMode.NEGATIVE
                assert not len(operation.body)
            except Exception as error:
                raise AssertionError(f"{operation.label} ({mode.value}): {error}") from error
    assert tried > 8 * len(operations) > 0
    assert system.client.get("/healthz").status_code == 200


def is_short(case: schemathesis.Case) -> bool:
    asked_ms = case.body.get("timeout_ms") if isinstance(case.body, dict) else None
    # 1.0 is an integer, too, as JSON Schema has it.
    return (isinstance(asked_ms, int | float) and asked_ms < 1000) or "X-Timeout-Ms" in (case.headers or {})
