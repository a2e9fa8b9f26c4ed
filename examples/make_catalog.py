"""Writes the example catalogue, its queries and its relevance grades from the tables beside this file.

    python examples/make_catalog.py [--out examples]

Every run writes the same bytes: catalog.jsonl, queries.jsonl and qrels/test.tsv (the BEIR layout).
Grades follow from attributes, never from wording:

    3  the right type, and everything that was asked for
    2  the right type, and at least half of it
    1  the right type only; or a similar type with everything
    0  another language than the query's, or of no use: the rest of the similar types and
       accessories of what was asked for, which share its words

By model number: 3 the product itself, 2 its siblings of the same number, 1 accessories that fit it;
asking for an accessory: 3 the one that fits, 1 the same thing for another product, 0 the product itself.
Only products in the query's language (or in both) count; a query in both languages takes all.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tables import clothing, electronics, groceries, home
from tables.kinds import BRANDS, Accessory, Brand, Feature, ProductType
from tables.queries import QUERIES, ModelQuery, Query

SEED = 20
PER_TYPE = 36
PER_ACCESSORY = 12
# Repeated over the products of a type.
LANGS = ("en", "zh", "en", "mixed", "zh", "en", "en", "zh", "mixed", "en", "zh")
YUAN_PER_DOLLAR = 7
TABLES = (electronics, clothing, home, groceries)
Product = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the example catalogue, queries and qrels.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    products = make_products(random.Random(SEED))
    queries = [as_asked(query, products) for query in QUERIES]
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    write(out / "catalog.jsonl", map(line, products))
    write(
        out / "queries.jsonl",
        (
            line({"_id": f"q{n:03}", "text": query.text, "lang": query.lang, "kind": query.kind})
            for n, query in enumerate(queries, 1)
        ),
    )
    write(
        out / "qrels" / "test.tsv",
        ["query-id\tcorpus-id\tscore"]
        + [
            f"q{n:03}\t{product['id']}\t{grade}"
            for n, query in enumerate(queries, 1)
            for product in products
            if (grade := judge(query, product)) is not None
        ],
    )


def write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def make_products(rng: random.Random) -> list[Product]:
    made: list[tuple[Product, dict[str, str]]] = []
    models: set[str] = set()
    for table in TABLES:
        for kind in table.TYPES:
            made += products_of(kind, models, rng)
        for accessory in table.ACCESSORIES:
            hosts = [m for m in made if m[0]["attributes"]["type"] == accessory.host]
            made += [(fit(accessory, *host, rng), {}) for host in hosts[:PER_ACCESSORY]]
    products = [product for product, _ in made]
    rng.shuffle(products)
    return [{"id": f"p{n:04}", **product} for n, product in enumerate(products, 1)]


def products_of(
    kind: ProductType, models: set[str], rng: random.Random
) -> Iterator[tuple[Product, dict[str, str]]]:
    """Products, each with the name by which its accessories call it in each language."""
    seen: set[tuple[str, str]] = set()
    series: tuple[Brand, int] | None = None
    n = 0
    while n < PER_TYPE:
        lang = LANGS[n % len(LANGS)]
        brand = rng.choice([b for b in BRANDS[kind.category] if named(b, lang)])
        model = ""
        if kind.has_model:
            # Every third product is a sibling: the number of the one before it with another suffix.
            sibling = n % 3 == 2 and series is not None and bool(named(series[0], lang))
            brand, number = series if sibling and series else (brand, rng.randrange(100, 1000, 10))
            model = f"{brand.prefix}-{number}{rng.choice('XSTE') if sibling else rng.choice(('', '', 'X'))}"
            if model in models or (not sibling and any(m.startswith(f"{brand.prefix}-{number}") for m in models)):
                continue
            series = (brand, number)
        features = some_features(kind, rng)
        options = {name: rng.choice(list(values)) for name, values in kind.options.items()}
        title, text, names = describe(kind, lang, brand, model, features, options, rng)
        if (title, text) in seen:
            continue
        seen.add((title, text))
        models.add(model)
        attributes = {"type": kind.key, "features": features, **options} | ({"model": model} if model else {})
        yield row(kind.category, title, text, brand, lang, rng.randint(*kind.price), attributes), names
        n += 1


def named(brand: Brand, lang: str) -> str:
    """A brand without a Chinese name keeps its Latin one there; one without a Latin name is Chinese only."""
    return (brand.zh or brand.en) if lang == "zh" else brand.en


def some_features(kind: ProductType, rng: random.Random) -> list[str]:
    features: list[str] = []
    for key in rng.sample(list(kind.features), rng.choice((1, 2, 2, 3))):
        if not any(key in group and set(group) & set(features) for group in kind.one_of):
            features.append(key)
    return features


def row(
    category: str, title: str, text: str, brand: Brand, lang: str, dollars: int, attributes: dict[str, Any]
) -> Product:
    yuan = lang == "zh"
    return {
        "title": title,
        "text": text,
        "category": category,
        "brand": brand.en or brand.zh,
        "price": dollars * YUAN_PER_DOLLAR if yuan else dollars - 0.01,
        "currency": "CNY" if yuan else "USD",
        "lang": lang,
        "attributes": attributes,
    }


def describe(
    kind: ProductType,
    lang: str,
    brand: Brand,
    model: str,
    features: list[str],
    options: dict[str, str],
    rng: random.Random,
) -> tuple[str, str, dict[str, str]]:
    """Title, text, and the product's short name in each language."""
    # A title has room for two features, and sellers now and then forget one.
    in_title = [kind.features[key] for key in features if rng.random() < 0.75][:2]
    noun_en, noun_zh = rng.choice(kind.en), rng.choice(kind.zh)
    title_en = english_title(noun_en, in_title, kind, options)
    title_zh = chinese_title(noun_zh, in_title, kind, options)
    text_en = " ".join(sentences(rng.choice(kind.intro_en), features, kind, "en", rng))
    text_zh = "".join(sentences(rng.choice(kind.intro_zh), features, kind, "zh", rng))
    # A Chinese listing often keeps the Latin brand: "Norvik NK-720X 无线降噪耳机".
    name = brand.en if lang == "zh" and brand.en and rng.random() < 0.5 else named(brand, lang)
    maker = " ".join(filter(None, (name, model)))
    names = {"en": f"{maker} {noun_en}", "zh": f"{maker}{' ' if maker[-1].isascii() else ''}{noun_zh}"}
    if lang == "en":
        return f"{maker} {title_en}", text_en, names
    if lang == "zh":
        return f"{maker} {title_zh}", text_zh, names
    return f"{maker} {title_en} {title_zh}", f"{text_en} {text_zh}", names


