"""Where a model comes from: a hub id, a local path, or a Python package; checked before an engine starts on it.

Every error names the setting, the value seen and what is allowed.
"""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from serve_app.config import DEFAULT_INSTRUCTION, RerankerArgs, YesNoPrompt

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_SAFE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
# As vLLM knows them (`_DENSE_MODULE_TYPES` in transformers_utils/config.py).
_DENSE_TYPES = (
    "sentence_transformers.models.Dense",
    "sentence_transformers.base.modules.dense.Dense",
    "pylate.models.Dense.Dense",
)
_ENCODERS = ("bert", "roberta", "electra", "mpnet", "nomic", "gte", "new")
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 1024
# Of each tensor, so that a head that was trained alone is seen among gigabytes that weren't.
_TENSOR_SAMPLE_BYTES = 16 * 1024
_LFS_POINTER = b"version https://git-lfs"
# More than any model's list of tensors takes.
_MOST_HEADER_BYTES = 100 * 2**20
# Engine arguments about room, order and spread. All others count as part of what decides a score, also those
# that a later vLLM brings; two of them count as the engine resolved them.
_NO_MATTER_FOR_SCORES = {
    "async_scheduling",
    "block_size",
    "cpu_offload_gb",
    "data_parallel_size",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "dtype",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "scheduling_policy",
    "swap_space",
    "tensor_parallel_size",
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's folder, its `config.json`, a name for exactly these weights, and one for all of its files."""

    folder: Path
    config: dict[str, Any]
    revision: str
    contents: str = ""

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["none"])[0])

    @property
    def is_causal(self) -> bool:
        """Whether it is a language model with its head, as rerankers are published that answer yes or no."""
        return self.architecture.endswith("ForCausalLM")

    def longest(self, max_model_len: int) -> int:
        """Tokens the model can really read: RoBERTa's positions start behind the padding id, and vLLM's
        `max_model_len` counts the ones before."""
        if self.config.get("model_type") not in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"):
            return max_model_len
        usable = int(self.config["max_position_embeddings"]) - int(self.config.get("pad_token_id", 1)) - 1
        return min(max_model_len, usable)


def resolve(args: RerankerArgs) -> Model:
    """Finds or downloads `args.model` and checks it. Raises ValueError, or OSError if the hub can't be reached."""
    folder, commit = _folder(args)
    if not folder.is_dir():
        seen = "a file" if folder.exists() else "missing"
        raise ValueError(f"model is {args.model!r}, but the folder {folder} is {seen}")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"model is {args.model!r}, but {folder} has no config.json; a model's own folder is needed"
        )
    config = read_json(args.model, config_file)
    digest = _checked_sha256(folder, args.sha256) if args.sha256 else None
    if commit is not None:
        # It names every file; what else lies in the snapshot's folder differs from node to node.
        model = Model(folder, config, commit, commit)
    else:
        files = fingerprint(folder)
        model = Model(folder, config, (digest or files)[:16], f"{files} {digest}")
    _check_architecture(args, model)
    if args.kind == "qwen3-reranker":
        _refuse_pooling(args.model, folder)
    if args.kind == "bi-encoder":
        _check_dense(args.model, folder)
    return model


