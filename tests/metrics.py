"""Which metrics the documents, rules and dashboard name, and what a running Ray exports."""

import json
import re
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "cluster" / "monitoring"
_NAME = re.compile(r"\b(?:ray_serve_[a-z_]+|serve_app:[a-z_]+)\b")
# A histogram's three series are one metric.
_SERIES = re.compile(r"_(?:bucket|sum|count)$")


def dashboard_queries() -> list[str]:
    """With values for Grafana's variables."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    for variable, value in (
        ("$__rate_interval", "1m"),
        ("$namespace", ".*"),
        ("$route", ".*"),
        ("$variant", ".*"),
    ):
        queries = [query.replace(variable, value) for query in queries]
    return queries


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def documented() -> set[str]:
    """Of the table in docs/operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text()
    return set(re.findall(r"^\| `([a-z_:]+)` \|", page, re.MULTILINE))


def named() -> set[str]:
    """By all of them, without what the rules make themselves."""
    texts = [*dashboard_queries(), *(rule["expr"] for rule in rules())]
    found = {name for text in texts for name in _NAME.findall(text)}
    return {_SERIES.sub("", name) for name in found | documented()} - recorded()


def exported() -> set[str]:
    """By the Ray node that this process is connected to."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines = httpx.get(url, timeout=30).text.splitlines()
    return {_SERIES.sub("", re.split(r"[{ ]", line, maxsplit=1)[0]) for line in lines if not line.startswith("#")}
