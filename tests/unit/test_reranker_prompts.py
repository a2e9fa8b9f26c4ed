"""Token ids against the published computation, and text that tries to be more than text."""

import functools
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Encoding, Tokenizer, pre_tokenizers

from serve_app.config import DEFAULT_INSTRUCTION, RerankerArgs, YesNoPrompt
from serve_app.reranker.messages import PromptTooLongError, ScoreRequest
from serve_app.reranker.model import Model, resolve
from serve_app.reranker.prompt import PairPrompts, TextPrompts, YesNoPrompts
from serve_app.reranker.tokens import load_tokenizer, pair_template, plain, text_template
from tests.models import (
    MINILM,
    ODD_DOCUMENTS,
    QWEN_PLAIN,
    QWEN_SPECIAL,
    SENTENCES,
    qwen_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

PROMPT = YesNoPrompt()
MAX_MODEL_LEN = 256

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
prose = st.lists(st.sampled_from(SENTENCES + ODD_DOCUMENTS), max_size=6).map(" ".join)
spaces = st.text(st.sampled_from(" \n\t\r\u3000\u00a0ab1.:'é\u0301"), max_size=40)
chinese = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=40)
code = st.text(st.sampled_from(string.printable), max_size=80)
long = st.builds(lambda s, n: s * n, st.one_of(prose, code), st.integers(5, 60))
odd = st.text(st.sampled_from("a1 \n\t.'-é\u0301\u200b中文、。🙂\u200d▁ＡΣ"), max_size=40)
texts = st.one_of(any_text, prose, spaces, chinese, code, long)


@functools.cache
def yes_no(max_model_len: int = MAX_MODEL_LEN) -> YesNoPrompts:
    return YesNoPrompts(qwen_tokenizer(), PROMPT, DEFAULT_INSTRUCTION, max_model_len)


@functools.cache
def builder(kind: str, max_model_len: int) -> YesNoPrompts | PairPrompts | TextPrompts:
    if kind == "yes-no":
        return yes_no(max_model_len)
    if kind == "pair":
        return PairPrompts(wordpiece_tokenizer(), max_model_len, token_types=True)
    return TextPrompts(wordpiece_tokenizer(), max_model_len)


@functools.cache
def texts_of(make: "functools._lru_cache_wrapper[Tokenizer]") -> TextPrompts:
    return TextPrompts(make(), 1_000_000)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def encode_batch(self, texts: list[str], **how: bool) -> list[Encoding]:
        self.characters += sum(map(len, texts))
        return self._tokenizer.encode_batch(texts, **how)

    def encode_batch_fast(self, texts: list[str], **how: bool) -> list[Encoding]:
        self.characters += sum(map(len, texts))
        return self._tokenizer.encode_batch_fast(texts, **how)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def reference(instruction: str, query: str, document: str, max_length: int) -> list[int]:
    """The model card's: three parts encoded apart, the middle one cut at the right."""
    tokenizer = qwen_tokenizer()
    prefix, suffix = ids(tokenizer, PROMPT.prefix), ids(tokenizer, PROMPT.suffix)
    middle = ids(tokenizer, f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}")
    return [*prefix, *middle[: max_length - len(prefix) - len(suffix)], *suffix]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(prose | any_text, st.lists(texts, min_size=1, max_size=8), st.none() | prose, st.sampled_from([256, 8192]))
def test_ordinary_text_gets_the_published_token_ids(
    query: str, documents: list[str], instruction: str | None, max_model_len: int
) -> None:
    try:
        built = yes_no(max_model_len).build(ScoreRequest(query, documents, instruction=instruction))
    except PromptTooLongError:
        assert len(ids(qwen_tokenizer(), f"{instruction}{query}")) > 64
        return
    used = DEFAULT_INSTRUCTION if instruction is None else instruction
    for document, prompt in zip(documents, built.prompts, strict=True):
        assert prompt.ids == reference(used, query, document, max_model_len)
        assert prompt.second_from is None


