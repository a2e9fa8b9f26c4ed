"""A Serve config file, checked as a whole before anything is started.

The file is Ray Serve's own. What is ours in it (`args`, the gateway's `user_config`) is validated with the models
of `config.py`, and what the applications say of each other is compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from serve_app import strictyaml
from serve_app.autoscaling import DrainTime
from serve_app.config import (
    Block,
    GatewayArgs,
    GatewaySettings,
    RecallArgs,
    RerankerArgs,
    RolloutArgs,
    UiArgs,
    closest,
    explain,
)
from serve_app.reranker.engine_args import check_engine_args
from serve_app.rollout.store import open_store


@dataclass(frozen=True, slots=True)
class _Kind:
    args: type[Block]
    deployments: tuple[str, ...]


# Our builders by `import_path`. Applications of other people's are left to Serve.
KINDS = {
    "serve_app.gateway:build": _Kind(GatewayArgs, ("Gateway",)),
    "serve_app.recall:build": _Kind(RecallArgs, ("Front", "Recall")),
    "serve_app.reranker:build": _Kind(RerankerArgs, ("Front", "Reranker")),
    "serve_app.rollout:build": _Kind(RolloutArgs, ("Rollout",)),
    "serve_app.ui:build": _Kind(UiArgs, ("Page",)),
}


DRAIN_TIME_PATH = "serve_app.autoscaling:DrainTime"
# The last three are Serve's old names.
_SCALING_FACTORS = (
    "upscaling_factor",
    "downscaling_factor",
    "upscale_smoothing_factor",
    "downscale_smoothing_factor",
    "smoothing_factor",
)


class ConfigError(ValueError):
    """What is wrong with a config file, a problem a line."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A valid file: `raw` as Serve takes it, and our parts of it by application name."""

    path: Path
    raw: dict[str, Any]
    recalls: dict[str, RecallArgs]
    rerankers: dict[str, RerankerArgs]
    gateways: dict[str, GatewaySettings]

    @property
    def applications(self) -> list[dict[str, Any]]:
        applications: list[dict[str, Any]] = self.raw["applications"]
        return applications

    @property
    def host(self) -> str:
        return str((self.raw.get("http_options") or {}).get("host", "0.0.0.0"))

    @property
    def port(self) -> int:
        port: int = (self.raw.get("http_options") or {}).get("port", 8000)
        return port


def same_path(path: str, other: str) -> bool:
    """Whether two import paths name the same, as `module:Class` or as `module.Class`."""
    return path.replace(":", ".") == other.replace(":", ".")


def scaling_of(deployment: dict[str, Any]) -> dict[str, Any] | None:
    """A deployment's `autoscaling_config`, with Serve's bounds where it states none (`num_replicas: auto` has
    others). None where the number of replicas is fixed."""
    from ray.serve.config import AutoscalingConfig

    block, is_auto = deployment.get("autoscaling_config"), deployment.get("num_replicas") == "auto"
    if not is_auto and not isinstance(block, dict):
        return None
    default = AutoscalingConfig.default() if is_auto else AutoscalingConfig()
    return {"min_replicas": default.min_replicas, "max_replicas": default.max_replicas, **(block or {})}


def load(path: Path) -> ConfigFile:
    """Reads and checks `path`. Raises ConfigError with every problem found, each naming its place."""
    raw = _read(path)
    problems = _serve_problems(raw)
    if problems:
        raise ConfigError("\n".join(problems))
    for application in raw["applications"]:
        # Serve's own default; with two such applications it refuses the file.
        application.setdefault("name", "default")
    found: dict[type[BaseModel], dict[str, Any]] = {kind.args: {} for kind in KINDS.values()}
    settings: dict[str, GatewaySettings] = {}
    for i, application in enumerate(raw["applications"]):
        where = f"applications[{i}]"
        problems += _application_policy_problems(where, application)
        kind = KINDS.get(application["import_path"])
        if kind is None:
            problems += _mistyped_builder(where, application["import_path"])
            continue
        args = _validated(kind.args, application.get("args") or {}, f"{where}.args", problems)
        if args is not None:
            found[kind.args][application["name"]] = args
            problems += _args_problems(f"{where}.args", args)
        problems += _deployment_problems(where, application, kind)
        if kind.args is GatewayArgs:
            user_config = _gateway_user_config(application)
            if user_config is None:
                problems.append(
                    f"{where}.deployments: the deployment Gateway has no user_config, so it serves nothing"
                )
            else:
                place = f"{where}.deployments.Gateway.user_config"
                checked = _validated(GatewaySettings, user_config, place, problems)
                if checked is not None:
                    settings[application["name"]] = checked
                    problems += _missing_applications(place, checked, raw)
                    problems += _unread_instructions(place, checked, raw)
    if problems:
        raise ConfigError("\n".join(problems))
    return ConfigFile(path, raw, found[RecallArgs], found[RerankerArgs], settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = strictyaml.parse(path.read_text("utf-8"))
    except strictyaml.YamlError as error:
        raise ConfigError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict) or not raw.get("applications"):
        raise ConfigError(f"{path}: is not a Serve config file (needs `applications:`)")
    return raw


