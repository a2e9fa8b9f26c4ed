"""Tokenizers that read outside text as text, and the control tokens that a model puts around it."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serve_app.config import RerankerArgs
from serve_app.reranker.model import Model, is_pointer, read_json

# Of any model: transformers turns to these where those of the model's own kind are missing.
_COMMON_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json")
_READ_AS_JSON = ("config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def load_tokenizer(args: RerankerArgs, model: Model) -> Any:
    """The model's tokenizer as transformers has it, with a Rust form as `backend_tokenizer`.

    Raises ValueError for a folder without its files, with damaged ones, or with one that has no Rust form. Without
    files transformers makes up a tokenizer of five tokens, to which every word is unknown.
    """
    from transformers import AutoTokenizer

    trusted = bool(args.engine.get("trust_remote_code", False))
    try:
        loaded = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=trusted)
    except Exception as error:
        for pattern in _READ_AS_JSON:
            for path in sorted(model.folder.glob(pattern)):
                read_json(args.model, path)
        for path in sorted(model.folder.glob("*.*")):
            if path.suffix in (".txt", ".model"):
                _refuse_pointer(args.model, path)
        said = " ".join(str(error).split())
        raise ValueError(
            f"model is {args.model!r}, but the tokenizer in {model.folder} can't be read: "
            f"{type(error).__name__}: {said}"
        ) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ValueError(
            f"model is {args.model!r}, whose tokenizer has no tokenizers (Rust) form; only those work here"
        )
    names = sorted({*_COMMON_FILES, *loaded.vocab_files_names.values()})
    # The last: as `tokenizer.4.0.0.json`, for a later transformers.
    found = [path for name in [*names, "tokenizer.*.json"] for path in model.folder.glob(name)]
    if not found:
        raise ValueError(
            f"model is {args.model!r}, but {model.folder} has no tokenizer: none of {', '.join(names)} is there"
        )
    # Where that is there nothing else is read.
    if not any(path.match("tokenizer*.json") for path in found):
        for path in found:
            _refuse_pointer(args.model, path)
    return loaded


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of `tokenizer` to which the added tokens' names mean nothing: `<|im_end|>` is encoded as seven
    or so pieces of text, and everything else as before. It adds no control tokens by itself either.

    Every added token gets a random name, here and in the model's vocabulary, so ids stay what they are and
    no text can spell one. Added tokens of whitespace only (runs of spaces or newlines) are text already.
    """
    spec = json.loads(tokenizer.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    renamed = {
        token["content"]: f"\n{secrets.token_hex(16)} {token['id']}"
        for token in spec["added_tokens"]
        if token["content"].strip()
    }
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    _rename_pieces(spec["model"], renamed)
    copy = Tokenizer.from_str(json.dumps(spec))
    for content, name in renamed.items():
        control = tokenizer.token_to_id(content)
        if copy.token_to_id(name) != control:
            raise ValueError(
                f"added token {content!r} changed its id from {control}; this vocabulary isn't supported"
            )
    return copy


def unbounded(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither pads nor cuts: many published tokenizers are saved with their training's settings."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


@dataclass(frozen=True, slots=True)
class Template:
    """The control tokens of a sequence: before the first text, between the two, after the last.

    `typed` says that the second text and what follows it have token type 1.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    typed: bool = False

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def text_template(tokenizer: Tokenizer) -> Template:
    """What `tokenizer` puts around one text, read off an example."""
    example = unbounded(tokenizer).encode("a")
    owners = example.sequence_ids
    first, last = owners.index(0), len(owners) - 1 - owners[::-1].index(0)
    return Template(example.ids[:first], [], example.ids[last + 1 :])


def pair_template(tokenizer: Tokenizer) -> Template:
    """What `tokenizer` puts around a pair, read off an example.

    Raises ValueError where it puts nothing between the texts, as tokenizers of decoder models do.
    """
    example = unbounded(tokenizer).encode("a", "b")
    ids, owners, types = example.ids, example.sequence_ids, example.type_ids
    query = [i for i, owner in enumerate(owners) if owner == 0]
    document = [i for i, owner in enumerate(owners) if owner == 1]
    between = ids[query[-1] + 1 : document[0]]
    if document[0] < query[-1] or not between:
        raise ValueError(
            "the model's tokenizer has no template for pairs, so it is no cross-encoder of BERT's kind; "
            "Qwen3-Reranker's kind is qwen3-reranker"
        )
    expected = [0] * document[0] + [1] * (len(ids) - document[0])
    if any(types) and types != expected:
        raise ValueError(
            f"the model's tokenizer gives a pair the token types {types}; only {expected} is supported"
        )
    return Template(ids[: query[0]], between, ids[document[-1] + 1 :], typed=any(types))


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _refuse_pointer(name: str, path: Path) -> None:
    if is_pointer(path):
        raise ValueError(f"model is {name!r}, but {path} is a git-lfs pointer, not the file: git lfs pull")


def _rename_pieces(model: dict[str, Any], renamed: dict[str, str]) -> None:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocab.items()}
        if (unknown := model.get("unk_token")) in renamed:
            model["unk_token"] = renamed[unknown]
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        # A merge that makes a control token out of text, or goes on from one, has lost its meaning.
        model["merges"] = [
            merge
            for merge in model["merges"]
            if renamed.keys().isdisjoint(_parts(merge)) and "".join(_parts(merge)) not in renamed
        ]


def _parts(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
