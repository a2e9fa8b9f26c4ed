"""The manifests are valid, deploy what configs/ says, and keep what cluster/README.md promises."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from serve_app.configfile import ConfigFile, load
from serve_app.launch import ENVIRONMENT, FAST, least_resources
from serve_app.plan import plan
from tests.cluster_files.conftest import KUBERAY, ROOT, Manifests, Object, load_generator

CRD = ROOT.parent / "shared" / "data" / "kuberay" / "ray.io_rayservices.yaml"
KUBERNETES = "1.34"
# Of one card, as CUDA gives it.
CARD_GIB = {"gpu-h100": 79.6, "gpu-l4": 22.5}


@pytest.fixture
def config(manifests: Manifests, tmp_path: Path) -> ConfigFile:
    """The deployed Serve config, which is valid as a whole."""
    path = tmp_path / "serve.yaml"
    path.write_text(manifests.service["serveConfigV2"])
    return load(path)


def test_what_is_generated_is_what_configs_say() -> None:
    for path, text in load_generator().generated().items():
        assert path.read_text() == text, f"{path} is not what `make manifests` makes"


def test_changes_are_merged_by_name_and_key_by_key() -> None:
    merged = load_generator().merged
    old = {
        "a": {"x": 1, "y": [1, 2]},
        "apps": [{"name": "one", "k": 1}, {"name": "two", "k": {"deep": 1, "kept": 2}}],
    }
    new = {"a": {"y": [3]}, "apps": [{"name": "two", "k": {"deep": 5}}, {"name": "three"}]}
    assert merged(old, new) == {
        "a": {"x": 1, "y": [3]},
        "apps": [{"name": "one", "k": 1}, {"name": "two", "k": {"deep": 5, "kept": 2}}, {"name": "three"}],
    }
    assert old["apps"][1]["k"] == {"deep": 1, "kept": 2}


# ---- validity


def test_kubernetes_takes_its_own_kinds(manifests: Manifests) -> None:
    own = [found for found in manifests.objects if found["kind"] != "RayService"]
    assert {found["kind"] for found in own} >= {"StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap"}
    pods = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in manifests.pods]
    for found in (*own, *pods):
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_the_pod_that_fills_the_index_is_valid_and_mounts_its_volume() -> None:
    pod = yaml.safe_load((KUBERAY / "index-pod.yaml").read_text())
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (volume,) = pod["spec"]["volumes"]
    claims = {found["metadata"]["name"] for found in Manifests("gpu-l4").all("PersistentVolumeClaim")}
    assert volume["persistentVolumeClaim"]["claimName"] in claims
    (container,) = pod["spec"]["containers"]
    assert {container["image"]} == _images(Manifests("gpu-l4"))


def test_the_operator_takes_the_rayservice(manifests: Manifests) -> None:
    if not CRD.exists():
        pytest.skip(f"KubeRay's schema is not in {CRD}")
    versions = {version["name"]: version for version in yaml.safe_load(CRD.read_text())["spec"]["versions"]}
    schema = _strict(versions["v1"]["schema"]["openAPIV3Schema"])
    (service,) = manifests.all("RayService")
    validator = jsonschema.Draft202012Validator(schema)
    assert [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(service)] == []
    service = {**service, "spec": {**service["spec"], "serveConfigV3": ""}}
    assert "serveConfigV3" in next(validator.iter_errors(service)).message, "a mistyped key is found"


def _strict(schema: Any) -> Any:
    """Refuses keys that the schema doesn't name, which the API server would drop."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields") and "metadata" not in schema:
        made.setdefault("additionalProperties", False)
    # Of an object's own metadata the schema says nothing.
    if schema.get("type") == "object" and len(schema) == 1:
        made.pop("additionalProperties", None)
    return made


def test_every_image_is_the_overlays(manifests: Manifests) -> None:
    assert _images(manifests) == {f"serve-app:0.1.0-{'cpu' if manifests.overlay == 'cpu' else 'gpu'}"}


