"""How text becomes terms, for documents and queries alike.

tantivy does the work: words, lower case, Latin letters without diacritics, English stop words and stems.
Python only prepares what tantivy's word splitting gets wrong, and leaves plain English text alone:

- Unicode is brought to one form (NFKC without diacritics), so `ＷＨ`, `wh` and `café`, `cafe` are the same.
- Scripts written without spaces (Chinese, Japanese, Korean, Thai, Lao) become overlapping pairs of characters,
  and single characters for queries of one character: `降噪耳机` is searched as `降噪 噪耳 耳机`.
- `WH-1000XM4` is `wh`, `1000xm4` and also `wh1000xm4`; queries join neighbours (`wh 1000xm4`) and split words
  where letters meet digits (`iphone15`) too. `10,000mAh` is also `10000mah`.
- `EA1002S` is stemmed like any word, to `ea1002`, and is also a word of its own that isn't.
- `1.5L` is also `1.5` and `1.5l` in one piece each, and searched as such: not as `1`, `5l` or `15l`.
- `120 × 200 cm` and `120*200` are also `120x200`.
- `AT&T`, `Node.js` and `L'Oréal` are also `att`, `nodejs` and `loreal`.
- `C++` and `C#` are the words `cplusplus` and `csharp`; `getUserName` is also `get`, `user` and `name`.

All of it is added as words to the text that is indexed, so that one BM25 statistic per field serves all languages.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import regex
import tantivy

# Goes into every index; an index of another version is refused, because its terms would not be found.
VERSION = 4

# A longer query is cut here: its terms are bounded anyway (`tantivy_index.MAX_TERMS`).
MAX_QUERY_CHARS = 8_192

# Weight of the parts of a word that the query doesn't have as such: `128` and `gb` for `128gb`.
PART_WEIGHT = 0.5

# Weight of single Chinese characters beside the pairs: `壳` of `手机壳` also finds `手机保护壳`.
CHARACTER_WEIGHT = 0.25

# Tokens of more bytes are dropped (base64, URLs without separators).
_MAX_TOKEN_BYTES = 128

# Not indexed in texts, where they are a third of all words; kept in titles for queries with nothing else (`It`).
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
    "this to was will with"
)
# Not searched when the query has other words. They are indexed, so `The Who` can be found.
_QUESTION_WORDS = (
    "did do does had has have how i me my our than was we were what when where which who whom whose why you your"
)

_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e46\u0e81-\u0ec6"  # Thai, Lao
    "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u309d-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u3105-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97c\uac00-\ud7fb\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD = re.compile(f"[^\\W_{_UNSPACED}]+")
# Latin, Greek and Cyrillic diacritics; tone marks of Thai and Lao.
_MARKS = re.compile("[\u0300-\u036f\u0e47-\u0e4e\u0ec8-\u0ecd]+")
# Normalisation sorts runs of combining marks in quadratic time; no language has such runs.
_LONG_MARKS = regex.compile(r"(\p{M}{16})\p{M}+")
_HYPHENS = str.maketrans("‐‑‒–−", "-----")
# Soft hyphen, zero-width space, word joiner, byte order mark: web pages leave them inside words. A trademark's
# signs stand behind one, and would become letters of it.
_NO_LETTERS = {**str.maketrans("", "", "\u00ad\u200b\u2060\ufeff"), **str.maketrans("™℠", "  ")}

_HUMP = re.compile(r"[a-z][A-Z]")
# Tries each run of letters once, not from each of its letters: texts may have runs of a megabyte.
_HYPHENATED = re.compile(r"(?<![^\W_])[^\W_]++(?:[-_][^\W_]++)+")
# Letters only: a point beside a digit is a decimal's or a version's. Not `DON'T` and `WOMEN'S`.
_NAME = re.compile(r"(?<![^\W_])[^\W\d_]++(?:(?:[&.]|['’](?=[A-Z][^\W\d_]{2}))[^\W\d_]++)+")
_NAME_SIGN = re.compile(r"[&.'’](?<=[^\W\d_].)(?=[^\W\d_])")
_THOUSANDS = re.compile(r"(?<![^\W_,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])[^\W_]*")
# Not thousands, versions of three numbers or dates. The point becomes a letter, which tantivy keeps in a word.
_DECIMAL = re.compile(
    r"(?<![0-9.,])([0-9]{1,6})(?:\.(?=[0-9]{1,6}(?![0-9]))|,(?=[0-9]{1,2}(?![0-9])))([0-9]++)(?![.,][0-9])"
)
_NEARLY_DECIMAL = re.compile(r"[0-9][.,][0-9]")
_POINT = "\u01c0"
# What stands between the numbers may be a Latin or a Cyrillic x, a sign of multiplication or an asterisk.
_NUMBER = f"[0-9]++(?:[.,{_POINT}][0-9]++)?"
_SIZE = re.compile(rf"(?<!\w){_NUMBER}(?: ?(?:[cm]?m|in|\")?+ ?[xX\u00d7\u0445\u0425*] ?{_NUMBER})++")
_SIZE_NUMBER = re.compile(_NUMBER)
_THOUSANDS_COMMA = re.compile(",(?=[0-9]{3}$)")
_DIGIT_AND_LETTER = re.compile(r"[0-9][^\W\d_]")
_C_FAMILY = re.compile(r"(?<![^\W_])([A-Za-z])(\+\+|#)(?![^\W\d_])")
_CAMEL = re.compile(r"\b(?:[a-z]{2,}[0-9]*(?:[A-Z][A-Za-z0-9]*)|(?:[A-Z]+[a-z0-9]+){3,})\b")
_HUMPS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+")
_LETTERS_OR_DIGITS = re.compile(rf"\d+(?:{_POINT}\d+)?|[^\W\d_{_POINT}]+")
_ACRONYM = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2,3}(?![A-Za-z0-9])")
_LETTER_A = re.compile(rf"(?<![^\W_{_UNSPACED}])[Aa](?![^\W_{_UNSPACED}])")
_DIGIT = re.compile(r"\d")

_MAX_JOINED = 6  # parts of a hyphenated word that are joined; longer chains are dates, paths and UUIDs
_MAX_BEFORE = 20  # letters before a decimal number that are of its word: `usb3.0`
_MAX_NEIGHBOURS = 4  # words of a query that are joined: `wh 1000 xm 4`
_MAX_CODES = 16  # words of a query that are joined or split; the rest of a long query is searched as it is


def title_analyzer() -> tantivy.TextAnalyzer:
    return _analyzer("")


def text_analyzer() -> tantivy.TextAnalyzer:
    return _analyzer(_STOP_WORDS)


class QueryAnalyzer:
    """Turns a query into weighted terms. Nothing in the query is syntax."""

    def __init__(self) -> None:
        self._all = title_analyzer()
        self._content = _analyzer(f"{_STOP_WORDS} {_QUESTION_WORDS}")

    def terms(self, query: str) -> dict[str, float]:
        """Distinct terms with their weights, in the query's order. Empty when it has no letters or digits."""
        # Folding makes up to eighteen characters of one.
        folded = fold(query[:MAX_QUERY_CHARS])[:MAX_QUERY_CHARS]
        # `尺码36，37` are two sizes, which NFKC makes look like `1,5 L`.
        listed = [
            number for decimal in _DECIMAL.finditer(folded) if "," in decimal[0] for number in decimal.groups()
        ]
        folded = _DECIMAL.sub(rf"\1{_POINT}\2", folded)
        words = _with_codes(_separated(folded, singles=False))
        # Only stop words: better searched in the titles than not at all.
        content = self._content.analyze(words) or self._all.analyze(words)
        terms = dict.fromkeys(content, 1.0)
        joined, parts = _spellings(folded, lambda word: bool(self._content.analyze(word)))
        characters = _HAN.findall(folded)
        # `IT support` is no question of what it is; all in capitals says nothing.
        says_nothing = folded.isascii() and folded.isupper()
        names = [] if says_nothing else _ACRONYM.findall(folded)
        names += ["a" for a in _LETTER_A.finditer(folded) if _is_name(a, capital_is_one=not says_nothing)]
        for spelling, weight in (
            (names, 1.0),
            (joined, 1.0),
            (_unstemmed(joined), 1.0),
            ([*parts, *listed], PART_WEIGHT),
            (characters, CHARACTER_WEIGHT),
        ):
            for term in self._all.analyze(" ".join(spelling)):
                terms.setdefault(term, weight)
        return terms


