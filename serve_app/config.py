"""One pydantic model for every block that a user writes in YAML.

`RerankerArgs`, `RecallArgs` and `GatewayArgs` are the `args` of the three kinds of application;
`GatewaySettings` is the gateway's `user_config`, which reloads without a restart.
Unknown keys are refused everywhere, and errors name the place, the value and what is allowed.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
# Clients name a route as their model, so it may be called as a model on the hub is: Qwen/Qwen3-Reranker-0.6B.
RouteName = Annotated[
    str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
]

# scheme://host[:port] as browsers send it, so without a path.
_ORIGIN = r"^(\*|https?://[a-z0-9.-]+(:[0-9]{1,5})?)$"

# The default instruction of the Qwen3-Reranker model card.
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class YesNoPrompt(Block):
    """The prompt around a pair for a causal yes/no reranker. The defaults are Qwen3-Reranker's.

    The pair is `<prefix><Instruct>: {instruction}\\n<Query>: {query}\\n<Document>: {document}<suffix>`;
    prefix and suffix are the only places where control tokens are read as such.
    """

    prefix: str = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix: str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    # The tokens whose probabilities are compared. Unquoted, YAML reads both words as true and false, also as keys.
    yes: str = "yes"
    no: str = "no"

    @model_validator(mode="before")
    @classmethod
    def _words_stand_in_quotes(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(isinstance(word, bool) for item in value.items() for word in item):
            raise ValueError('yes and no need quotes in YAML: {"yes": "true", "no": "false"}')
        return value


class RerankerArgs(Block):
    """`args` of `serve_app.reranker:build`: one model served one way."""

    # A hub id, a local path, or `package:<python package>/<path inside it>`.
    model: str = Field(min_length=1)
    kind: Literal["qwen3-reranker", "cross-encoder", "bi-encoder"]
    # Branch, tag or commit on the hub.
    revision: str | None = None
    # Of the weight file (`model.safetensors`), for models from a path or a package; checked before loading.
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    # Used when a call brings none; qwen3-reranker only.
    instruction: str | None = Field(default=None, min_length=1, max_length=4096)
    prompt: YesNoPrompt | None = None
    # Put before every query and document by bi-encoders that were trained with it (E5: "query: ").
    query_prefix: str = ""
    document_prefix: str = ""
    # Any vLLM engine argument.
    engine: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> "RerankerArgs":
        if self.kind != "qwen3-reranker":
            for name in ("instruction", "prompt"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set, but kind {self.kind} takes none (only qwen3-reranker does)")
        if self.kind != "bi-encoder":
            for name in ("query_prefix", "document_prefix"):
                if getattr(self, name):
                    raise ValueError(f"{name} is set, but kind {self.kind} takes none (only bi-encoder does)")
        return self


class RecallArgs(Block):
    """`args` of `serve_app.recall:build`: one catalogue's BM25 index."""

    # Folder written by `serve-app index build`.
    index: str = Field(min_length=1)
    title_boost: float = Field(default=1.0, gt=0, le=100)
    text_boost: float = Field(default=1.0, gt=0, le=100)
    # Searches that run at once in a replica, each on a thread.
    threads: int = Field(default=2, ge=1, le=64)


class RolloutArgs(Block):
    """`args` of `serve_app.rollout:build`: the controller of canary rollouts."""

    # sqlite:///path on one machine, redis://[:password@]host[:port][/db] on a cluster; the password may also be
    # SERVE_APP_REDIS_PASSWORD in the environment.
    store: str = Field(min_length=1)
    # JSON Lines file for the raw events of /v1/events, rotated at 100 MB, five files; None: none.
    events_log: str | None = Field(default=None, min_length=1)


class GatewayArgs(Block):
    """`args` of `serve_app.gateway:build`. Everything that may change while serving is in `GatewaySettings`."""

    # Serve whoever reaches the port, also from other machines, where there are no API keys.
    without_keys: bool = False
    # Pages that may call the gateway from a browser, e.g. [https://shop.example]; "*": all. None by default.
    cors_origins: tuple[Annotated[str, Field(pattern=_ORIGIN)], ...] = ()


