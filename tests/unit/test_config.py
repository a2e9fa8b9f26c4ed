"""Configuration: every file in configs/ is valid, and what is wrong in a file is said with its place."""

import copy
import textwrap
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve_app.autoscaling.scenario import read
from serve_app.config import GatewaySettings, RerankerArgs, explain
from serve_app.configfile import ConfigError, load
from serve_app.launch import ENVIRONMENT, FAST, _print_ready, least_resources
from serve_app.plan import plan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid(path):
    config = load(path)
    assert config.gateways
    assert config.rerankers


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_cpus_compute_in_what_they_are_fast_in(path):
    """bfloat16 takes six times as long on a CPU that has none."""
    config = load(path)
    for application in config.applications:
        if application["name"] in config.rerankers and not any(
            "num_gpus" in deployment.get("ray_actor_options", {}) for deployment in application["deployments"]
        ):
            assert "dtype" not in config.rerankers[application["name"]].engine


def test_clusters_get_the_environment_that_serve_app_up_sets():
    lines = (CONFIGS / "serve.env").read_text().splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == {
        **ENVIRONMENT,
        **FAST,
    }


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("10.0.0.7", "10.0.0.7")],
)
def test_what_up_says_it_is_ready_on_is_a_url(host, shown, capsys):
    _print_ready(load(CONFIGS / "local.yaml"), host, 8000)
    said = capsys.readouterr().out
    assert said.startswith(
        f"serve-app: ready on http://{shown}:8000 — try: curl -s http://{shown}:8000/v1/search "
    )


@pytest.fixture
def fleet():
    return yaml.safe_load((CONFIGS / "fleet.yaml").read_text())


