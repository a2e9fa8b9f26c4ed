"""What a model reads: token ids for each document of a call, built from pieces that are encoded once.

One class for each kind of model; all have `build(request) -> Prompts`, and `max_model_len`, which may be set when
the engine has said it. Only document tokens are ever cut.
Text from a request is encoded by a `plain` tokenizer, so it holds no control tokens, whatever it says. Where the
tokenizer parts text into words, only a beginning of a long document is encoded: as much as the model may read.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import takewhile

from tokenizers import Encoding, Tokenizer

from serve_app.config import YesNoPrompt
from serve_app.reranker.messages import PromptTooLongError, ScoreRequest
from serve_app.reranker.tokens import Template, encode_batch, pair_template, plain, text_template, unbounded

# Beginnings of documents, by which a tokenizer is judged.
_CUT_SAMPLES = ["Paris", " two  spaces", "\nnew line", "2 + 2", "中文", "é", "\u0301", "🙂", "'s", ":) ", "\t", ""]

# Of the first beginning that is tried; ordinary text has two to six.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """`second_from` is the position of the first token of type 1, for models that have token types."""

    ids: list[int]
    second_from: int | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """`prompts` in the order of the documents; bi-encoders have the query before them. `truncated` counts
    the documents that lost tokens."""

    prompts: list[Prompt]
    truncated: int


class YesNoPrompts:
    """Prompts of causal yes/no rerankers: the published example's token ids, but for cuts and control tokens.

    `<prefix><Instruct>: {instruction}\\n<Query>: {query}\\n<Document>: {document}<suffix>`, where the middle part
    is encoded as plain text. The document is encoded with the space before it: a cut there gives the tokens
    of the whole, a cut after the space does not. Tokenizers that join over the cut get the whole each time.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: YesNoPrompt, instruction: str, max_model_len: int) -> None:
        for name in ("yes", "no"):
            if tokenizer.token_to_id(getattr(prompt, name)) is None:
                raise ValueError(
                    f"prompt.{name} is {getattr(prompt, name)!r}, which is no single token of the model"
                )
        for name in ("prefix", "suffix"):
            for control in re.findall(r"<\|\w+\|>", getattr(prompt, name)):
                if tokenizer.token_to_id(control) is None:
                    raise ValueError(
                        f"prompt.{name} holds {control}, which is no token of the model; "
                        "set `prompt` to what the model was trained with"
                    )
        self._plain = plain(tokenizer)
        self._prefix, self._suffix = encode_batch(unbounded(tokenizer), [prompt.prefix, prompt.suffix])
        self._instruction = instruction
        self.max_model_len = max_model_len
        self._cuts = self._can_cut()

    def build(self, request: ScoreRequest) -> Prompts:
        """Raises PromptTooLongError if instruction and query leave no room for a document."""
        instruction = self._instruction if request.instruction is None else request.instruction
        head = f"<Instruct>: {instruction}\n<Query>: {request.query}\n<Document>:"
        head_ids = encode_batch(self._plain, [head])[0]
        middle_limit = self.max_model_len - len(self._prefix) - len(self._suffix)
        room = _room(middle_limit - len(head_ids), self.max_model_len, "instruction, query and template")
        limit = min(room, request.max_tokens_per_doc or room)
        if self._cuts:
            before = self._prefix + head_ids
            texts = [f" {d}" for d in request.documents]
        else:
            before = self._prefix
            texts = [f"{head} {d}" for d in request.documents]
            limit += len(head_ids)
        encoded = _encode_beginnings(self._plain, texts, limit)
        prompts = [Prompt(before + ids[:limit] + self._suffix) for ids in encoded]
        return Prompts(prompts, sum(len(ids) > limit for ids in encoded))

    def _can_cut(self) -> bool:
        """Whether no token ever reaches over the cut: the pre-tokenizer parts the text there, and samples of all
        kinds of characters get the ids of the whole."""
        head = "<Instruct>: i\n<Query>: q\n<Document>:"
        wholes = [f"{head} {d}" for d in _CUT_SAMPLES]
        splitter = self._plain.pre_tokenizer
        if splitter is None:
            return False
        for whole in wholes:
            if any(start < len(head) < end for _, (start, end) in splitter.pre_tokenize_str(whole)):
                return False
        head_ids = encode_batch(self._plain, [head])[0]
        parts = encode_batch(self._plain, [f" {d}" for d in _CUT_SAMPLES])
        return encode_batch(self._plain, wholes) == [head_ids + part for part in parts]


