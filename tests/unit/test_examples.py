"""The example catalogue is what its script writes, and its judgements can be used."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from serve_app.evaluation.dataset import read_dataset

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("catalog.jsonl", "queries.jsonl", "qrels/test.tsv")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def products() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows("catalog.jsonl")}


def test_the_script_writes_the_committed_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "make_catalog.py", "--out", tmp_path], check=True, timeout=60)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), name


def test_there_are_products_of_every_category_and_language(products: dict[str, dict[str, Any]]) -> None:
    assert len(products) == len(rows("catalog.jsonl")) >= 1000
    by_category = Counter(product["category"] for product in products.values())
    assert set(by_category) == {"electronics", "clothing", "home", "groceries"}
    assert min(by_category.values()) >= 200
    by_lang = Counter(product["lang"] for product in products.values())
    assert set(by_lang) == {"en", "zh", "mixed"}
    assert min(by_lang.values()) >= 200


def test_products_are_whole(products: dict[str, dict[str, Any]]) -> None:
    for product in products.values():
        assert product["title"].strip() == product["title"] != ""
        assert product["text"].strip() == product["text"] != ""
        assert "{" not in product["title"] + product["text"]
        assert product["price"] > 0
        has_chinese = any("\u4e00" <= letter <= "\u9fff" for letter in product["title"] + product["text"])
        assert has_chinese == (product["lang"] != "en")
    models = [product["attributes"]["model"] for product in products.values() if "model" in product["attributes"]]
    assert len(models) == len(set(models))
    assert len({(product["title"], product["text"]) for product in products.values()}) > 0.98 * len(products)


def test_every_query_is_judged_on_products_that_exist(products: dict[str, dict[str, Any]]) -> None:
    data = read_dataset(EXAMPLES)
    assert data.unjudged == 0
    by_lang = Counter(query.lang for query in data.queries)
    assert len(data.queries) >= 80
    assert by_lang["en"] >= 60
    assert by_lang["zh"] >= 40
    assert by_lang["mixed"] >= 5
    for grades in data.grades.values():
        assert set(grades) <= set(products)
        assert set(grades.values()) <= {0, 1, 2, 3}
        assert max(grades.values()) >= 2


def test_a_product_in_another_language_is_never_relevant(products: dict[str, dict[str, Any]]) -> None:
    data = read_dataset(EXAMPLES)
    for query in data.queries:
        relevant = {products[id]["lang"] for id, grade in data.grades[query.id].items() if grade > 0}
        assert query.lang == "mixed" or relevant <= {query.lang, "mixed"}


def test_accessories_of_what_was_asked_for_are_judged_and_useless(products: dict[str, dict[str, Any]]) -> None:
    data = read_dataset(EXAMPLES)
    [query] = [query for query in data.queries if query.text == "headphones that block out noise on a plane"]
    grades = {id: (products[id], grade) for id, grade in data.grades[query.id].items()}
    assert all(grade == 0 for product, grade in grades.values() if "fits" in product["attributes"])
    best = [product["attributes"] for product, grade in grades.values() if grade == 3]
    assert best
    assert all(has["type"] == "headphones" and "anc" in has["features"] for has in best)