def problems_of(raw, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


def application(raw, name):
    return next(a for a in raw["applications"] if a["name"] == name)


def test_a_pipeline_that_names_an_unknown_variant_says_where(fleet, tmp_path):
    user_config = application(fleet, "gateway")["deployments"][0]["user_config"]
    user_config["pipelines"]["cascade"]["stages"][1]["variant"] = "qwen3-4B"
    message = problems_of(fleet, tmp_path)
    assert "pipelines.cascade.stages[1].variant is 'qwen3-4B'" in message
    assert "did you mean 'qwen3-4b'?" in message


def test_a_variant_without_an_application_is_found(fleet, tmp_path):
    fleet["applications"] = [a for a in fleet["applications"] if a["name"] != "qwen3-8b"]
    assert "variants names 'qwen3-8b', but no application" in problems_of(fleet, tmp_path)


def test_what_the_scaling_policy_does_not_know_is_found_before_the_controller_makes_it(fleet, tmp_path):
    reranker = application(fleet, "qwen3-0.6b")["deployments"][0]["autoscaling_config"]
    reranker["policy"] = {
        "policy_function": "serve_app.autoscaling:DrainTime",
        "policy_kwargs": {"target_drain": 2, "max_utilization": 80},
    }
    reranker["upscaling_factor"] = 2
    gateway = application(fleet, "gateway")["deployments"][0]["autoscaling_config"]
    gateway["policy"] = {"policy_function": "serve_app.autoscaling:DrainTime"}
    message = problems_of(fleet, tmp_path)
    assert "policy_kwargs.target_drain is no setting of" in message
    assert "did you mean 'target_drain_s'?" in message
    assert "policy_kwargs.max_utilization is 80; allowed: a number above 0, up to 1" in message
    assert "Reranker.autoscaling_config.upscaling_factor is 2; allowed" in message
    assert "but Gateway does not report its load; only Reranker does" in message
    reranker["policy"] = {"policy_function": "serve_app.autoscaling:DrainTime", "kwargs": {}}
    assert "policy.kwargs is no setting of Serve's" in problems_of(fleet, tmp_path)
    reranker["policy"] = {"policy_function": "serve_app.autoscaling:DrainTimes"}
    assert "ours: serve_app.autoscaling:DrainTime" in problems_of(fleet, tmp_path)


def test_an_application_s_policy_is_none_of_ours(fleet, tmp_path):
    application(fleet, "qwen3-4b")["autoscaling_policy"] = {"policy_function": "serve_app.autoscaling:DrainTime"}
    message = problems_of(fleet, tmp_path)
    assert "applications[3].autoscaling_policy.policy_function is 'serve_app.autoscaling:DrainTime'" in message
    assert "it belongs under deployments[].autoscaling_config.policy" in message


@pytest.mark.parametrize(
    "name",
    ["downscaling_factor", "smoothing_factor", "upscale_smoothing_factor", "downscale_smoothing_factor"],
)
def test_factors_that_serve_multiplies_by_are_refused_by_all_their_names(fleet, tmp_path, name):
    scaling = application(fleet, "qwen3-0.6b")["deployments"][0]["autoscaling_config"]
    scaling |= {name: 0.5, "policy": {"policy_function": "serve_app.autoscaling:DrainTime"}}
    assert f"Reranker.autoscaling_config.{name} is 0.5; allowed" in problems_of(fleet, tmp_path)


def test_auto_replicas_have_serves_own_bounds_for_them(fleet, tmp_path):
    deployment = application(fleet, "qwen3-4b")["deployments"][0]
    path = tmp_path / "config.yaml"
    deployment |= {"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2, "upscale_delay_s": 3}}
    path.write_text(yaml.safe_dump(fleet))
    assert plan(load(path), 80).variants[1].max_replicas == 100
    scaling = {"min_replicas": 2, "max_replicas": 100, "upscale_delay_s": 3}
    assert read(path, "qwen3-4b").scaling == scaling
    del deployment["autoscaling_config"]
    path.write_text(yaml.safe_dump(fleet))
    assert read(path, "qwen3-4b").scaling == {"min_replicas": 1, "max_replicas": 100}
    assert least_resources(load(path)) == {"num_cpus": 2 + 2 + 3 * 2, "num_gpus": 1.75}
    deployment["num_replicas"] = 2
    path.write_text(yaml.safe_dump(fleet))
    with pytest.raises(ConfigError, match="has no autoscaling_config, so there is nothing to simulate"):
        read(path, "qwen3-4b")


@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder"])
def test_an_instruction_that_the_variant_would_not_read_is_refused(fleet, tmp_path, kind):
    application(fleet, "qwen3-4b")["args"]["kind"] = kind
    message = problems_of(fleet, tmp_path)
    assert "Gateway.user_config.pipelines.code.stages[0].instruction is set, but qwen3-4b is of" in message
    assert f"of kind {kind}, which takes none (only qwen3-reranker does)" in message


def test_every_problem_of_a_file_is_listed(fleet, tmp_path):
    application(fleet, "qwen3-4b")["args"]["modell"] = application(fleet, "qwen3-4b")["args"].pop("model")
    application(fleet, "qwen3-8b")["args"]["kind"] = "qwen"
    application(fleet, "qwen3-0.6b")["deployments"][0]["name"] = "Rerankers"
    application(fleet, "qwen3-0.6b")["args"]["engine"] = {"max_model_length": 512}
    application(fleet, "catalogue")["import_path"] = "serve_app.recal:build"
    message = problems_of(fleet, tmp_path)
    assert "applications[3].args.model" in message
    assert "applications[3].args.modell" in message
    assert "applications[4].args.kind" in message
    assert "'Rerankers'" in message
    assert "applications[2].args.engine.max_model_length is no vLLM engine argument" in message
    assert "did you mean 'max_model_len'?" in message
    assert "did you mean 'serve_app.recall:build'?" in message


def test_a_gateway_without_settings_is_refused(fleet, tmp_path):
    del application(fleet, "gateway")["deployments"][0]["user_config"]
    assert "has no user_config" in problems_of(fleet, tmp_path)


def test_settings_that_serve_would_ignore_or_refuse_later_are_found(fleet, tmp_path):
    fleet["http_options"]["port"] = 99999
    deployment = application(fleet, "qwen3-8b")["deployments"][0]
    deployment["ray_actor_options"] = {"num_gpu": 1}
    deployment["autoscaling_config"] = {"min_replicas": 5, "max_replicas": 2, "min_replica": 1}
    deployment["max_ongoing_request"] = 3
    message = problems_of(fleet, tmp_path)
    assert "port is 99999; allowed: 1 to 65535" in message
    assert "ray_actor_options.num_gpu is no setting of Serve's; did you mean 'num_gpus'?" in message
    assert "autoscaling_config.min_replica is no setting" in message
    assert "did you mean 'max_ongoing_requests'?" in message
    assert "deployments[0].autoscaling_config: " in message


def test_a_policy_that_is_no_mapping_is_one_problem(fleet, tmp_path):
    scaling = application(fleet, "qwen3-0.6b")["deployments"][0]["autoscaling_config"]
    scaling["policy"] = "serve_app.autoscaling:DrainTime"
    problem = problems_of(fleet, tmp_path)
    assert problem.startswith("applications[2].deployments[0].autoscaling_config.policy: Input should be")
    assert "\n" not in problem


def test_a_mistyped_setting_of_grpc_is_found(fleet, tmp_path):
    fleet["grpc_options"] = {"prot": 9000}
    said = "config.grpc_options.prot is no setting of Serve's; did you mean 'port'?"
    assert problems_of(fleet, tmp_path) == said


@pytest.mark.parametrize("prompt", ["{yes: 'true', no: 'false'}", "{'yes': true, 'no': false}", "{no: no}"])
def test_yes_and_no_without_quotes_are_named(fleet, tmp_path, prompt):
    application(fleet, "qwen3-8b")["args"]["prompt"] = yaml.safe_load(prompt)
    said = 'applications[4].args.prompt: yes and no need quotes in YAML: {"yes": "true", "no": "false"}'
    assert problems_of(fleet, tmp_path) == said


def test_yes_and_no_in_quotes_are_words():
    prompt = yaml.safe_load('{"yes": "true", "no": "false"}')
    args = RerankerArgs.model_validate({"model": "m", "kind": "qwen3-reranker", "prompt": prompt})
    assert (args.prompt.yes, args.prompt.no) == ("true", "false")


def test_numbers_in_quotes_are_what_serve_takes_them_for(fleet, tmp_path):
    fleet["http_options"]["port"] = "8010"
    deployment = application(fleet, "qwen3-4b")["deployments"][0]
    deployment["ray_actor_options"] = {"num_gpus": "0.25", "num_cpus": "2"}
    scaling = deployment["autoscaling_config"] = {"min_replicas": 2.0, "max_replicas": "4"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fleet))
    config = load(path)
    assert config.port == 8010
    assert least_resources(config) == {"num_cpus": 2 + 2 + 4 * 2, "num_gpus": 0.25 + 2 * 0.25 + 1}
    assert plan(config, 80).variants[1].max_replicas == 4
    assert read(path, "qwen3-4b").scaled(2).scaling["max_replicas"] == 8
    scaling |= {"upscaling_factor": "2", "policy": {"policy_function": "serve_app.autoscaling:DrainTime"}}
    fleet["http_options"]["port"] = "99999"
    assert "port is 99999; allowed: 1 to 65535" in problems_of(fleet, tmp_path)
    fleet["http_options"]["port"] = "8010"
    assert "upscaling_factor is 2; allowed with serve_app" in problems_of(fleet, tmp_path)


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text((CONFIGS / "local.yaml").read_text() + "\napplications: []\n")
    with pytest.raises(ConfigError, match="the key 'applications' stands twice"):
        load(path)


def test_an_application_without_a_name_has_serves_default(tmp_path):
    path = tmp_path / "config.yaml"
    text = (CONFIGS / "local.yaml").read_text()
    path.write_text(text.replace("- name: gateway\n  import_path", "- import_path"))
    assert set(load(path).gateways) == {"default"}


def test_user_config_is_the_gateways_only(fleet, tmp_path):
    application(fleet, "qwen3-8b")["deployments"][0]["user_config"] = {"a": 1}
    assert "Reranker.user_config is set, but Reranker takes none" in problems_of(fleet, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [", "config.yaml:1: is not valid YAML"),
        ("- a\n- b\n", "is not a Serve config file"),
        ("applications:\n- name: a\n", "config.applications.0.import_path"),
    ],
)
def test_files_that_serve_itself_would_refuse_are_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "nope.yaml")