def english_title(noun: str, features: list[Feature], kind: ProductType, options: dict[str, str]) -> str:
    before = [f.title_en for f in features if not f.title_en.startswith(("with ", "for ", "in "))]
    after = [f.title_en for f in features if f.title_en.startswith(("with ", "for ", "in "))]
    words = {name: kind.options[name][value].en for name, value in options.items()}
    gender = words.pop("gender", "")
    # "Wireless Bluetooth Wireless Headphones" is nobody's title.
    said = {word for title in before for word in title.split()}
    noun = " ".join(word for word in noun.split() if word not in said)
    return ", ".join([" ".join(filter(None, (gender, *before, noun, *after))), *words.values()])


def chinese_title(noun: str, features: list[Feature], kind: ProductType, options: dict[str, str]) -> str:
    words = {name: kind.options[name][value].zh for name, value in options.items()}
    gender = words.pop("gender", "")
    said = [f.title_zh for f in features if f.title_zh not in noun]
    return " ".join([gender + "".join(said) + noun, *words.values()])


def sentences(intro: str, features: list[str], kind: ProductType, lang: str, rng: random.Random) -> list[str]:
    """One to three: some features by name, some in other words."""
    said = [getattr(kind.features[key], f"{rng.choice(('named', 'told'))}_{lang}") for key in features]
    return said if len(said) == 3 or rng.random() < 0.2 else [intro, *said]


def fit(accessory: Accessory, host: Product, names: dict[str, str], rng: random.Random) -> Product:
    lang = host["lang"]
    n = rng.randrange(len(accessory.title_en))
    title_en, text_en = accessory.title_en[n].format(host=names["en"]), accessory.text_en[n]
    title_zh, text_zh = accessory.title_zh[n].format(host=names["zh"]), accessory.text_zh[n]
    title = {"en": title_en, "zh": title_zh, "mixed": f"{title_en} {title_zh}"}[lang]
    text = {"en": text_en, "zh": text_zh, "mixed": f"{text_en} {text_zh}"}[lang]
    attributes = {"type": accessory.key, "fits": accessory.host}
    if "model" in host["attributes"]:
        attributes["fits_model"] = host["attributes"]["model"]
    brand = next(b for b in BRANDS[accessory.category] if host["brand"] in (b.en, b.zh))
    return row(accessory.category, title, text, brand, lang, rng.randint(*accessory.price), attributes)


def as_asked(query: Query | ModelQuery, products: list[Product]) -> Query:
    if isinstance(query, Query):
        return query
    has = "fits_model" if query.accessory else "model"
    model = [
        product["attributes"][has]
        for product in products
        if product["attributes"]["type"] == (query.accessory or query.type)
        and product["lang"] in (query.lang, "mixed")
    ][query.nth]
    text = query.text.format(hyphen=model, joined=model.replace("-", ""), spaced=model.replace("-", " "))
    return Query(query.lang, "model", text, (query.accessory,) if query.accessory else (), model=model)


def judge(query: Query, product: Product) -> int | None:
    """The product's grade, or None where nobody would think of it."""
    grade = judge_model(query, product) if query.model else judge_attributes(query, product)
    readable = query.lang == "mixed" or product["lang"] in (query.lang, "mixed")
    return grade if readable or grade is None else 0


def judge_attributes(query: Query, product: Product) -> int | None:
    has = product["attributes"]
    met = [meets(product, want) for want in query.want]
    if has["type"] in query.types:
        return 3 if all(met) else 2 if 2 * sum(met) >= len(met) else 1
    if has["type"] in query.near:
        return 1 if all(met) else 0
    return 0 if has.get("fits") in query.types else None


def judge_model(query: Query, product: Product) -> int | None:
    has = product["attributes"]
    if query.types:
        if has["type"] in query.types:
            return 3 if has["fits_model"] == query.model else 1
        return 0 if has.get("model") == query.model else None
    if "fits_model" in has:
        return 1 if has["fits_model"] == query.model else None
    if has.get("model") == query.model:
        return 3
    return 2 if number(has.get("model", "")) == number(query.model) else None


def meets(product: Product, want: str) -> bool:
    name, _, value = want.partition("=")
    if name == "brand":
        return bool(product["brand"] == value)
    return product["attributes"].get(name) == value if value else name in product["attributes"].get("features", ())


def number(model: str) -> str:
    """NK-720 of NK-720X."""
    return model.rstrip("XSTE")


if __name__ == "__main__":
    main()