def document_text(text: str) -> str:
    """`text` as it is given to tantivy: the same object for plain ASCII prose, else with words added."""
    if text.isascii():
        return _with_codes(text)
    return _with_codes(_separated(fold(text), singles=True))


def fold(text: str) -> str:
    """NFKC without diacritics. Case stays, because it shows where words of an identifier begin."""
    if text.isascii():
        return text
    plain = _MARKS.sub("", unicodedata.normalize("NFKD", _LONG_MARKS.sub(r"\1", text.translate(_NO_LETTERS))))
    return unicodedata.normalize("NFKC", plain).replace("ß", "ss").replace("ς", "σ").translate(_HYPHENS)


def _analyzer(stop_words: str) -> tantivy.TextAnalyzer:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    builder = builder.filter(tantivy.Filter.remove_long(_MAX_TOKEN_BYTES))
    builder = builder.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold())
    if stop_words:
        builder = builder.filter(tantivy.Filter.custom_stopword(stop_words.split()))
    return builder.filter(tantivy.Filter.stemmer("english")).build()


def _separated(text: str, *, singles: bool) -> str:
    """Runs of unspaced scripts as pairs; `singles` adds each character, which documents need for short queries."""
    if text.isascii():
        return text

    def grams(match: re.Match[str]) -> str:
        run = match[0]
        pairs = [run[i : i + 2] for i in range(len(run) - 1)]
        return f" {' '.join([*run, *pairs] if singles or not pairs else pairs)} "

    return _UNSPACED_RUN.sub(grams, text)