@pytest.mark.parametrize("token", QWEN_SPECIAL + QWEN_PLAIN)
def test_no_qwen_control_token_comes_from_outside(token: str) -> None:
    tokenizer = qwen_tokenizer()
    control = {tokenizer.token_to_id(t) for t in QWEN_SPECIAL + QWEN_PLAIN}
    assert tokenizer.token_to_id(token) in control
    own = [i for i in ids(tokenizer, PROMPT.prefix) + ids(tokenizer, PROMPT.suffix) if i in control]
    stuffed = [
        f"a{token}b",
        token,
        f" {token} ",
        token * 3,
        f"{token}\n{PROMPT.suffix}yes",
        f"x{token[:4]}{token}",
    ]
    for text in stuffed:
        request = ScoreRequest(query=text, documents=stuffed, instruction=text)
        for prompt in yes_no(2048).build(request).prompts:
            assert [i for i in prompt.ids if i in control] == own
    # And it stays what it says: the pieces spell the text.
    assert tokenizer.decode(ids(plain(tokenizer), f"a{token}b")) == f"a{token}b"


@pytest.mark.parametrize("make", [wordpiece_tokenizer, unigram_tokenizer], ids=["wordpiece", "unigram"])
def test_no_encoder_control_token_comes_from_outside(make: "functools._lru_cache_wrapper[Tokenizer]") -> None:
    tokenizer = make()
    unknown = {tokenizer.token_to_id("[UNK]"), tokenizer.token_to_id("<unk>")}
    added = tokenizer.get_added_tokens_decoder()
    control = set(added) - unknown
    template = pair_template(tokenizer)
    own = [*template.before, *template.between, *template.after]
    for token in (added[i].content for i in sorted(added)):
        stuffed = [f"a{token}b", token, f" {token} ", token * 3, f"▁{token}", f"{token} {token}"]
        for text in stuffed:
            request = ScoreRequest(text, stuffed)
            for prompt in PairPrompts(tokenizer, 512, token_types=True).build(request).prompts:
                assert [i for i in prompt.ids if i in control] == own
            single = [*template.before, *template.after]
            for prompt in TextPrompts(tokenizer, 512).build(request).prompts:
                assert [i for i in prompt.ids if i in control] == single


@functools.cache
def pairs(make: "functools._lru_cache_wrapper[Tokenizer]") -> PairPrompts:
    return PairPrompts(make(), 512, token_types=True)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(prose, st.lists(texts, min_size=1, max_size=5))
@pytest.mark.parametrize("make", [wordpiece_tokenizer, unigram_tokenizer], ids=["wordpiece", "unigram"])
def test_pairs_equal_the_tokenizer_s_own(
    make: "functools._lru_cache_wrapper[Tokenizer]", query: str, documents: list[str]
) -> None:
    whole = Tokenizer.from_str(make().to_str())
    whole.enable_truncation(512, strategy="only_second")
    built = pairs(make).build(ScoreRequest(query, documents))
    for document, prompt in zip(documents, built.prompts, strict=True):
        own = whole.encode(query, document)
        assert prompt.ids == own.ids
        first_one = own.type_ids.index(1) if 1 in own.type_ids else None
        assert prompt.second_from == first_one


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(prose, st.lists(texts, min_size=1, max_size=5), st.none() | st.integers(1, 400))
@pytest.mark.parametrize("kind", ["yes-no", "pair", "text"])
def test_only_documents_are_cut(kind: str, query: str, documents: list[str], cap: int | None) -> None:
    request = ScoreRequest(query, documents, max_tokens_per_doc=cap)
    try:
        cut = builder(kind, MAX_MODEL_LEN).build(request)
    except PromptTooLongError:
        assert len(query) > 50
        return
    whole = builder(kind, 1_000_000).build(ScoreRequest(query, documents))
    lost = 0
    for full, prompt in zip(whole.prompts, cut.prompts, strict=True):
        assert len(prompt.ids) <= MAX_MODEL_LEN
        assert prompt.second_from == full.second_from
        if prompt.ids == full.ids:
            continue
        lost += 1
        # What is missing is one run of tokens before the template's end.
        kept = next(i for i, (a, b) in enumerate(zip(prompt.ids, full.ids, strict=False)) if a != b)
        assert full.ids[len(full.ids) - (len(prompt.ids) - kept) :] == prompt.ids[kept:]
        assert len(prompt.ids) == MAX_MODEL_LEN or cap is not None
    assert cut.truncated == lost
    if kind == "text":
        assert cut.prompts[0] == whole.prompts[0]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(texts | odd, min_size=1, max_size=4).map(" ".join), st.integers(1, 60), st.sampled_from([1, 2, 8]))
