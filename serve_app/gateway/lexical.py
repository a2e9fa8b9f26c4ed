"""BM25 over the documents of one call: the order that a plain rerank call falls back to.

It works in memory on what the caller sent, unlike recall, which searches an index.
"""

import math
import unicodedata
from collections import Counter

import regex

_K1, _B = 1.2, 0.75
# Characters read over all documents together, so that the deadline's reserve will do: 0.03 s for English, 0.2 s
# for Chinese.
_MAX_CHARS = 200_000
# Unicode normalisation sorts runs of combining marks in quadratic time; no language has such runs.
_MARKS = regex.compile(r"(\p{M}{16})\p{M}+")
# Normalisation would make letters of the word before of them.
_TRADEMARKS = str.maketrans("™℠", "  ")

# A run of letters and digits is a word, each CJK character stands alone (bigrams are added below).
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
_TOKEN = regex.compile(rf"[{_CJK}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{_CJK}]]+", regex.V1)


def tokens(text: str, max_chars: int = _MAX_CHARS) -> list[str]:
    """Words in lower case; CJK text as characters and pairs of neighbours, since it has no spaces."""
    text = _MARKS.sub(r"\1", text[:max_chars].translate(_TRADEMARKS))
    found: list[str] = []
    previous_end = -1
    previous = ""
    for match in _TOKEN.finditer(unicodedata.normalize("NFKC", text)[:max_chars].casefold()):
        token = match.group()
        single = len(token) == 1 and ord(token) > 0x2E7F
        if single and previous and match.start() == previous_end:
            found.append(previous + token)
        found.append(token)
        previous, previous_end = (token, match.end()) if single else ("", -1)
    return found


def bm25(query: str, documents: list[str]) -> list[float]:
    """A BM25 score for each document, k1 = 1.2 and b = 0.75, with Lucene's non-negative idf
    log(1 + (N - n + 0.5) / (n + 0.5)) (Robertson and Zaragoza 2009; Lucene's BM25Similarity)."""
    wanted = set(tokens(query))
    chars_each = _MAX_CHARS // max(1, len(documents))
    counts: list[Counter[str]] = []
    lengths: list[int] = []
    for document in documents:
        words = tokens(document, chars_each)
        lengths.append(len(words))
        counts.append(Counter(word for word in words if word in wanted))
    mean_length = sum(lengths) / len(lengths) if any(lengths) else 1.0
    found_in = Counter(term for count in counts for term in count)
    idf = {term: math.log(1 + (len(documents) - n + 0.5) / (n + 0.5)) for term, n in found_in.items()}
    return [
        sum(
            idf[term] * tf * (_K1 + 1) / (tf + _K1 * (1 - _B + _B * length / mean_length))
            for term, tf in count.items()
        )
        for count, length in zip(counts, lengths, strict=True)
    ]