def _with_codes(text: str) -> str:
    """`text` and, after it, the other spellings of its hyphenated words, numbers and identifiers.

    The expressions run on single words that may match: over whole texts they cost more than all of tantivy's work.
    """
    added: list[str] = []
    if _HUMP.search(text):
        for word in text.split():
            if _HUMP.search(word):
                for camel in _CAMEL.findall(word):
                    added += _HUMPS.findall(camel)
    if "-" in text or "_" in text or "," in text:
        for word in text.split():
            if "-" in word or "_" in word:
                for hyphenated in _HYPHENATED.findall(word):
                    added += _joined(hyphenated.replace("_", "-").split("-"))
            if "," in word[:-1]:
                added += [number.replace(",", "") for number in _THOUSANDS.findall(word)]
    if _NAME_SIGN.search(text):
        for word in text.split():
            for name in _NAME.findall(word):
                added += _joined(_WORD.findall(name))
    if _DIGIT.search(text):
        added += _numbers(text)
    if "+" in text or "#" in text:
        text = _C_FAMILY.sub(lambda c: c[1] + ("sharp " if c[2] == "#" else "plusplus "), text)
    if _DIGIT_AND_LETTER.search(text):
        codes = " ".join(filter(_DIGIT_AND_LETTER.search, [*text.split(), *added]))
        added += _unstemmed(_WORD.findall(codes))
    return f"{text} {' '.join(added)}" if added else text


def _numbers(text: str) -> list[str]:
    """The decimals and sizes of `text`, as one word each."""
    added: list[str] = []
    if _NEARLY_DECIMAL.search(text):
        for decimal in _DECIMAL.finditer(text):
            number, unit = f"{decimal[1]}{_POINT}{decimal[2]}", _WORD.match(text, decimal.end())
            start = decimal.start()
            while start and text[start - 1].isalpha() and decimal.start() - start < _MAX_BEFORE:
                start -= 1
            added.append(number)
            if unit or start < decimal.start():
                added.append(f"{text[start : decimal.start()]}{number}{unit[0] if unit else ''}")
    for size in _SIZE.finditer(text):
        numbers = (_THOUSANDS_COMMA.sub("", number) for number in _SIZE_NUMBER.findall(size[0]))
        word = "x".join(re.sub("[.,]", _POINT, number) for number in numbers)
        if word != size[0].lower() or _WORD.match(text, size.end()):
            added.append(word)
    return added