class UiArgs(Block):
    """`args` of `serve_app.ui:build`: the page."""

    # Of the gateway, as the page's replica reaches it; None: Serve's proxy on the same machine.
    gateway_url: str | None = Field(default=None, pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")


class Variant(Block):
    """How the gateway calls the variant of this name, which is the Serve application of the same name."""

    # Pairs in one call to a replica: a larger request is split, so that it spreads over replicas.
    pairs_per_call: int = Field(default=64, ge=1, le=4096)
    # Unicode scripts the model was trained on, e.g. [Latin]. Queries with other letters skip its stages
    # in pipelines. Empty: all.
    scripts: tuple[
        Literal["Latin", "CJK", "Cyrillic", "Arabic", "Greek", "Hebrew", "Thai", "Devanagari"], ...
    ] = ()


class Stage(Block):
    """One rerank stage: `variant` scores what the stage before kept and passes on the `keep` best."""

    variant: Name
    # None: all are passed on.
    keep: int | None = Field(default=None, ge=1)
    instruction: str | None = Field(default=None, min_length=1, max_length=4096)
    max_tokens_per_doc: int | None = Field(default=None, ge=1)


class Fusion(Block):
    """How a stage's scores and the recall scores make one order.

    Both are scaled over the stage's candidates to [0, 1] (`minmax`), then
    final = recall_weight * recall + (1 - recall_weight) * rerank. `rrf` adds reciprocal ranks instead:
    recall_weight / (60 + rank) + (1 - recall_weight) / (60 + rank) (Cormack, Clarke, Buettcher, SIGIR 2009).
    """

    method: Literal["minmax", "rrf"] = "minmax"
    recall_weight: float = Field(default=0.3, ge=0, le=1)


class Pipeline(Block):
    """Recall depth, rerank stages in order, and fusion. No stages: BM25 alone."""

    # Of a search that brings none; one that shows more (`top_n`) recalls as many as it shows.
    recall_k: int = Field(default=200, ge=1, le=10_000)
    stages: tuple[Stage, ...] = Field(default=(), max_length=8)
    # None: the last stage's scores alone decide.
    fusion: Fusion | None = None

    @model_validator(mode="after")
    def _keeps_shrink(self) -> "Pipeline":
        available, source = self.recall_k, f"recall_k is {self.recall_k}"
        for i, stage in enumerate(self.stages):
            if stage.keep is None:
                continue
            if stage.keep > available:
                raise ValueError(f"stages[{i}].keep is {stage.keep}, but {source}; allowed: 1 to {available}")
            available, source = stage.keep, f"stages[{i}] keeps {stage.keep}"
        return self


class Route(Block):
    """A name that clients address. `weights` are shares of traffic by pipeline; they need not add up to 100."""

    weights: dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    # Deadline of a call that brings no timeout_ms.
    timeout_ms: int = Field(default=5_000, ge=1)
    # Header that tells users apart where a call names none, e.g. X-Session-Id.
    user_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("all weights are 0; at least one pipeline needs a weight above 0")
        return weights


class Limits(Block):
    """What one call may ask for. An error names the limit that was hit."""

    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    max_documents: int = Field(default=1_000, ge=1)
    max_query_chars: int = Field(default=8_192, ge=1)
    max_document_chars: int = Field(default=1_000_000, ge=1)
    max_recall_k: int = Field(default=1_000, ge=1, le=10_000)
    max_timeout_ms: int = Field(default=60_000, ge=1)
    # Calls that one gateway replica works on at once; more are answered 429.
    max_concurrent_calls: int = Field(default=256, ge=1)


class Cache(Block):
    """Scores that were computed before, by all that decides them, and the candidates of searches. Each gateway
    replica has its own, and Redis behind it for the scores where `redis` is set."""

    # 32 bytes a score, of memory that is taken as it fills.
    max_bytes: int = Field(default=64 * 2**20, ge=2**20, le=2**40)
    # 200 candidates of 1 KB take half a megabyte; 0: every search asks recall.
    recall_max_bytes: int = Field(default=64 * 2**20, ge=0)
    ttl_s: int = Field(default=3600, ge=1, le=30 * 86_400)
    # redis://[[user]:password@]host[:port][/db], or rediss:// for TLS; the password may also be
    # SERVE_APP_CACHE_REDIS_PASSWORD in the environment.
    redis: SecretStr | None = None

    @field_validator("redis")
    @classmethod
    def _url_names_a_server(cls, redis: SecretStr | None) -> SecretStr | None:
        if redis is None:
            return redis
        try:
            parts = urlsplit(redis.get_secret_value())
            good = parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0
            good = good and not (parts.query or parts.fragment) and int(parts.path.strip("/") or 0) >= 0
        except ValueError:
            good = False
        if not good:
            # Without the url: it may hold a password.
            raise ValueError("names no Redis server; allowed: redis[s]://[[user]:password@]host[:port][/db]")
        return redis


class GatewaySettings(Block):
    """The gateway's `user_config`: what exists, what it is called, and who gets it."""

    # Name of the recall application; None: a fleet that only reranks.
    recall: Name | None = None
    # Name of the rollout application; None: traffic moves by the routes' weights alone.
    rollout: Name | None = None
    variants: dict[Name, Variant] = Field(default_factory=dict)
    pipelines: dict[Name, Pipeline] = Field(min_length=1)
    routes: dict[RouteName, Route] = Field(min_length=1)
    limits: Limits = Limits()
    # null: every score is computed.
    cache: Cache | None = Cache()

    @model_validator(mode="after")
    def _names_resolve(self) -> "GatewaySettings":
        for name, pipeline in self.pipelines.items():
            for i, stage in enumerate(pipeline.stages):
                if stage.variant not in self.variants:
                    raise ValueError(
                        f"pipelines.{name}.stages[{i}].variant is {stage.variant!r}, "
                        f"which is not under variants; {known_names(stage.variant, self.variants)}"
                    )
            if pipeline.recall_k > self.limits.max_recall_k:
                raise ValueError(
                    f"pipelines.{name}.recall_k is {pipeline.recall_k}, "
                    f"but limits.max_recall_k is {self.limits.max_recall_k}"
                )
        for name, route in self.routes.items():
            for pipeline_name in route.weights:
                if pipeline_name not in self.pipelines:
                    raise ValueError(
                        f"routes.{name}.weights names {pipeline_name!r}, "
                        f"which is not under pipelines; {known_names(pipeline_name, self.pipelines)}"
                    )
            if route.timeout_ms > self.limits.max_timeout_ms:
                raise ValueError(
                    f"routes.{name}.timeout_ms is {route.timeout_ms}, "
                    f"but limits.max_timeout_ms is {self.limits.max_timeout_ms}"
                )
        taken: dict[str, str] = {}
        for group in ("routes", "pipelines", "variants"):
            for name in getattr(self, group):
                if name in taken:
                    raise ValueError(
                        f"{group}.{name} has the name of {taken[name]}.{name}; "
                        "clients name all three in `model`, so names are unique across them"
                    )
                taken[name] = group
        return self

    @property
    def default_route(self) -> str:
        """The route of a call that names none: `default`, or else the first."""
        return "default" if "default" in self.routes else next(iter(self.routes))


def explain(error: ValidationError, where: str) -> str:
    """Every problem of a pydantic error on a line of its own: place, what is wrong, value seen."""
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join([where, *(str(part) for part in problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        # What stands under a name that nobody knows may be a password.
        silent = problem["type"] in ("value_error", "missing", "extra_forbidden")
        seen = "" if silent else f" (got {_short(problem['input'])})"
        lines.append(f"{place}: {message}{seen}")
    return "\n".join(lines)


def closest(name: str, allowed: "list[str]") -> str:
    """`did you mean …` for a mistyped name, or an empty string."""
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def known_names(name: str, allowed: Iterable[str]) -> str:
    """For a name that isn't `allowed`: the nearest that is, and all of them."""
    allowed = list(allowed)
    listed = ", ".join(sorted(allowed)) or "none"
    return " ".join(filter(None, [closest(name, allowed), f"known: {listed}"]))


def _short(value: object) -> str:
    # A password may stand in a url, also in one that stands in the wrong place.
    if value and isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = re.sub(r"://\S*@", "://***@", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