def read_json(name: str, path: Path) -> Any:
    """A file of model `name`. Raises ValueError, with the model's name and the file's, if it holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        hint = "; it is a git-lfs pointer: git lfs pull" if is_pointer(path) else ""
        raise ValueError(f"model is {name!r}, but {path} is no JSON ({error}){hint}") from error


def is_pointer(path: Path) -> bool:
    """Whether git-lfs has left a few lines in the place of the file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def fingerprint(folder: Path) -> str:
    """Changes with the weights, the vocabulary or the configuration, without reading gigabytes: whole small files,
    and of each weight file its size, 64 samples, among them its start, and the start of every tensor."""
    digest = hashlib.sha256()
    small = [path for kind in ("*.json", "*/*.json", "*.txt", "*.model", "*.py") for path in folder.glob(kind)]
    for path in sorted(small):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    weights = ("*.safetensors", "*/*.safetensors", "*.bin", "*/*.bin")
    for path in sorted(path for kind in weights for path in folder.glob(kind)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(size * i // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
            for start, end in _tensors(file) if path.suffix == ".safetensors" else ():
                file.seek(start)
                digest.update(file.read(min(end - start, _TENSOR_SAMPLE_BYTES)))
    return digest.hexdigest()


def scoring_fingerprint(args: RerankerArgs, model: Model, dtype: str, max_model_len: int, software: str) -> str:
    """Names all that decides the score of a pair on the variant's side. Where it is the same, scores are the same
    but for rounding; `software` says which versions compute them."""
    decides: dict[str, Any] = {
        "model": [model.revision, model.contents],
        "kind": args.kind,
        "prefixes": [args.query_prefix, args.document_prefix],
        "engine": {k: v for k, v in args.engine.items() if k not in _NO_MATTER_FOR_SCORES},
        "dtype": dtype,
        "max_model_len": max_model_len,
        "software": software,
    }
    if args.kind == "qwen3-reranker":
        decides["instruction"] = args.instruction or DEFAULT_INSTRUCTION
        decides["prompt"] = (args.prompt or YesNoPrompt()).model_dump()
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _tensors(file: BinaryIO) -> list[tuple[int, int]]:
    """Where each tensor of a safetensors file starts and ends; nothing of one that vLLM won't read either."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(min(length, _MOST_HEADER_BYTES)))
        entries = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return [(8 + length + int(start), 8 + length + int(end)) for start, end in sorted(entries)]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _folder(args: RerankerArgs) -> tuple[Path, str | None]:
    name = args.model
    if name.startswith("package:"):
        _refuse_revision(args, "in a package")
        return _in_package(name), None
    path = Path(name).expanduser()
    if path.exists() or name.startswith(("/", ".", "~")):
        _refuse_revision(args, "a path")
        return path, None
    if not _HUB_ID.match(name):
        raise ValueError(
            f"model is {name!r}, which is neither a folder here nor a hub id; allowed: owner/name on the hub, "
            "a path, or package:<python package>/<path inside it>"
        )
    # Python files only where the operator lets the engine run them.
    own_code = ["*.py"] if args.engine.get("trust_remote_code") else []
    return _download(name, args.revision, [*_SAFE_FILES, *own_code])


def _refuse_revision(args: RerankerArgs, where: str) -> None:
    if args.revision is not None:
        raise ValueError(
            f"revision is {args.revision!r}, but model is {args.model!r}, which is {where}; revisions are for "
            "models on the hub, and sha256 is for others"
        )


def _in_package(name: str) -> Path:
    package, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model is {name!r}, but no Python package {package!r} is installed here")
    root = Path(spec.submodule_search_locations[0]).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root):
        raise ValueError(f"model is {name!r}, which leaves the package's folder {root}")
    return folder


def _download(name: str, revision: str | None, files: list[str]) -> tuple[Path, str]:
    """The snapshot's folder and its commit. Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["onnx/*"]))
        more = [] if any(folder.glob("*.safetensors")) else ["*.bin"]
        # Beside weights in safetensors, the projection of a bi-encoder is often in the older format.
        unsafe = (
            path for path in _dense_paths(name, folder) if not (folder / path / "model.safetensors").is_file()
        )
        more += [f"{path}/pytorch_model.bin" for path in unsafe]
        if more:
            # Of the same commit, though the branch may have moved meanwhile.
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=[*files, *more]))
    except GatedRepoError as error:
        raise OSError(
            f"model is {name!r}, which needs a grant on the hub; set HF_TOKEN ({_line(error)})"
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"revision is {revision!r}, which the hub's {name!r} hasn't ({_line(error)})") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"model is {name!r}, which is neither a folder here nor on the hub ({_line(error)})"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise OSError(
            f"model is {name!r}, which is no folder here, and the hub can't be reached; "
            f"set model to a path or package:…, or fill HF_HOME beforehand ({_line(error)})"
        ) from error
    return folder, folder.name