def _images(manifests: Manifests) -> set[str]:
    return {container["image"] for pod in manifests.pods for container in pod["spec"]["containers"]}


def test_pods_name_only_config_maps_and_volumes_that_there_are(manifests: Manifests) -> None:
    there = {
        kind: {found["metadata"]["name"] for found in manifests.all(kind)}
        for kind in ("ConfigMap", "PersistentVolumeClaim")
    }
    for pod in manifests.pods:
        for container in pod["spec"]["containers"]:
            assert {source["configMapRef"]["name"] for source in container["envFrom"]} <= there["ConfigMap"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
        claims = [v["persistentVolumeClaim"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
        assert {claim["claimName"] for claim in claims} <= there["PersistentVolumeClaim"]


def test_the_readme_says_how_to_make_every_secret(manifests: Manifests) -> None:
    readme = (ROOT / "cluster" / "README.md").read_text()
    wanted = set(_secrets(manifests.objects))
    assert {name for name, _ in wanted} == {"serve-app-keys", "serve-app-secrets"}
    for name, key in wanted:
        assert f"kubectl create secret generic {name}" in readme
        assert key is None or f"--from-literal={key}=" in readme, (name, key)


def test_the_readme_fills_the_index_before_the_fleet_and_waits_for_its_service() -> None:
    readme = (ROOT / "cluster" / "README.md").read_text()
    steps = (
        "kubectl apply -f cluster/kuberay/components/gpu/volumes.yaml",
        "index-pod.yaml | kubectl apply",
        "serve-app index build",
        "kubectl apply -k",
        "rayservice/serve-app",
        "kubectl port-forward",
        "SERVE_APP_API_KEY=",
    )
    assert [readme.find(step) for step in steps] == sorted(readme.index(step) for step in steps)


def _secrets(value: Any) -> Iterator[tuple[str, str | None]]:
    if isinstance(value, list):
        for part in value:
            yield from _secrets(part)
    elif isinstance(value, dict):
        if "secretKeyRef" in value:
            yield value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]
        if "secretName" in value:
            yield value["secretName"], None
        for part in value.values():
            yield from _secrets(part)


# ---- what is deployed


def test_the_environment_of_serve_env_is_on_every_pod(manifests: Manifests) -> None:
    (found,) = manifests.all("ConfigMap")
    assert found["data"] == {**ENVIRONMENT, **FAST}
    for pod in manifests.pods:
        (container,) = pod["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": found["metadata"]["name"]}}]


def test_the_deployed_config_is_for_a_cluster(config: ConfigFile, manifests: Manifests) -> None:
    assert config.host == "0.0.0.0"
    assert config.port == 8000
    assert config.raw["proxy_location"] == "EveryNode"
    (settings,) = config.gateways.values()
    (rollouts,) = [a for a in config.applications if a["import_path"] == "serve_app.rollout:build"]
    assert settings.rollout == rollouts["name"]
    (redis,) = manifests.all("Service")
    assert rollouts["args"]["store"] == f"redis://{redis['metadata']['name']}:6379/1"
    (recall,) = config.recalls.values()
    assert Path(recall.index).parent == Path("/srv/index")


def test_gpus_fit_the_config(config: ConfigFile, manifests: Manifests) -> None:
    """The models fit their shares of such a card, and there are cards enough."""
    if manifests.overlay == "cpu":
        assert not any(_gpus(group) for group in manifests.workers)
        return
    made = plan(config, CARD_GIB[manifests.overlay])
    assert made.fits, made.table()
    (group,) = [group for group in manifests.workers if _gpus(group)]
    assert group["groupName"] == manifests.overlay.removeprefix("gpu-")
    assert _gpus(group) == 1
    assert group["minReplicas"] >= made.gpus_at_min
    assert group["maxReplicas"] >= made.gpus_at_max


