"""The bodies clients send and get: our own search, and the rerank dialects of Jina, Cohere, vLLM and TEI.

Only the wire is described here. Our own bodies refuse unknown fields (they are typing errors); the dialects
ignore them, because their clients send fields that mean nothing here (`max_chunks_per_doc`, `priority`, …).
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

TimeoutMs = Annotated[int | None, Field(default=None, ge=1, description="Deadline in ms; the route's if absent.")]
# vLLM's clients send 0 for all.
TopN = Annotated[
    int | None,
    Field(default=None, ge=0, description="How many results to answer with. 0: all."),
    AfterValidator(lambda top_n: top_n or None),
]
UseActivation = Annotated[
    bool | None, Field(default=None, description="false: logits instead of scores in [0, 1], as with vLLM.")
]
Instruction = Annotated[
    str | None,
    Field(
        default=None,
        max_length=4096,
        description="What counts as relevant, for models that read instructions; best written in English.",
    ),
    # Forms send what was left empty.
    AfterValidator(lambda instruction: instruction or None),
]
ModelName = Annotated[
    str | None, Field(default=None, description="A route, a pipeline or a variant; see GET /v1/models.")
]

User = Annotated[
    str | None,
    Field(default=None, max_length=256, description="One user always gets the same pipeline of a route."),
]
MaxTokensPerDoc = Annotated[
    int | None,
    Field(
        default=None,
        ge=0,
        description="Documents are cut to this many tokens, or to what the pipeline allows, if that is less. "
        "0: as the pipeline has it.",
    ),
    AfterValidator(lambda tokens: tokens or None),
]

# The fields of the bodies below that hold a text for each pair.
TEXTS = ("documents", "texts", "text_1", "text_2", "queries", "items", "data_1", "data_2")

TruncationSide = Annotated[
    Literal["right"] | None, Field(default=None, description="Of vLLM's two sides the one that is cut here.")
]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class TemplateArguments(Body):
    """What means something here of the arguments that vLLM's clients give the chat template."""

    instruction: Instruction = None


ChatTemplateKwargs = Annotated[
    TemplateArguments | None,
    Field(default=None, description="As with vLLM: an instruction in here wins over the one beside it."),
]


class TextDocument(Body):
    """A document as an object. `rank_fields` of the call may name other fields than `text`, and without both
    `content` may hold vLLM's parts, all of them text."""

    model_config = ConfigDict(extra="allow", frozen=True)
    # Of any type where `rank_fields` name others: it isn't read there.
    text: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})] = None


class PartsDocument(Body):
    """vLLM's content parts, `{"type": "text", "text": …}`; other types are refused."""

    content: list[dict[str, Any]]


def joined(parts: list[Any]) -> str:
    """The text of vLLM's content parts, which it joins like this. Raises ValueError for parts of other types."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(
                f"has a part of type {str(kind)[:40]!r}; allowed: text, with its text (images are not read here)"
            )
    return "\n".join(part["text"] for part in parts)


def _as_list(documents: Any) -> Any:
    """vLLM takes a document for a list of one."""
    return [documents] if isinstance(documents, str | dict) else documents


def _as_texts(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Texts, also those in vLLM's content parts, which are looked for only where the value isn't plain texts."""
    try:
        return validate(value)
    except ValidationError:
        return validate([_as_text(v) for v in value] if isinstance(value, list) else _as_text(value))


def _as_text(value: Any) -> Any:
    content = value.get("content") if isinstance(value, dict) else None
    return joined(content) if isinstance(content, list) else value


Text = Annotated[str, WrapValidator(_as_texts, json_schema_input_type=str | PartsDocument)]
Texts = Annotated[
    str | list[str] | None,
    WrapValidator(_as_texts, json_schema_input_type=str | PartsDocument | list[str | PartsDocument] | None),
]