SETTINGS = {
    "variants": {"a": {}},
    "pipelines": {"p": {"recall_k": 50, "stages": [{"variant": "a", "keep": 10}]}},
    "routes": {"default": {"weights": {"p": 1}}},
}


def refused(change):
    settings = copy.deepcopy(SETTINGS)
    change(settings)
    with pytest.raises(ValidationError) as caught:
        GatewaySettings.model_validate(settings)
    return explain(caught.value, "user_config")


def test_keep_may_not_grow_along_a_pipeline():
    message = refused(lambda s: s["pipelines"]["p"]["stages"].append({"variant": "a", "keep": 20}))
    assert "pipelines.p: stages[1].keep is 20, but stages[0] keeps 10" in message
    message = refused(lambda s: s["pipelines"]["p"]["stages"][0].update(keep=51))
    assert "stages[0].keep is 51, but recall_k is 50" in message


def test_weights_must_name_pipelines_and_not_all_be_zero():
    assert "'q', which is not under pipelines" in refused(lambda s: s["routes"]["default"]["weights"].update(q=1))
    assert "all weights are 0" in refused(lambda s: s["routes"]["default"].update(weights={"p": 0}))
    assert "weights.p" in refused(lambda s: s["routes"]["default"].update(weights={"p": -1}))


def test_a_name_stands_for_one_thing():
    assert "pipelines.default has the name of routes.default" in refused(
        lambda s: s["pipelines"].update(default={})
    )


