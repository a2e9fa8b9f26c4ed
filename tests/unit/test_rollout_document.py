"""The rollout document: little is enough, all of it survives JSON, and what is wrong is said with its place."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.rollout.document import RolloutDocument, parse
from serve_app.rollout.guards import METRICS

ROOT = Path(__file__).parents[2]
LEAST = {"route": "default", "stable": "small", "canary": "large"}


def problem_of(**changes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(json.dumps({**LEAST, **changes}))
    return str(caught.value)


def kinds(document):
    return [step.kind if step.set_weight is None else step.set_weight for step in document.steps]


def test_route_stable_and_canary_are_enough():
    document = parse("{route: default, stable: small, canary: large}")
    assert kinds(document) == [5, "analysis", 25, "analysis", 50, "analysis", 100]
    assert list(document.guards) == ["error_rate", "degraded_rate", "latency_p50_ratio", "latency_p95_ratio"]
    assert (document.shadow, document.on_success, document.on_failure) == (0, "promote", "rollback")


def test_with_a_shadow_the_order_is_watched_too_and_first_before_any_user():
    document = parse(json.dumps({**LEAST, "shadow": 0.1}))
    assert kinds(document)[:2] == ["analysis", 5]
    assert {"rbo", "kendall_tau"} < set(document.guards)
    assert set(document.guards_at(0)) == {"error_rate", "degraded_rate", "rbo", "kendall_tau"}
    assert document.guards_at(5) == document.guards
    assert document.guards_at(100) == {}


def test_guards_take_what_they_leave_out_from_their_metric():
    document = parse(json.dumps({**LEAST, "guards": {"error_rate": {"threshold": 0.1}, "ctr_at_1": None}}))
    assert document.guards["error_rate"].threshold == 0.1
    assert document.guards["error_rate"].min_samples == METRICS["error_rate"].min_samples
    assert document.guards["ctr_at_1"].alpha == 0.05
    assert set(document.guards) == {"error_rate", "ctr_at_1"}


def test_a_whole_document_in_yaml():
    document = parse("""
        route: default
        stable: small
        canary: large
        shadow: 0.25
        steps:
          - analysis: {timeout_s: 60}
          - set_weight: 12.5
          - pause: {duration_s: 30}
          - analysis:
          - pause:
          - set_weight: 100
          - pause: {duration_s: 5}
        guards:
          error_rate: {threshold: 0.01, min_samples: 50, failure_limit: 3}
          top1_agreement:
        on_success: hold
        on_failure: pause
    """)
    assert kinds(document) == ["analysis", 12.5, "pause", "analysis", "pause", 100, "pause"]
    assert document.steps[0].analysis.timeout_s == 60
    assert document.steps[2].pause.duration_s == 30
    assert document.steps[4].pause.duration_s is None


@pytest.mark.parametrize("exclude_none", [True, False])
def test_a_document_survives_json_with_its_defaults_filled_in(exclude_none):
    document = parse(json.dumps({**LEAST, "shadow": 0.1, "steps": [{"pause": {}}, {"set_weight": 5}]}))
    dumped = document.model_dump_json(exclude_none=exclude_none)
    assert RolloutDocument.model_validate_json(dumped) == document
    assert json.loads(dumped)["steps"][1] == {"set_weight": 5}
    assert document.model_copy() == document


def test_what_an_older_version_accepted_can_still_be_read():
    document = parse(json.dumps({**LEAST, "shadow": 0.1, "guards": {"rbo": {}}})).model_dump(mode="json")
    document["guards"]["rbo"]["min_samples"] = 5
    assert RolloutDocument.stored(document).guards["rbo"].min_samples == 5
    with pytest.raises(ValidationError, match="10 and more"):
        RolloutDocument.model_validate(document)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "rollouts").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_examples_are_valid(path):
    assert parse(path.read_text()).route == "default"


def test_the_end_of_the_steps_is_success_whatever_the_last_weight():
    assert kinds(parse(json.dumps({**LEAST, "steps": [{"set_weight": 10}, {"analysis": {}}]}))) == [10, "analysis"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canary": "small"}, "canary and stable are both 'small'"),
        ({"shadow": 1.5}, "rollout.shadow: Input should be less than or equal to 1 (got 1.5)"),
        ({"shadow": True}, "rollout.shadow"),
        ({"steps": []}, "rollout.steps"),
        (
            {"steps": [{"set_weight": 20}, {"set_weight": 10}]},
            "steps[1].set_weight is 10 after 20; allowed: 20 to 100",
        ),
        ({"steps": [{"set_weight": 101}]}, "rollout.steps.0.set_weight"),
        ({"steps": [{"set_weight": "5"}]}, "rollout.steps.0.set_weight"),
        ({"steps": [{"set_weight": None}]}, "set_weight is null; allowed: 0 to 100"),
        (
            {"steps": [{"set_weight": 5, "pause": None}]},
            "rollout.steps.0: a step is one of set_weight, pause and analysis",
        ),
        ({"steps": [{}]}, "rollout.steps.0: a step is one of"),
        ({"steps": [{"wait": 5}]}, "rollout.steps.0: a step is one of"),
        ({"steps": ["pause"]}, "rollout.steps.0: a step is one of"),
        ({"steps": [{"pause": {"duration_s": 0}}]}, "rollout.steps.0.pause.duration_s"),
        ({"steps": [{"pause": {"minutes": 1}}]}, "rollout.steps.0.pause.minutes"),
        ({"steps": [{"analysis": {}}]}, "steps[0] is an analysis at weight 0"),
        ({"steps": [{"set_weight": 100}, {"analysis": {}}]}, "steps[1] is an analysis at weight 100"),
        ({"guards": {}}, "steps[1] is an analysis at weight 5, but guards is empty"),
        ({"guards": ["error_rate"]}, "rollout.guards: is a list"),
        ({"guards": {"eror_rate": {}}}, "did you mean 'error_rate'?"),
        ({"guards": {"rbo": {}}}, "guards.rbo needs mirrored calls, but shadow is 0"),
        ({"guards": {"error_rate": {"threshold": 2}}}, "error_rate.threshold is 2 (canary minus stable, at most)"),
        ({"guards": {"latency_p50_ratio": {"threshold": 0.5}}}, "allowed: 1 to 100"),
        ({"guards": {"error_rate": {"alpha": 0.05}}}, "error_rate.alpha is 0.05"),
        ({"guards": {"error_rate": {"min_samples": 0}}}, "rollout.guards.error_rate.min_samples"),
        (
            {"shadow": 0.1, "guards": {"rbo": {"min_samples": 9}}},
            "rbo.min_samples is 9; allowed: 10 and more, because noise can't be told from fewer",
        ),
        ({"shadow": 0.1, "guards": {"kendall_tau": {"min_samples": 2}}}, "kendall_tau.min_samples is 2"),
        ({"guards": {"error_rate": 0.02}}, "rollout.guards.error_rate"),
        ({"on_failure": "explode"}, "rollout.on_failure"),
        ({"cannary": "x"}, "rollout.cannary"),
        ({"route": "a b"}, "rollout.route"),
    ],
)
def test_what_is_wrong_is_said_with_place_and_value(changes, message):
    assert message in problem_of(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("route: a\nroute: b", "rollout, line 2: is not valid YAML: the key 'route' stands twice"),
        ("{a: [", "is not valid YAML"),
        ("- route", "rollout: Input should be a valid dictionary"),
        ("", "rollout: Input should be a valid dictionary"),
        ("[" * 5_000, "rollout: is nested too deep"),
    ],
)
def test_text_that_is_no_document(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(text)
    assert message in str(caught.value)


def test_every_problem_is_listed():
    assert len(problem_of(shadow=2, on_success="no", extra=1).splitlines()) == 3