class SearchBody(Body):
    """`POST /v1/search`: the catalogue's best documents for a query."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    query: str
    model: ModelName = None
    route: str | None = Field(default=None, description="A route, where `model` could also name other things.")
    recall_k: int | None = Field(
        default=None, ge=1, description="Recall depth, at least `top_n`; the pipeline's if absent."
    )
    top_n: int = Field(default=10, ge=1, description="How many results to answer with.")
    instruction: Instruction = None
    timeout_ms: TimeoutMs = None
    user: User = None
    rerank: bool = Field(default=True, description="false: BM25 order, no model is asked.")
    explain: bool = Field(default=False, description="Adds every stage's score to every result.")


class RerankBody(Body):
    """`POST /v1/rerank` and `/rerank`: Jina's, Cohere v1's and vLLM's body."""

    model: ModelName = None
    query: str | TextDocument
    documents: Annotated[
        list[str | TextDocument],
        BeforeValidator(_as_list, json_schema_input_type=str | TextDocument | list[str | TextDocument]),
    ]
    top_n: TopN = None
    use_activation: UseActivation = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = Field(
        default=None, max_length=32, description="Fields of object documents to read."
    )
    instruction: Instruction = None
    chat_template_kwargs: ChatTemplateKwargs = None
    truncation_side: TruncationSide = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    timeout_ms: TimeoutMs = None
    user: User = None


class CohereV2Body(Body):
    """`POST /v2/rerank`: Cohere v2's and vLLM's body; documents are strings."""

    model: ModelName = None
    query: Text
    documents: Annotated[
        list[str],
        BeforeValidator(_as_list),
        WrapValidator(_as_texts, json_schema_input_type=str | PartsDocument | list[str | PartsDocument]),
    ]
    top_n: TopN = None
    use_activation: UseActivation = None
    return_documents: bool | None = Field(
        default=False, description="Cohere's v2 has it no more; vLLM's and litellm's clients send it."
    )
    max_tokens_per_doc: MaxTokensPerDoc = None
    instruction: Instruction = None
    chat_template_kwargs: ChatTemplateKwargs = None
    truncation_side: TruncationSide = None
    timeout_ms: TimeoutMs = None
    user: User = None


class TeiBody(Body):
    """`POST /rerank` with `texts`: the body of text-embeddings-inference."""

    model: ModelName = None
    query: str
    texts: list[str]
    top_n: TopN = None
    raw_scores: bool = Field(default=False, description="Logits instead of scores in [0, 1].")
    return_text: bool = False
    truncate: Annotated[bool | None, AfterValidator(lambda truncate: truncate is not False)] = Field(
        default=True, description="false: a text that is too long is an error, and isn't cut. null: as true."
    )
    truncation_direction: Literal["Right", "right"] = "Right"
    instruction: Instruction = None
    timeout_ms: TimeoutMs = None
    user: User = None


def _dialect(body: Any) -> str:
    return "TeiBody" if isinstance(body, TeiBody) or (isinstance(body, dict) and "texts" in body) else "RerankBody"


class AnyRerankBody(
    RootModel[
        Annotated[
            Annotated[RerankBody, Tag("RerankBody")] | Annotated[TeiBody, Tag("TeiBody")], Discriminator(_dialect)
        ]
    ]
):
    """`POST /rerank`: with `texts` it is TEI's, else vLLM's and Jina's."""


class ScoreBody(Body):
    """`POST /v1/score`: vLLM's body. One text against many, or two lists of equal length pair by pair, under any
    of vLLM's names: `text_1`/`text_2`, `queries`/`documents`, `queries`/`items`, `data_1`/`data_2`."""

    model: ModelName = None
    text_1: Texts = None
    text_2: Texts = None
    queries: Texts = None
    documents: Texts = None
    items: Texts = None
    data_1: Texts = None
    data_2: Texts = None
    use_activation: UseActivation = None
    instruction: Instruction = None
    chat_template_kwargs: ChatTemplateKwargs = None
    truncation_side: TruncationSide = None
    max_tokens_per_doc: MaxTokensPerDoc = None
    timeout_ms: TimeoutMs = None
    user: User = None

    @model_validator(mode="after")
    def _one_text_on_each_side(self) -> "ScoreBody":
        self.pairs()
        return self

    def names(self) -> tuple[str, str]:
        """Those that queries and documents were given under."""
        return self._name("text_1", "queries", "data_1"), self._name("text_2", "documents", "items", "data_2")

    def pairs(self) -> list[tuple[str, str]]:
        """(query, document) for every score to be answered, in order."""
        names = self.names()
        left, right = (_listed(getattr(self, name)) for name in names)
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise ValueError(
                f"{names[0]} has {len(left)} texts and {names[1]} has {len(right)}; "
                "allowed: one against any number, or as many on both sides"
            )
        return list(zip(left, right, strict=True))

    def _name(self, *names: str) -> str:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(names)} (got {', '.join(given) or 'none'})")
        return given[0]


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