class PairPrompts:
    """Prompts of cross-encoders: query and document in the template of the model's own tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, token_types: bool) -> None:
        self._template = pair_template(tokenizer)
        self._typed = token_types and self._template.typed
        self._plain = plain(tokenizer)
        self.max_model_len = max_model_len

    def build(self, request: ScoreRequest) -> Prompts:
        """Raises PromptTooLongError if the query leaves no room for a document."""
        query = encode_batch(self._plain, [request.query])[0]
        template = self._template
        room = _room(self.max_model_len - len(template) - len(query), self.max_model_len, "query and template")
        limit = min(room, request.max_tokens_per_doc or room)
        documents = _encode_beginnings(self._plain, request.documents, limit)
        head = template.before + query + template.between
        second_from = len(head) if self._typed else None
        prompts = [Prompt(head + ids[:limit] + template.after, second_from) for ids in documents]
        return Prompts(prompts, sum(len(ids) > limit for ids in documents))


class TextPrompts:
    """Prompts of bi-encoders: the query, then each document, each by itself."""

    def __init__(
        self, tokenizer: Tokenizer, max_model_len: int, query_prefix: str = "", document_prefix: str = ""
    ) -> None:
        self._template = text_template(tokenizer)
        self._plain = plain(tokenizer)
        self._query_prefix = query_prefix
        self._document_prefix = document_prefix
        alone, before_a_word = encode_batch(self._plain, [document_prefix, f"{document_prefix}a"])
        # Of a prefix that ends in a space, that space is part of the document's first token.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(alone, before_a_word, strict=False))
        self._prefix_tokens = len(list(same))
        self.max_model_len = max_model_len

    def build(self, request: ScoreRequest) -> Prompts:
        """Raises PromptTooLongError if the query doesn't fit."""
        query = encode_batch(self._plain, [self._query_prefix + request.query])[0]
        room = self.max_model_len - len(self._template)
        if len(query) > room:
            raise PromptTooLongError(
                f"query and template take {len(self._template) + len(query)} of the model's {self.max_model_len} "
                "tokens (max_model_len)"
            )
        limit = min(room, self._prefix_tokens + (request.max_tokens_per_doc or room))
        documents = _encode_beginnings(self._plain, [self._document_prefix + d for d in request.documents], limit)
        prompts = [_around(self._template, ids) for ids in [query, *(ids[:limit] for ids in documents)]]
        return Prompts(prompts, sum(len(ids) > limit for ids in documents))


def _encode_beginnings(tokenizer: Tokenizer, texts: list[str], limit: int) -> list[list[int]]:
    """The token ids of each text, or of a beginning with more than `limit` tokens that are the whole's too."""
    found: dict[int, list[int]] = {}
    # Where words don't end, as in Chinese for a tokenizer that parts at whitespace, no beginning will do.
    wholes: set[int] = set()
    characters = _CHARACTERS_PER_TOKEN * (limit + 1)
    while longer := [i for i, text in enumerate(texts) if len(text) > characters and i not in {*found, *wholes}]:
        beginnings = [_beginning(texts[i], characters) for i in longer]
        for i, encoding in zip(longer, tokenizer.encode_batch(beginnings, add_special_tokens=False), strict=True):
            ids = _settled(encoding)
            if len(ids) > limit:
                found[i] = ids
            elif len(encoding.ids) > limit:
                wholes.add(i)
        characters *= 8
    whole = [i for i in range(len(texts)) if i not in found]
    found.update(zip(whole, encode_batch(tokenizer, [texts[i] for i in whole]), strict=True))
    return [found[i] for i in range(len(texts))]


def _beginning(text: str, characters: int) -> str:
    """At most so many characters, cut before whitespace unless the text is written without."""
    beginning = text[:characters]
    before, *last = beginning.rsplit(maxsplit=1) or [""]
    return before if last and len(before) > characters // 2 else beginning


def _settled(encoding: Encoding) -> list[int]:
    """The ids that what follows can't change. Tokenizers part a text into words, and encode each by itself; the
    word at the cut may go on, and take with it the one before (`don` and `'` of `don't`)."""
    words = [word for word in encoding.word_ids if word is not None]
    ids: list[int] = encoding.ids
    return ids[: bisect_left(words, words[-1] - 1)] if words else []


def _around(template: Template, ids: list[int]) -> Prompt:
    return Prompt(template.before + ids + template.after)


def _room(tokens: int, max_model_len: int, what: str) -> int:
    if tokens < 1:
        raise PromptTooLongError(
            f"{what} take {max_model_len - tokens} of the model's {max_model_len} tokens (max_model_len) "
            "and leave no room for a document"
        )
    return tokens