def _unstemmed(words: Iterable[str]) -> list[str]:
    """The codes among `words` that stemming would make another's (`EA1002S`: `EA1002`), with an end that keeps it
    away."""
    return [
        f"{word}{_POINT}"
        for word in words
        if _DIGIT_AND_LETTER.search(word) and _stemmer().analyze(word) != [word.lower()]
    ]


@functools.cache
def _stemmer() -> tantivy.TextAnalyzer:
    return title_analyzer()


def _joined(parts: list[str]) -> Iterator[str]:
    """All parts of a hyphenated word as one; for codes also their beginnings (`WH-1000XM4-B`: `WH1000XM4`)."""
    for n in range(2, min(len(parts), _MAX_JOINED) + 1):
        word = "".join(parts[:n])
        if n == len(parts) or _DIGIT.search(word):
            yield word


def _is_name(a: re.Match[str], *, capital_is_one: bool) -> bool:
    """Whether the `a` of a query is no article: `A字裙`, `vitamin a`, `Class A amplifier`."""
    before, after = a.string[: a.start()].rstrip(), a.string[a.end() :].lstrip()
    if _UNSPACED_RUN.match(before[-1:]) or _UNSPACED_RUN.match(after):
        return True
    is_first, is_last = not _WORD.search(before), not _WORD.search(after)
    return not is_first and (is_last or (a[0] == "A" and capital_is_one))


def _spellings(folded: str, is_content: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Other spellings of a query's codes: neighbours as one word, and the parts of words of letters and digits."""
    runs = [_WORD.findall(run) for run in _UNSPACED_RUN.split(folded)]
    joined: list[str] = []
    pairs: list[str] = []
    codes: list[str] = []
    for words in runs:
        for i, word in enumerate(words):
            if len(joined) + len(codes) >= _MAX_CODES:
                break
            codes += [word] if _is_mixed(word) else []
            for n in range(2, min(_MAX_NEIGHBOURS, len(words) - i) + 1):
                neighbours = words[i : i + n]
                if _may_be_one_word(neighbours, is_content):
                    joined.append("".join(neighbours))
                    pairs += joined[-1:] if n == 2 and _is_mixed(joined[-1]) else []
    return joined, list(_parts([*codes, *pairs]))


def _may_be_one_word(neighbours: list[str], is_content: Callable[[str], bool]) -> bool:
    """`wh 1000xm4` and `t shirt` may be; `noise cancelling` would only distort the scores."""
    if any(len(word) > 20 for word in neighbours) or not all(map(is_content, neighbours)):
        return False
    has_digit = any(_DIGIT.search(word) for word in neighbours)
    return has_digit or (len(neighbours) == 2 and min(map(len, neighbours)) <= 2)


def _is_mixed(word: str) -> bool:
    return 1 < len(_LETTERS_OR_DIGITS.findall(word)) <= _MAX_JOINED


def _parts(words: Iterable[str]) -> Iterator[str]:
    """Every beginning, middle and end of a word, cut where letters meet digits: `wh1000`, `xm4`, …

    Single characters are left out, and so are bare numbers from the middle of a longer code: they find batteries
    (`1000 mAh`, `4 pack`) rather than headphones (`wh1000xm4`).
    """
    for word in words:
        pieces = _LETTERS_OR_DIGITS.findall(word)
        for i in range(len(pieces)):
            for j in range(i + 1, len(pieces) + 1):
                part = "".join(pieces[i:j])
                is_bare_number = len(pieces) > 2 and part.isdigit()
                if j - i < len(pieces) and len(part) > 1 and not is_bare_number:
                    yield part
        for piece in pieces:
            # `bluetooth 5.3` also finds `bluetooth 5`.
            if _POINT in piece:
                yield piece.partition(_POINT)[0]