def _checked_sha256(folder: Path, expected: str) -> str:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"sha256 is set, but {folder} has no model.safetensors; allowed for models in that one file"
        )
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != expected:
        raise ValueError(f"sha256 of {path} is {seen}, expected {expected}")
    return seen


def _modules(name: str, folder: Path) -> list[dict[str, Any]]:
    """What Sentence Transformers runs one after another; nothing for models that aren't its."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules: Any = read_json(name, file)
    if isinstance(modules, dict):
        modules = modules.get("modules", [])
    return list(modules)


def _dense_paths(name: str, folder: Path) -> list[str]:
    """Folders of the modules that project a bi-encoder's embeddings."""
    return [str(module.get("path", "")) for module in _modules(name, folder) if module.get("type") in _DENSE_TYPES]


def _refuse_pooling(name: str, folder: Path) -> None:
    """A language model that embeds has the architecture of one that answers yes or no."""
    if any(str(module.get("type")).endswith(".Pooling") for module in _modules(name, folder)):
        raise ValueError(
            f"kind is qwen3-reranker, but modules.json of {name!r} pools embeddings; is it a bi-encoder?"
        )


def _check_dense(name: str, folder: Path) -> None:
    for path in _dense_paths(name, folder):
        module = folder / path
        weights = [module / file for file in ("model.safetensors", "pytorch_model.bin")]
        if not (module / "config.json").is_file() or not any(file.is_file() for file in weights):
            # vLLM would leave out the projection and say so in a log at most.
            raise ValueError(
                f"model is {name!r}, whose modules.json has the Dense module {path!r}, but {module} lacks "
                "config.json, or both model.safetensors and pytorch_model.bin"
            )


def _check_architecture(args: RerankerArgs, model: Model) -> None:
    kind, name, model_type = args.kind, model.architecture, str(model.config.get("model_type", ""))
    classifies = name.endswith("ForSequenceClassification")
    encodes = model_type.replace("-", "").startswith(_ENCODERS) or "bert" in name.lower()
    if kind == "qwen3-reranker" and (encodes or not (model.is_causal or classifies)):
        raise ValueError(
            f"kind is qwen3-reranker, but the model's architecture is {name}; allowed: a …ForCausalLM, "
            "or one converted to …ForSequenceClassification. Is it a cross-encoder or a bi-encoder?"
        )
    if kind == "qwen3-reranker" and model_type != "qwen3" and args.prompt is None:
        raise ValueError(
            f"kind is qwen3-reranker, but the model's model_type is {model_type!r}; that kind puts a pair as "
            "`<Instruct>: …\\n<Query>: …\\n<Document>: …` into Qwen3-Reranker's prompt and reads yes and no, and "
            "other families were trained with other prompts. For one that was trained with this, set `prompt` "
            "(prompt: {} for Qwen3-Reranker's own)"
        )
    if kind == "cross-encoder" and not classifies:
        others = "" if model.is_causal else " Is it a bi-encoder?"
        if model.is_causal and model_type == "qwen3":
            others = " Is it a qwen3-reranker?"
        raise ValueError(
            f"kind is cross-encoder, but the model's architecture is {name}; "
            f"allowed: a …ForSequenceClassification.{others}"
        )
    if kind == "bi-encoder" and classifies:
        raise ValueError(
            f"kind is bi-encoder, but the model's architecture is {name}; allowed: a model that embeds. "
            "Is it a cross-encoder?"
        )
    if classifies and (labels := _labels(model.config)) != 1:
        raise ValueError(f"the model gives {labels} labels (config.json); rerankers give 1")


def _labels(config: dict[str, Any]) -> int:
    names = config.get("id2label")
    return len(names) if names is not None else int(config.get("num_labels", 2))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"[:300]