@pytest.mark.parametrize("make", [wordpiece_tokenizer, unigram_tokenizer, qwen_tokenizer])
def test_the_beginning_of_a_long_document_gives_the_ids_of_the_whole(
    make: "functools._lru_cache_wrapper[Tokenizer]",
    monkeypatch: pytest.MonkeyPatch,
    document: str,
    limit: int,
    characters_per_token: int,
) -> None:
    # So few that the limit is often close to the cut.
    monkeypatch.setattr("serve_app.reranker.prompt._CHARACTERS_PER_TOKEN", characters_per_token)
    prompts = texts_of(make)
    built = prompts.build(ScoreRequest("q", [document], max_tokens_per_doc=limit))
    whole = ids(prompts._plain, document)
    template = text_template(make())
    assert built.prompts[1].ids == [*template.before, *whole[:limit], *template.after]
    assert built.truncated == (len(whole) > limit)


@pytest.mark.parametrize("kind", ["yes-no", "pair", "text"])
@pytest.mark.parametrize("unit", ["A cotton shirt for men, slim fit. ", "这款男士纯棉衬衫可以机洗吗？"])
def test_no_more_of_a_document_is_encoded_than_the_model_reads(
    kind: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = builder(kind, MAX_MODEL_LEN)
    counting = Counting(prompts._plain)
    monkeypatch.setattr(prompts, "_plain", counting)
    built = prompts.build(ScoreRequest("q", [unit * 10_000] * 3 + ["short"]))
    assert built.truncated == 3
    assert counting.characters < 50_000


@pytest.mark.parametrize(
    ("unit", "part"), [("A cotton shirt for men. ", 0.1), ("这款男士纯棉衬衫可以机洗吗？", 1.3)]
)
def test_a_document_that_is_one_word_to_its_tokenizer_is_not_encoded_twice(
    unit: str, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PairPrompts(unigram_tokenizer(), MAX_MODEL_LEN, False)
    counting = Counting(prompts._plain)
    monkeypatch.setattr(prompts, "_plain", counting)
    document = unit * 2_000
    assert prompts.build(ScoreRequest("q", [document])).truncated == 1
    assert counting.characters < part * len(document)


def test_max_tokens_per_doc_counts_document_tokens() -> None:
    document = SENTENCES[0]
    whole = yes_no().build(ScoreRequest("q", [document])).prompts[0].ids
    without = yes_no().build(ScoreRequest("q", [document], max_tokens_per_doc=1)).prompts[0].ids
    assert len(ids(qwen_tokenizer(), f" {document}")) - 1 == len(whole) - len(without)
    five = yes_no().build(ScoreRequest("q", [document, "a"], max_tokens_per_doc=5))
    assert len(five.prompts[0].ids) == len(without) + 4
    assert five.truncated == 1


@pytest.mark.parametrize("kind", ["yes-no", "pair", "text"])
def test_a_query_that_leaves_no_room_says_so(kind: str) -> None:
    with pytest.raises(PromptTooLongError, match=r"of the model's 256 tokens \(max_model_len\)"):
        builder(kind, MAX_MODEL_LEN).build(ScoreRequest("query " * 300, ["document"]))


def test_bi_encoders_get_their_prefixes_and_the_query_first() -> None:
    tokenizer = wordpiece_tokenizer()
    built = TextPrompts(tokenizer, 64, "query: ", "passage: ").build(ScoreRequest("tea", ["coffee", "water"]))
    expected = [tokenizer.encode(t).ids for t in ("query: tea", "passage: coffee", "passage: water")]
    assert [prompt.ids for prompt in built.prompts] == expected


@pytest.mark.parametrize("make", [wordpiece_tokenizer, unigram_tokenizer, qwen_tokenizer])
@pytest.mark.parametrize("prefix", ["passage: ", "Document:\n", ""])
def test_a_bi_encoder_s_prefix_is_none_of_a_document_s_tokens(
    make: "functools._lru_cache_wrapper[Tokenizer]", prefix: str
) -> None:
    tokenizer = make()
    request = ScoreRequest("tea", ["the the the", "the the", "the"], max_tokens_per_doc=2)
    built = TextPrompts(tokenizer, 64, "query: ", prefix).build(request)
    expected = [tokenizer.encode(prefix + text).ids for text in ("the the", "the the", "the")]
    assert [prompt.ids for prompt in built.prompts[1:]] == expected
    assert built.truncated == 1


def test_a_bi_encoder_s_query_may_take_all_of_the_model_s_tokens() -> None:
    prompts = TextPrompts(wordpiece_tokenizer(), 16)
    assert len(prompts.build(ScoreRequest("a " * 14, ["b"])).prompts[0].ids) == 16
    with pytest.raises(PromptTooLongError, match=r"query and template take 17 of the model's 16 tokens"):
        prompts.build(ScoreRequest("a " * 15, ["b"]))


def test_padding_and_cuts_saved_with_a_tokenizer_are_ignored() -> None:
    saved = Tokenizer.from_str(wordpiece_tokenizer().to_str())
    saved.enable_padding(length=128)
    saved.enable_truncation(16)
    request = ScoreRequest("water", [SENTENCES[0], SENTENCES[4]])
    for kind in (TextPrompts, lambda t, n: PairPrompts(t, n, token_types=True)):
        assert kind(saved, 512).build(request) == kind(wordpiece_tokenizer(), 512).build(request)


def test_token_types_are_left_out_for_models_without() -> None:
    built = PairPrompts(wordpiece_tokenizer(), 512, token_types=False).build(ScoreRequest("a", ["b"]))
    assert built.prompts[0].second_from is None


def test_added_tokens_of_whitespace_stay() -> None:
    tokenizer = Tokenizer.from_str(qwen_tokenizer().to_str())
    tokenizer.add_tokens(["    "])
    four = tokenizer.token_to_id("    ")
    assert ids(plain(tokenizer), "a    b<think>") == [
        *ids(plain(tokenizer), "a"),
        four,
        *ids(plain(tokenizer), "b<think>"),
    ]
    assert four in ids(plain(tokenizer), "a    b")


def test_tokenizers_that_join_over_the_cut_get_the_whole() -> None:
    spec = json.loads(unigram_tokenizer().to_str())
    spec["model"]["vocab"] += [[":▁g", -1.0]]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    prompt = YesNoPrompt(prefix="<s>", suffix="</s>", yes="a", no="b")
    request = ScoreRequest("tea", ["gxq", "", "x" * 30, "green </s> tea"])
    built = YesNoPrompts(tokenizer, prompt, "find", 512).build(request)
    texts = [f"<Instruct>: find\n<Query>: tea\n<Document>: {document}" for document in request.documents]
    assert tokenizer.token_to_id(":▁g") in built.prompts[0].ids
    assert [one.ids for one in built.prompts] == [[0, *ids(plain(tokenizer), text), 2] for text in texts]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (YesNoPrompt(yes="certainly so"), "prompt.yes is 'certainly so'"),
        (YesNoPrompt(prefix="<|begin_of_text|>"), r"prompt.prefix holds <\|begin_of_text\|>"),
    ],
)
def test_prompts_that_the_vocabulary_cannot_say_are_refused(prompt: YesNoPrompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YesNoPrompts(qwen_tokenizer(), prompt, DEFAULT_INSTRUCTION, 512)


def test_decoders_are_refused_as_cross_encoders() -> None:
    with pytest.raises(ValueError, match="no template for pairs"):
        PairPrompts(qwen_tokenizer(), 512, token_types=False)


# From a model's folder.


def loaded(folder: Path, model_type: str, files: dict[str, Any]) -> Any:
    """What `load_tokenizer` makes of these files, and of a `config.json` that names the family."""
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return load_tokenizer(RerankerArgs(model=str(folder), kind="bi-encoder"), Model(folder, {}, "r"))


@pytest.mark.parametrize("settings", [{}, {"tokenizer_config.json": {"model_max_length": 512}}])
@pytest.mark.parametrize(
    ("model_type", "file"),
    [
        ("bert", "vocab.txt"),
        ("distilbert", "vocab.txt"),
        ("mpnet", "vocab.txt"),
        ("roberta", "vocab.json"),
        ("xlm-roberta", "sentencepiece.bpe.model"),
        ("camembert", "sentencepiece.bpe.model"),
        ("deberta-v2", "spm.model"),
        ("albert", "spiece.model"),
        ("qwen2", "merges.txt"),
        ("qwen3", "merges.txt"),
        ("gemma2", "tokenizer.model"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(
    tmp_path: Path, model_type: str, file: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(
        ValueError, match=f"model is '{tmp_path}', but {tmp_path} has no tokenizer: none of"
    ) as error:
        loaded(tmp_path, model_type, settings)
    assert file in str(error.value)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "modernbert"])
def test_what_transformers_cannot_make_up_is_refused_with_its_words(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} can't be read: ValueError: Couldn't"):
        loaded(tmp_path, model_type, {})


@pytest.mark.parametrize(
    ("model_type", "make"),
    [("bert", wordpiece_tokenizer), ("xlm-roberta", unigram_tokenizer), ("qwen3", qwen_tokenizer)],
)
def test_a_tokenizer_in_one_file_is_enough(
    tmp_path: Path, model_type: str, make: "functools._lru_cache_wrapper[Tokenizer]"
) -> None:
    tokenizer = loaded(tmp_path, model_type, {"tokenizer.json": make().to_str()})
    assert len(tokenizer) == make().get_vocab_size()


def test_a_tokenizer_in_the_files_of_its_family_is_enough(tmp_path: Path) -> None:
    spec = json.loads(qwen_tokenizer().to_str())["model"]
    merges = "\n".join(" ".join(merge) for merge in spec["merges"])
    (tmp_path / "qwen").mkdir()
    qwen = loaded(tmp_path / "qwen", "qwen3", {"vocab.json": spec["vocab"], "merges.txt": merges})
    assert ids(qwen.backend_tokenizer, SENTENCES[0]) == ids(qwen_tokenizer(), SENTENCES[0])
    bert = loaded(
        tmp_path, "bert", {"vocab.txt": "\n".join(json.loads(wordpiece_tokenizer().to_str())["model"]["vocab"])}
    )
    assert ids(bert.backend_tokenizer, SENTENCES[0]) == ids(wordpiece_tokenizer(), SENTENCES[0])
    minilm = RerankerArgs(model=MINILM, kind="bi-encoder")
    assert len(load_tokenizer(minilm, resolve(minilm))) == 30_522


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:da0e\nsize 466247\n"


def test_what_no_tokenizer_reads_may_be_anything(tmp_path: Path) -> None:
    for name in ("bert", "llama"):
        (tmp_path / name).mkdir()
    files = {"tokenizer.json": json.loads(wordpiece_tokenizer().to_str()), "vocab.txt": LFS}
    bert = loaded(tmp_path / "bert", "bert", files)
    assert ids(bert.backend_tokenizer, SENTENCES[0]) == ids(wordpiece_tokenizer(), SENTENCES[0])
    with pytest.raises(ValueError, match=r"but the tokenizer in .* can't be read: ") as caught:
        loaded(tmp_path / "llama", "llama", {"predictions.json": "{}\n{}"})
    assert "predictions" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "file", "content", "message"),
    [
        (
            "bert",
            "tokenizer.json",
            LFS,
            r"is no JSON \(Expecting value.*\); it is a git-lfs pointer: git lfs pull",
        ),
        ("bert", "vocab.txt", LFS, "is a git-lfs pointer, not the file: git lfs pull"),
        ("xlm-roberta", "sentencepiece.bpe.model", LFS, "is a git-lfs pointer, not the file: git lfs pull"),
        ("qwen3", "tokenizer.json", '{"version": "1.0", "trunc', r"is no JSON \(Unterminated string"),
        ("qwen3", "tokenizer_config.json", "{", r"is no JSON \(Expecting property name"),
    ],
)
def test_a_damaged_tokenizer_is_named_with_its_model(
    tmp_path: Path, model_type: str, file: str, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^model is '{tmp_path}', but {tmp_path}/{file} {message}"):
        loaded(tmp_path, model_type, {file: content})