def test_cpus_fit_the_config(config: ConfigFile, manifests: Manifests) -> None:
    cpus = [(group, float(_container(group)["resources"]["requests"]["cpu"])) for group in manifests.workers]
    assert sum(group["minReplicas"] * each for group, each in cpus) >= least_resources(config)["num_cpus"]
    gateways = [d for a in config.applications for d in a.get("deployments", []) if d["name"] == "Gateway"]
    for gateway in gateways:
        # One a pod, so that it takes so many pods.
        most = (gateway.get("autoscaling_config") or {}).get("max_replicas") or gateway["num_replicas"]
        least = (gateway.get("autoscaling_config") or {}).get("min_replicas") or gateway["num_replicas"]
        assert gateway["max_replicas_per_node"] == 1
        (cpu_group,) = [group for group in manifests.workers if group["groupName"] == "cpu"]
        assert cpu_group["maxReplicas"] >= most
        assert cpu_group["minReplicas"] >= least >= 2


def _gpus(group: Object) -> int:
    return int(_container(group)["resources"]["limits"].get("nvidia.com/gpu", 0))


def _container(group: Object) -> Object:
    (container,) = group["template"]["spec"]["containers"]
    found: Object = container
    return found


# ---- promises


def test_the_head_takes_no_load_and_comes_back(manifests: Manifests) -> None:
    assert manifests.head["rayStartParams"]["num-cpus"] == "0"
    assert manifests.service["excludeHeadPodFromServeSvc"] is True
    cluster = manifests.service["rayClusterConfig"]
    (redis,) = manifests.all("Service")
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == f"{redis['metadata']['name']}:6379"
    (store,) = manifests.all("StatefulSet")
    arguments = store["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--appendonly") + 1] == "yes"


def test_workers_stay_for_a_day_when_the_head_is_away(manifests: Manifests) -> None:
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    for group in manifests.workers:
        # By name and value: KubeRay looks at nothing else.
        assert {"name": name, "value": "86400"} in _container(group)["env"]
    assert name not in {variable["name"] for variable in _container(manifests.head)["env"]}