def _serve_problems(raw: dict[str, Any]) -> list[str]:
    """What Serve itself would refuse, and the keys that it would ignore in silence. In `raw`, numbers become what
    Serve reads them as."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        RayActorOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
        gRPCOptionsSchema,
    )

    try:
        schema = ServeDeploySchema.model_validate(raw)
    except ValidationError as error:
        return explain(error, "config").splitlines()
    except (ImportError, AttributeError) as error:
        # Serve imports scaling policies as it reads the file.
        return [f"config: a policy_function can't be imported: {error}; ours: {DRAIN_TIME_PATH}"]
    http = raw.get("http_options") or {}
    problems = _unknown_keys("config", raw, ServeDeploySchema)
    problems += _unknown_keys("config.http_options", http, HTTPOptionsSchema)
    problems += _unknown_keys("config.grpc_options", raw.get("grpc_options") or {}, gRPCOptionsSchema)
    _take_numbers(http, schema.http_options)
    if not 0 < schema.http_options.port < 65536:
        problems.append(f"config.http_options.port is {schema.http_options.port}; allowed: 1 to 65535")
    for i, application in enumerate(raw["applications"]):
        where = f"applications[{i}]"
        problems += _unknown_keys(where, application, ServeApplicationSchema)
        for j, deployment in enumerate(application.get("deployments") or []):
            place = f"{where}.deployments[{j}]"
            read = schema.applications[i].deployments[j]
            problems += _unknown_keys(place, deployment, DeploymentSchema)
            _take_numbers(deployment, read)
            options = deployment.get("ray_actor_options") or {}
            problems += _unknown_keys(f"{place}.ray_actor_options", options, RayActorOptionsSchema)
            _take_numbers(options, read.ray_actor_options)
            scaling = deployment.get("autoscaling_config")
            if isinstance(scaling, dict):
                problems += _unknown_keys(f"{place}.autoscaling_config", scaling, AutoscalingConfig)
                merged = scaling_of(deployment)
                _take_numbers(
                    scaling, _validated(AutoscalingConfig, merged, f"{place}.autoscaling_config", problems)
                )
                if isinstance(policy := scaling.get("policy"), dict):
                    problems += _unknown_keys(f"{place}.autoscaling_config.policy", policy, AutoscalingPolicy)
    return problems


def _unknown_keys(where: str, block: dict[str, Any], model: type[BaseModel]) -> list[str]:
    known = list(model.model_fields)
    return [
        f"{where}.{key} is no setting of Serve's; {closest(str(key), known) or 'known: ' + ', '.join(known)}"
        for key in block
        if key not in known
    ]


def _take_numbers(block: dict[str, Any], read: object) -> None:
    """Serve takes "0.25" for 0.25 and 2.0 for 2; whoever calculates with the file needs what it makes of them."""
    for key in block:
        number = getattr(read, str(key), None)
        if isinstance(number, int | float):
            block[key] = number


def _validated(model: type[Any], value: Any, where: str, problems: list[str]) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems += explain(error, where).splitlines()
        return None


def _mistyped_builder(where: str, import_path: str) -> list[str]:
    hint = closest(import_path, list(KINDS))
    if import_path.startswith("serve_app.") or hint:
        return [f"{where}.import_path is {import_path!r}; {hint or 'known: ' + ', '.join(KINDS)}"]
    return []


def _deployment_problems(where: str, application: dict[str, Any], kind: _Kind) -> list[str]:
    problems: list[str] = []
    seen: set[str] = set()
    for deployment in application.get("deployments") or []:
        name = deployment["name"]
        if name not in kind.deployments:
            allowed = ", ".join(kind.deployments)
            problems.append(f"{where}.deployments names {name!r}; this application has {allowed}")
        elif name in seen:
            problems.append(f"{where}.deployments names {name!r} twice")
        elif deployment.get("user_config") is not None and name != "Gateway":
            problems.append(f"{where}.deployments.{name}.user_config is set, but {name} takes none")
        elif name == "Page" and (deployment.get("num_replicas", 1) != 1 or deployment.get("autoscaling_config")):
            problems.append(
                f"{where}.deployments.Page has several replicas; allowed: num_replicas 1, as a browser's events "
                "belong to the replica that it met first"
            )
        elif isinstance(scaling := deployment.get("autoscaling_config"), dict):
            place = f"{where}.deployments.{name}.autoscaling_config.policy"
            problems += _policy_problems(place, scaling, name)
        seen.add(name)
    return problems


def _application_policy_problems(where: str, application: dict[str, Any]) -> list[str]:
    """Serve asks an application's policy for all its deployments at once, and ours knows one."""
    path = (application.get("autoscaling_policy") or {}).get("policy_function")
    if not isinstance(path, str) or not path.startswith("serve_app."):
        return []
    return [
        f"{where}.autoscaling_policy.policy_function is {path!r}, which is for one deployment; it belongs under "
        "deployments[].autoscaling_config.policy"
    ]


