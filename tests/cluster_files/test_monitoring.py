"""Alert rules, scrape config and dashboard are valid; tests/system compares their names with a running fleet."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.metrics import MONITORING, ROOT, dashboard_queries, documented, named, recorded, rules


@pytest.fixture(autouse=True)
def _promtool(request: pytest.FixtureRequest) -> None:
    if "promtool" in request.fixturenames and not shutil.which("promtool"):
        pytest.skip("promtool is not installed (scripts/install-tools.sh)")


@pytest.fixture
def promtool() -> str:
    return shutil.which("promtool") or ""


def run(promtool: str, *arguments: str | Path) -> None:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alert_rules_are_valid_and_fire_when_they_should(promtool: str) -> None:
    run(promtool, "check", "rules", MONITORING / "alerts.yaml")
    run(promtool, "test", "rules", MONITORING / "alerts.test.yaml")


def test_every_alert_is_tested_both_ways_and_documented() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    tests = yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
    fired = {t["alertname"] for test in tests for t in test["alert_rule_test"] if t.get("exp_alerts")}
    assert fired == alerts
    page = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^\| ([A-Z][A-Za-z]+) \|", page, re.MULTILINE)) == alerts


def test_the_scrape_config_is_valid(promtool: str, tmp_path: Path) -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    for job in config["scrape_configs"]:
        # Debian's promtool is built without Kubernetes.
        if job.pop("kubernetes_sd_configs", None):
            job["static_configs"] = [{"targets": ["pod:8080"]}]
    path = tmp_path / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    run(promtool, "check", "config", path)


def test_the_dashboards_queries_are_valid(promtool: str, tmp_path: Path) -> None:
    queries = [query for query in dashboard_queries() if not query.startswith("label_values")]
    assert len(queries) > 20
    recording = [{"record": f"dashboard:{i}", "expr": query} for i, query in enumerate(queries)]
    path = tmp_path / "dashboard.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recording}]}))
    run(promtool, "check", "rules", path)


def test_no_fleet_hides_another_one() -> None:
    """Each has a namespace of its own, by which prometheus.yaml labels it."""
    for rule in rules():
        assert not re.search(r"\b(?:sum|min|max|avg|count|group)\s*\(", rule["expr"]), rule["expr"]
        kept = re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])
        assert all("namespace" in labels.split(", ") for labels in kept), rule["expr"]
    choice = "label_values(ray_serve_app_gateway_problem, namespace)"
    assert choice in dashboard_queries()
    for query in set(dashboard_queries()) - {choice}:
        # What stands for the one that is chosen.
        asked = re.findall(r'(?:ray_serve_[a-z_]+|serve_app:[a-z_]+)({namespace=~"\.\*")?', query)
        assert asked, query
        assert all(asked), query


def test_what_is_named_is_documented() -> None:
    """Serve's own are named below the table."""
    page = (ROOT / "docs" / "operations.md").read_text()
    assert not [name for name in named() if f"`{name}`" not in page]
    ours = {name for name in named() if name.startswith("ray_serve_app_")}
    assert ours | recorded() == documented()