def test_ray_asks_for_a_token_and_scales_nodes(manifests: Manifests) -> None:
    cluster = manifests.service["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    for group in manifests.workers:
        assert 0 < group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


def test_workers_drain_before_they_go(manifests: Manifests, config: ConfigFile) -> None:
    """The drain, and what replicas may take to stop after it, end before Kubernetes kills the pod."""
    (settings,) = config.gateways.values()
    longest_call_s = settings.limits.max_timeout_ms / 1000
    for group in manifests.workers:
        container, spec = _container(group), group["template"]["spec"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["serve-app", "drain"]
        limit_s = float(command[command.index("--limit-s") + 1])
        assert spec["terminationGracePeriodSeconds"] > limit_s + longest_call_s
        assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
    # In a rolling upgrade the old cluster stays for the calls that it has.
    assert manifests.service["upgradeStrategy"] == {"type": "NewCluster"}
    assert manifests.service["rayClusterDeletionDelaySeconds"] > longest_call_s


def test_no_pod_runs_as_root(manifests: Manifests) -> None:
    (redis,) = manifests.all("StatefulSet")
    for pod in (*manifests.pods, redis["spec"]["template"]):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_budget_keeps_a_worker_of_every_group_and_lets_nodes_be_emptied(manifests: Manifests) -> None:
    for group in manifests.workers:
        budgets = [
            b["spec"]
            for b in manifests.all("PodDisruptionBudget")
            if _selects(b["spec"]["selector"], group["template"])
        ]
        (budget,) = budgets
        assert 0 < budget["minAvailable"] < group["minReplicas"]
    assert not any(
        _selects(b["spec"]["selector"], manifests.head["template"]) for b in manifests.all("PodDisruptionBudget")
    )


def test_models_are_kept_and_shared(manifests: Manifests) -> None:
    for group in manifests.workers:
        container = _container(group)
        (cache,) = [e["value"] for e in container["env"] if e["name"] == "HF_HOME"]
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == cache]
        (volume,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == mount["name"]]
        if manifests.overlay == "cpu":
            # Its model is in the image.
            assert volume == {"name": "models", "emptyDir": {}}
            continue
        (claim,) = [
            c
            for c in manifests.all("PersistentVolumeClaim")
            if c["metadata"]["name"] == volume["persistentVolumeClaim"]["claimName"]
        ]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_only_the_gateways_port_is_open(manifests: Manifests) -> None:
    head, *workers = (
        _labelled(pod, node) for pod, node in zip(manifests.pods, ["head", *["worker"] * 9], strict=False)
    )
    (redis,) = (found["spec"]["template"]["metadata"]["labels"] for found in manifests.all("StatefulSet"))
    # As KubeRay's Helm chart and its kustomization label the pod.
    operators = [
        {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "kuberay-operator"}
        for name in ("kuberay-operator", "kuberay")
    ]
    scraped = {"serve-app/scrapes": "true"}

    def open_ports(target: Object, source: Object, namespace: Object | None) -> set[int | float]:
        """`namespace`: labels of the source's; None: the fleet's own. inf: all."""
        return set(_open(manifests.all("NetworkPolicy"), target, source, namespace))

    everything = {math.inf}
    for worker in workers:
        assert open_ports(worker, {}, {}) == {8000}
        assert open_ports(worker, {"app": "other"}, None) == {8000}
        assert open_ports(worker, {}, scraped) == {8000, 8080}
        assert open_ports(worker, head, None) >= everything
        assert open_ports(head, worker, None) == everything
        assert open_ports(redis, worker, None) == {6379}
        # A pod of another namespace with our labels is a stranger.
        assert open_ports(worker, head, {}) == {8000}
    assert open_ports(head, {}, {}) == set()
    for operator in operators:
        assert open_ports(head, operator, {}) == {8265}
        assert open_ports(redis, operator, {}) == set()
    assert open_ports(head, {}, scraped) == {8080}
    assert open_ports(redis, {}, {}) == set()


def _open(
    policies: list[Object], target: Object, source: Object, namespace: Object | None
) -> Iterator[int | float]:
    applying = [p["spec"] for p in policies if _matches(p["spec"]["podSelector"], target)]
    assert applying, "a pod that no policy selects is open to everybody"
    for spec in applying:
        assert spec["policyTypes"] == ["Ingress"]
        for rule in spec["ingress"]:
            if "from" not in rule or any(_is_from(peer, source, namespace) for peer in rule["from"]):
                yield from [port["port"] for port in rule["ports"]] if "ports" in rule else [math.inf]


def _is_from(peer: Object, source: Object, namespace: Object | None) -> bool:
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], namespace or {}):
            return False
    elif namespace is not None:
        return False
    return _matches(peer.get("podSelector", {}), source)


def _matches(selector: Object, labels: Object) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def _selects(selector: Object, pod: Object) -> bool:
    return _matches(selector, pod["metadata"]["labels"])


def _labelled(pod: Object, node_type: str) -> Object:
    """With the label that the operator adds."""
    return {**pod["metadata"]["labels"], "ray.io/node-type": node_type}


def test_what_needs_no_gpu_stays_on_the_group_without_one(manifests: Manifests) -> None:
    """Serve packs, and would move gateways beside a GPU's replicas."""
    given = {group["groupName"]: group["rayStartParams"].get("resources") for group in manifests.workers}
    # As KubeRay hands it to a shell: JSON between quotes of its own.
    assert json.loads(json.loads(given.pop("cpu"))) == {"front": 1000}
    assert not any(given.values())
    asked = {
        (application["name"], deployment["name"]): deployment.get("ray_actor_options", {}).get("resources")
        for application in manifests.config["applications"]
        for deployment in application.get("deployments", [])
    }
    for name in (("gateway", "Gateway"), ("catalogue", "Recall"), ("rollouts", "Rollout")):
        assert asked.pop(name) == {"front": 0.01}
    # Serve takes 1 where the options of an actor don't say, and ours only where there are none.
    for application in manifests.config["applications"]:
        for deployment in application.get("deployments", []):
            assert "num_cpus" in deployment.get("ray_actor_options", {"num_cpus": "ours"}), deployment["name"]
    assert not any(asked.values())
