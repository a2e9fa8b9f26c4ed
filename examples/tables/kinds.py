"""The shapes of the tables, and the colours and brands that several of them share."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Word(NamedTuple):
    """One value of an option, in both languages."""

    en: str
    zh: str


class Feature(NamedTuple):
    """Something a product has. The title words may appear in its title; one sentence of each language in its
    text: the first names the feature, the second says it in other words."""

    title_en: str
    named_en: str
    told_en: str
    title_zh: str
    named_zh: str
    told_zh: str


class Brand(NamedTuple):
    """`prefix` starts its model numbers. An empty name: not sold under one in that language."""

    en: str
    zh: str
    prefix: str


@dataclass(frozen=True)
class ProductType:
    """`en` and `zh` are names for the same thing. Of each group in `one_of` a product has one feature at most."""

    key: str
    category: str
    price: tuple[int, int]
    en: tuple[str, ...]
    zh: tuple[str, ...]
    intro_en: tuple[str, ...]
    intro_zh: tuple[str, ...]
    features: dict[str, Feature]
    one_of: tuple[tuple[str, ...], ...] = ()
    options: dict[str, dict[str, Word]] = field(default_factory=dict)
    has_model: bool = False


@dataclass(frozen=True)
class Accessory:
    """Made for one product of the type `host`, whose brand, model and noun stand for `{host}`: words that mislead
    keyword search."""

    key: str
    category: str
    price: tuple[int, int]
    host: str
    title_en: tuple[str, ...]
    title_zh: tuple[str, ...]
    text_en: tuple[str, ...]
    text_zh: tuple[str, ...]


COLORS = {
    "black": Word("Black", "黑色"),
    "white": Word("White", "白色"),
    "grey": Word("Grey", "灰色"),
    "navy": Word("Navy Blue", "藏青色"),
    "green": Word("Forest Green", "墨绿色"),
    "red": Word("Red", "红色"),
}
SIZES = {
    "s": Word("Size S", "S码"),
    "m": Word("Size M", "M码"),
    "l": Word("Size L", "L码"),
    "xl": Word("Size XL", "XL码"),
}
GENDERS = {"men": Word("Men's", "男款"), "women": Word("Women's", "女款"), "kids": Word("Kids'", "儿童款")}

BRANDS = {
    "electronics": (
        Brand("Norvik", "诺沃岸", "NK"),
        Brand("Tessavo", "", "TS"),
        Brand("Quillon", "奎砚", "QL"),
        Brand("Brightmoor", "", "BM"),
        Brand("Oakenwave", "橡澜", "OW"),
        Brand("", "岚汐", "LX"),
    ),
    "clothing": (
        Brand("Farrowdale", "", "FD"),
        Brand("Kestrelway", "鸢途", "KW"),
        Brand("Lindqvale", "林砚", "LQ"),
        Brand("Thistle & Rowe", "", "TR"),
        Brand("", "野屿", "YY"),
    ),
    "home": (
        Brand("Hollenfield", "禾澜居", "HF"),
        Brand("Marrowby", "", "MB"),
        Brand("Dunnevale", "敦屿", "DV"),
        Brand("Pellgrove", "", "PG"),
        Brand("", "暖砚", "NY"),
    ),
    "groceries": (
        Brand("Bramblecote", "", "BC"),
        Brand("Saltmere Farm", "盐汀农场", "SF"),
        Brand("Orchard & Ember", "", "OE"),
        Brand("Tillerhouse", "田舍里", "TH"),
        Brand("", "禾屿记", "HY"),
    ),
}