def _policy_problems(where: str, scaling: dict[str, Any], deployment: str) -> list[str]:
    """Serve makes the policy in its controller, where a mistake would show in a log at most."""
    policy = scaling.get("policy") or {}
    path, kwargs = policy.get("policy_function"), policy.get("policy_kwargs") or {}
    if not isinstance(path, str) or not path.startswith("serve_app."):
        return []
    if not same_path(path, DRAIN_TIME_PATH):
        return [f"{where}.policy_function is {path!r}; known: {DRAIN_TIME_PATH}"]
    if deployment != "Reranker":
        return [
            f"{where}.policy_function is {path}, but {deployment} does not report its load; only Reranker does"
        ]
    problems = [f"{where}.policy_kwargs.{problem}" for problem in DrainTime.problems(kwargs).values()]
    # Serve multiplies from the replicas that run, so that those which are still starting would be ordered again.
    problems += [
        f"{where.removesuffix('.policy')}.{name} is {scaling[name]:g}; allowed with {path}: 1"
        for name in _SCALING_FACTORS
        if scaling.get(name) not in (None, 1)
    ]
    return problems


def _args_problems(where: str, args: Block) -> list[str]:
    try:
        if isinstance(args, RerankerArgs):
            check_engine_args(args.engine)
        if isinstance(args, RolloutArgs):
            open_store(args.store).close()
    except ValueError as error:
        return [f"{where}.{error}"]
    return []


def _gateway_user_config(application: dict[str, Any]) -> Any:
    for deployment in application.get("deployments") or []:
        if deployment["name"] == "Gateway":
            return deployment.get("user_config")
    return None


def _missing_applications(where: str, settings: GatewaySettings, raw: dict[str, Any]) -> list[str]:
    """Names in the gateway's settings that no application of the right kind has. A deploy removes applications
    that its file leaves out, so the file has to have them all."""
    by_path: dict[str, list[str]] = {}
    for application in raw["applications"]:
        by_path.setdefault(application["import_path"], []).append(application["name"])
    problems = []
    wanted = [("serve_app.reranker:build", f"{where}.variants", name) for name in settings.variants]
    if settings.rollout is not None:
        wanted.append(("serve_app.rollout:build", f"{where}.rollout", settings.rollout))
    if settings.recall is not None:
        wanted.append(("serve_app.recall:build", f"{where}.recall", settings.recall))
    for import_path, place, name in wanted:
        there = by_path.get(import_path, [])
        if name not in there:
            problems.append(
                f"{place} names {name!r}, but no application with import_path {import_path} has that name; "
                f"there: {', '.join(there) or 'none'}"
            )
    return problems


def _unread_instructions(where: str, settings: GatewaySettings, raw: dict[str, Any]) -> list[str]:
    """Instructions of stages whose variant reads none."""
    kinds = {
        application["name"]: (application.get("args") or {}).get("kind")
        for application in raw["applications"]
        if application["import_path"] == "serve_app.reranker:build"
    }
    return [
        f"{where}.pipelines.{name}.stages[{i}].instruction is set, but {stage.variant} is of kind "
        f"{kinds[stage.variant]}, which takes none (only qwen3-reranker does)"
        for name, pipeline in settings.pipelines.items()
        for i, stage in enumerate(pipeline.stages)
        if stage.instruction is not None and kinds.get(stage.variant) in ("cross-encoder", "bi-encoder")
    ]