class Degraded(BaseModel):
    """Why an answer is less than the pipeline can do."""

    stage: str = Field(description="The variant that did not contribute.")
    reason: Literal["unavailable", "timeout", "overloaded", "prompt_too_long", "error"]
    detail: str


class StageMeta(BaseModel):
    name: str = Field(description="`recall`, or the variant.")
    took_ms: float
    cached: bool = Field(default=False, description="The candidates of this search were known; recall only.")
    pairs: int = 0
    cache_hits: int = Field(
        default=0, description="Of the pairs, those whose score was known, or being computed for another call."
    )
    tokens: int = Field(default=0, description="Of the pairs that were computed; so the next two.")
    cached_tokens: int = Field(default=0, description="Tokens of prompts that begin as an earlier one did.")
    truncated: int = Field(default=0, description="Documents that lost tokens.")
    skipped: str | None = Field(default=None, description="Why the stage was left out on purpose.")


class Meta(BaseModel):
    """How the answer came about."""

    model_config = ConfigDict(extra="allow")
    route: str | None
    pipeline: str | None
    why: Literal["split", "forced", "fallback"] = Field(
        default="split",
        description="The route's split, the client's wish, or in place of a canary that failed.",
    )
    rollout: dict[str, str] | None = Field(
        default=None, description="`id` of the rollout that had a say, and the `role` that answered."
    )
    variants: list[str]
    stages: list[StageMeta]
    degraded: list[Degraded] | None = Field(default=None, description="Absent when nothing was left out.")
    warnings: list[str] | None = Field(
        default=None,
        description="What the call may not have meant, as a name in `rank_fields` that no document has.",
    )
    took_ms: float


class SearchResult(BaseModel):
    id: str
    score: float
    recall_score: float
    rerank_score: float | None
    title: str
    text: str
    document: dict[str, Any] = Field(description="The further fields of the indexed document.")
    stages: list[dict[str, Any]] | None = Field(default=None, description="With `explain`: every score.")


class SearchAnswer(BaseModel):
    id: str
    query: str
    results: list[SearchResult]
    meta: Meta


class RerankResult(BaseModel):
    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankAnswer(BaseModel):
    id: str
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: Meta


class TeiRank(BaseModel):
    index: int
    score: float
    text: str | None = Field(default=None, description="With `return_text`.")


class AnyRerankAnswer(RootModel[RerankAnswer | list[TeiRank]]):
    """A list for TEI's body."""


class ScoreAnswer(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[dict[str, Any]]
    usage: dict[str, int]
    meta: Meta


class ModelEntry(BaseModel):
    """A name that `model` may have. A pipeline's entry has its settings, too."""

    model_config = ConfigDict(extra="allow")
    id: str
    kind: Literal["route", "pipeline", "variant"]
    weights: dict[str, float] = Field(default={}, description="Of a route: as its settings have them.")
    effective_weights: dict[str, float] = Field(
        default={},
        description="Of a route: percent of its calls that each pipeline answers now, rollouts included.",
    )
    running_replicas: int | None = Field(default=None, description="Of a variant; null while nobody knows.")


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class ErrorBody(BaseModel):
    message: str
    detail: str = Field(description="`message` once more.")
    error: dict[str, Any]
    id: str