def test_routes_alone_may_be_called_as_models_on_the_hub_are():
    route = {"weights": {"p": 1}}
    for name in ("Qwen/Qwen3-Reranker-0.6B", "a/b/c", "n" * 128):
        settings = {"pipelines": {"p": {}}, "routes": {name: route}}
        assert GatewaySettings.model_validate(settings).default_route == name
    for name in ("/a", "a/", "a//b", "a/../b", "a b", "", "n" * 129):
        assert f"routes.{name}" in refused(lambda s, name=name: s["routes"].update({name: route}))
    assert "pipelines.a/b" in refused(lambda s: s["pipelines"].update({"a/b": {}}))
    assert "variants.a/b" in refused(lambda s: s.update(variants={"a/b": {}}))


def test_limits_hold_for_the_settings_themselves():
    assert "limits.max_recall_k is 20" in refused(lambda s: s.update(limits={"max_recall_k": 20}))
    assert "limits.max_timeout_ms is 100" in refused(lambda s: s.update(limits={"max_timeout_ms": 100}))


def test_settings_of_another_kind_are_refused():
    with pytest.raises(ValidationError, match="instruction is set, but kind bi-encoder takes none"):
        RerankerArgs(model="m", kind="bi-encoder", instruction="i")
    with pytest.raises(ValidationError, match="query_prefix is set, but kind cross-encoder takes none"):
        RerankerArgs(model="m", kind="cross-encoder", query_prefix="query: ")


def test_the_least_resources_of_a_file_are_counted_over_replicas(fleet, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fleet))
    assert least_resources(load(path)) == {"num_cpus": 2 + 2 + 3 * 2, "num_gpus": 1.75}
    application(fleet, "qwen3-4b")["deployments"][0]["autoscaling_config"]["min_replicas"] = 3
    del application(fleet, "qwen3-0.6b")["deployments"]
    path.write_text(yaml.safe_dump(fleet))
    assert least_resources(load(path)) == {"num_cpus": 2 + 2 + 1 + 3 * 2 + 2, "num_gpus": 2.5}
