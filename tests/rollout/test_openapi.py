"""The calls of operators, and events, as tests/system/test_openapi.py has those of everybody."""

from tests.rollout.conftest import KEY, RolloutSystem
from tests.system.test_openapi import OF_ROLLOUTS, assert_answers_conform


def test_no_generated_call_of_an_operator_gets_a_server_error(fleet: RolloutSystem) -> None:
    assert_answers_conform(fleet, f"^{OF_ROLLOUTS}", {"Authorization": f"Bearer {KEY}"}, examples=10)
