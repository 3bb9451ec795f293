"""The compose file and the chart name only what exists, and Kubernetes would take what the chart renders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from schemas.config import ENVIRONMENT_PREFIX, WorkerConfig
from schemas.config_file import dotted_keys, load_config
from tests.servers import promtool
from worker.cli.app import app

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "driftkeel"
KUBERNETES = "1.31"
EVERYTHING = {
    "autoscaling": {"enabled": True, "partitions": 6, "authentication": "kafka"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboards": {"enabled": True},
    "secrets": {
        "storeUrl": {"name": "store", "key": "url"},
        "saslPassword": {"name": "kafka", "key": "password"},
        "sentinelPassword": {"name": "sentinel"},
    },
    "config": {"bundle": {"path": "/bundle"}, "kafka": {"assignment": "cooperative-sticky"}},
    "volumes": [{"name": "bundle", "persistentVolumeClaim": {"claimName": "bundle"}}],
    "volumeMounts": [{"name": "bundle", "mountPath": "/bundle", "readOnly": True}],
    "networkPolicy": {
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "storePorts": [6379],
    },
    "imagePullSecrets": [{"name": "registry"}],
    "console": {"enabled": True, "token": {"name": "console"}, "hosts": ["console.example"]},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
}


class Strict(yaml.SafeLoader):
    """Refuses a key that comes twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key comes twice: {keys}"
        return super().construct_mapping(node, deep)


def compose() -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(content, dict)
    return content


def rendered(values: dict[str, Any], name: str = "site", namespace: str = "line-1") -> dict[str, dict[str, Any]]:
    """The chart's manifests by kind, as Helm itself renders them."""
    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(chart.merge_values(values))
        files = chart.render(values, name=name, namespace=namespace)
    manifests = [m for name, text in files.items() if name.endswith(".yaml") for m in yaml.load_all(text, Strict) if m]
    return {_key(manifest): manifest for manifest in manifests}


@pytest.mark.parametrize(
    ("autoscaling", "said"),
    [({"enabled": False}, "2 workers read"), ({"enabled": True, "partitions": 6}, "1 to 6 workers read")],
)
def test_the_notes_say_how_many_workers_there_are(autoscaling: dict[str, Any], said: str) -> None:
    with helm_python.Chart.load(str(CHART)) as chart:
        notes = chart.render({"autoscaling": autoscaling})["driftkeel/templates/NOTES.txt"]
    assert said in notes


def _key(manifest: dict[str, Any]) -> str:
    """The kind, with a word before it where the chart has two of a kind."""
    kind, name = str(manifest["kind"]), str(manifest["metadata"]["name"])
    return "Dashboards" if "dashboards" in name else f"Console{kind}" if name.endswith("-console") else kind


def environment_names(text: str) -> set[str]:
    return set(re.findall(rf"{ENVIRONMENT_PREFIX}\w+", text))


def test_every_variable_in_deploy_is_a_key_of_the_configuration() -> None:
    valid = {ENVIRONMENT_PREFIX + key.upper().replace(".", "__") for key in dotted_keys(WorkerConfig)}
    files = [p for p in DEPLOY.rglob("*") if p.is_file()] + [DEPLOY.parent / "Dockerfile"]
    named = {name for path in files for name in environment_names(path.read_text())}
    assert len(named) > 5
    assert named <= valid


def test_the_compose_file_is_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose()["services"]
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (DEPLOY / source).is_dir()
        assert service["image"] == "driftkeel" or ":" in service["image"]
    for name, value in services["worker"]["environment"].items():
        monkeypatch.setenv(name, str(value))
    config = load_config(None)
    assert config.kafka.bootstrap in services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    script = services["topics"]["command"][0]
    created = dict(re.findall(r"--topic (\S+) --partitions (\d+)", script))
    assert set(created) == set(config.kafka.topics.model_dump().values())
    limits = dict(re.findall(r"--topic (\S+) .*max\.message\.bytes=(\d+)", script))
    assert config.frames.max_bytes < int(limits["frames"]) < int(limits["frames.dlq"])
    assert {"--appendonly", "noeviction"} <= set(services["store"]["command"])


def test_prometheus_and_grafana_find_what_they_need() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (target,) = scrape["scrape_configs"][0]["dns_sd_configs"]
    services = compose()["services"]
    assert target["names"] == ["worker"]
    assert target["port"] == services["worker"]["environment"]["DRIFTKEEL__METRICS__PORT"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "driftkeel.yaml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    mounted = dict(volume.split(":")[1::-1] for volume in services["prometheus"]["volumes"])
    (rules,) = scrape["rule_files"]
    assert list((DEPLOY / mounted["/etc/prometheus"]).glob(rules.removeprefix("/etc/prometheus/")))
    assert scrape["scrape_configs"][0]["job_name"] == "driftkeel"  # as the alerts call it


def test_the_chart_has_the_alerts_and_dashboards_themselves() -> None:
    manifests = rendered(EVERYTHING)
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts" / "driftkeel.yml").read_text())
    *groups, own = manifests["PrometheusRule"]["spec"]["groups"]
    assert {"groups": groups} == alerts
    assert own["name"] == "driftkeel-release"
    boards = {path.name: path.read_text() for path in (DEPLOY / "grafana" / "dashboards").iterdir()}
    assert manifests["Dashboards"]["data"] == boards
    assert manifests["Dashboards"]["metadata"]["labels"]["grafana_dashboard"] == "1"


def jobs(manifests: dict[str, dict[str, Any]]) -> set[str]:
    """What the job of the release's workers is in Prometheus, by the ServiceMonitor."""
    endpoints = manifests["ServiceMonitor"]["spec"]["endpoints"]
    return {r["replacement"] for e in endpoints for r in e["relabelings"] if r.get("targetLabel") == "job"}


def test_every_release_is_a_job_of_its_own_that_the_alerts_know() -> None:
    releases = [("site", "line-1"), ("site", "line-2"), ("other", "line-1")]
    found = [jobs(rendered(EVERYTHING, *release)) for release in releases]
    assert len(set.union(*found)) == len(releases)
    alerts = (DEPLOY / "prometheus" / "alerts" / "driftkeel.yml").read_text()
    asked = set(re.findall(r'job=~"(.*?)"', alerts))
    assert asked
    assert all(re.fullmatch(pattern, job) for pattern in asked for (job,) in found)
    # What the compose file's Prometheus calls it.
    assert all(re.fullmatch(pattern, "driftkeel") for pattern in asked)


@pytest.mark.parametrize(("values", "wanted"), [({"replicas": 3}, 3), ({"autoscaling": {"minReplicas": 2}}, 2)])
def test_a_release_misses_workers_that_prometheus_does_not_know(
    values: dict[str, Any], wanted: int, tmp_path: Path
) -> None:
    scaled = {**EVERYTHING["autoscaling"], "enabled": "autoscaling" in values, **values.get("autoscaling", {})}
    manifests = rendered({**EVERYTHING, **values, "autoscaling": scaled})
    (job,) = jobs(manifests)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(manifests["PrometheusRule"]["spec"]))
    # As many as wanted for 20 minutes, then one less, which has no target any more; and enough of another release.
    series = [{"series": f'up{{job="{job}",instance="0"}}', "values": "1x20 _x40"}]
    series += [{"series": f'up{{job="{job}",instance="{i}"}}', "values": "1x60"} for i in range(1, wanted)]
    series += [{"series": f'up{{job="driftkeel/line-2/site",instance="{i}"}}', "values": "1x60"} for i in range(4)]
    rule = manifests["PrometheusRule"]["spec"]["groups"][-1]["rules"][0]
    name, notes = rule["alert"], rule["annotations"]
    assert name in (DEPLOY.parent / notes["runbook"]).read_text()
    firing = {
        "exp_labels": {"severity": "warning", "job": job},
        "exp_annotations": {**notes, "summary": notes["summary"].replace("{{ $value }}", str(wanted - 1))},
    }
    cases = [
        {"eval_time": "19m", "alertname": name, "exp_alerts": []},
        {"eval_time": "45m", "alertname": name, "exp_alerts": [firing]},
    ]
    tests = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": cases}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", tmp_path / "test.yml")


def test_alerts_link_their_runbooks_once_somebody_says_where_they_are() -> None:
    def alerts(**given: str) -> list[dict[str, Any]]:
        manifests = rendered({**EVERYTHING, "prometheusRule": {"enabled": True, **given}})
        groups = manifests["PrometheusRule"]["spec"]["groups"]
        return [rule for group in groups for rule in group["rules"] if "alert" in rule]

    plain = alerts()
    assert len(plain) > 20
    assert plain[-1]["alert"] == "DriftkeelTooFewWorkers"  # of the chart alone
    linked = alerts(runbookUrl="https://docs.example.com/$1/NAME/?a=1&b='\"#x")
    for rule, same in zip(linked, plain, strict=True):
        name = Path(rule["annotations"]["runbook"]).stem
        assert rule["annotations"].pop("runbook_url") == f"https://docs.example.com/$1/{name}/?a=1&b='\"#x"
        assert rule == same


def test_a_pod_whose_image_is_still_pulled_is_no_target() -> None:
    """It has an address, which nobody answers at yet."""
    (endpoint,) = rendered(EVERYTHING)["ServiceMonitor"]["spec"]["endpoints"]
    dropped = [r for r in endpoint["relabelings"] if r.get("action") == "drop"]
    assert dropped == [{"sourceLabels": ["__meta_kubernetes_pod_phase"], "regex": "Pending", "action": "drop"}]


def test_without_a_service_monitor_the_chart_does_not_know_the_job() -> None:
    manifests = rendered({"prometheusRule": {"enabled": True}})
    names = [group["name"] for group in manifests["PrometheusRule"]["spec"]["groups"]]
    assert "driftkeel-release" not in names


@pytest.mark.parametrize("values", [{}, EVERYTHING, {"networkPolicy": {"enabled": False}}])
def test_kubernetes_takes_what_the_chart_renders(values: dict[str, Any]) -> None:
    manifests = rendered(values)
    for kind, manifest in manifests.items():
        if kind not in ("ScaledObject", "ServiceMonitor", "PrometheusRule"):  # of KEDA and the Prometheus operator
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    expected = {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount"}
    if values == EVERYTHING:
        expected |= {"ScaledObject", "ServiceMonitor", "PrometheusRule", "Dashboards"}
        expected |= {"ConsoleDeployment", "ConsoleService", "ConsoleNetworkPolicy"}
    if values.get("networkPolicy", {}).get("enabled") is False:
        expected -= {"NetworkPolicy"}
    assert set(manifests) == expected


@pytest.mark.parametrize("values", [{}, EVERYTHING])
def test_a_worker_takes_the_chart_s_configuration(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = rendered(values)
    path = tmp_path / "worker.yaml"
    path.write_text(manifests["ConfigMap"]["data"]["worker.yaml"])
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "redis://from-a-secret:6379/0"))
    config = load_config(path)
    assert config.metrics.port == container["ports"][0]["containerPort"]
    assert config.metrics.host == "0.0.0.0"
    (command,) = container["args"]
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    if values:
        scaled = manifests["ScaledObject"]["spec"]
        assert scaled["maxReplicaCount"] == 6
        (trigger,) = scaled["triggers"]
        assert trigger["metadata"]["topic"] == config.kafka.topics.frames
        assert trigger["metadata"]["consumerGroup"] == config.kafka.group
        assert trigger["metadata"]["bootstrapServers"] == config.kafka.bootstrap
        # Twice what a worker of a hundred frames a second may hold: keeping up is no reason for more workers.
        assert int(trigger["metadata"]["lagThreshold"]) >= 100 * 2 * config.batch.max_hold_ms / 1000
        assert "replicas" not in manifests["Deployment"]["spec"]
        env = {v["name"]: v.get("valueFrom") for v in container["env"]}
        assert env["DRIFTKEEL__STORE__URL"] == {"secretKeyRef": {"name": "store", "key": "url"}}
        password = {"secretKeyRef": {"name": "sentinel", "key": "password"}}
        assert env["DRIFTKEEL__STORE__SENTINEL_PASSWORD"] == password


def test_every_command_in_a_pod_takes_the_worker_s_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kubectl exec ... -- driftkeel doctor`, as the notes say; so does the worker itself."""
    manifests = rendered(EVERYTHING)
    (content,) = manifests["ConfigMap"]["data"].items()
    for kind in ("Deployment", "ConsoleDeployment"):
        (container,) = manifests[kind]["spec"]["template"]["spec"]["containers"]
        (given,) = [v["value"] for v in container["env"] if v["name"] == "DRIFTKEEL_CONFIG"]
        (folder,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "config"]
        assert given == f"{folder}/{content[0]}"
    (tmp_path / content[0]).write_text(content[1].replace("group: driftkeel", "group: of-the-file"))
    monkeypatch.setenv("DRIFTKEEL_CONFIG", str(tmp_path / content[0]))
    assert "group: of-the-file" in CliRunner().invoke(app, ["config"]).stdout


def test_a_probe_s_time_out_may_be_changed() -> None:
    probes = {"liveness": {"timeoutSeconds": 9}, "readiness": {"timeoutSeconds": 8}}
    (container,) = rendered({"probes": probes})["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert (container["livenessProbe"]["timeoutSeconds"], container["livenessProbe"]["periodSeconds"]) == (9, 10)
    assert container["readinessProbe"]["timeoutSeconds"] == 8


def test_pods_go_one_at_a_time_or_all_together() -> None:
    one_at_a_time = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    assert rendered({})["Deployment"]["spec"]["strategy"] == one_at_a_time
    # Kubernetes refuses it beside what RollingUpdate takes.
    assert rendered({"strategy": {"type": "Recreate"}})["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    assert rendered({})["PodDisruptionBudget"]["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize(
    ("bootstrap", "url", "listed", "expected"),
    [
        ("kafka:9092", "redis://store:6379/0", {}, {9092, 6379}),
        # As docs/secure.md has them, and brokers that tell clients of other ports.
        ("kafka-1:9093", "rediss://store-1:6380/0", {"kafkaPorts": [9094]}, {9093, 9094, 6380}),
        ("a:9092,b:9093", "redis+cluster://u:p:1@x:7000,y:7001,z", {}, {9092, 9093, 7000, 7001, 6379}),
        ("[fe80::1]:9092", "redis://store", {}, {9092, 6379}),
        ("kafka:9092", "redis+sentinel://a:5000,b/service/0", {"storePorts": [6379]}, {9092, 5000, 26379, 6379}),
        ("kafka:9092", "unix:///run/redis.sock", {}, {9092}),
    ],
)
def test_workers_reach_the_ports_that_they_are_sent_to(
    bootstrap: str, url: str, listed: dict[str, list[int]], expected: set[int]
) -> None:
    console = {"enabled": True, "token": {"name": "console"}}
    given = {
        "config": {"kafka": {"bootstrap": bootstrap}},
        "storeUrl": url,
        "networkPolicy": listed,
        "console": console,
    }
    manifests = rendered(given)
    metrics = manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    for policy, further in (("NetworkPolicy", set()), ("ConsoleNetworkPolicy", {metrics})):
        rules = manifests[policy]["spec"]["egress"]
        assert {port["port"] for rule in rules for port in rule["ports"]} == expected | further | {53}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"secrets": {"storeUrl": {"name": "store"}}}, "networkPolicy.storePorts"),
        ({"storeUrl": "redis+sentinel://a:26379/service/0"}, "networkPolicy.storePorts"),
        ({"serviceMonitor": {"enabled": True}}, "networkPolicy.metricsFrom"),
    ],
)
def test_the_chart_asks_for_what_its_network_policy_must_know(values: dict[str, Any], key: str) -> None:
    with pytest.raises(helm_python.HelmError, match=key):
        rendered(values)
    rendered({**values, "networkPolicy": {"enabled": False}})


def test_the_chart_refuses_one_group_member_for_all_pods() -> None:
    with pytest.raises(helm_python.HelmError, match=r"config\.kafka\.static_member: leave it out; all pods have this"):
        rendered({"config": {"kafka": {"static_member": "worker-1"}}})
    assert "ConfigMap" in rendered({"config": {"kafka": {"static_member": None}}})


def test_the_chart_refuses_what_it_does_not_know() -> None:
    for values in (
        {"replica": 3},
        {"config": {"store": {"url": "redis://x"}}},
        {"terminationGracePeriodSeconds": 5},
        {"strategy": {"type": "recreate"}},
        {"autoscaling": {"lagThreshold": 0}},
        {"autoscaling": {"enabled": True, "minReplica": 4}},
        {"autoscaling": {"enabled": True, "partitions": 4, "minReplicas": 5}},
        {"secrets": {"storeUrl": {"nme": "store"}}},
        {"serviceMonitor": {"enable": True}},
        {"networkPolicy": {"metricFrom": []}},
        {"podDisruptionBudget": {"minAvailable": 1}},
        {"podDisruptionBudget": {"maxUnavailable": "some"}},
        {"console": {"enabled": True, "token": {"name": ""}}},
        {"prometheusRule": {"enabled": "false"}},
        {"prometheusRule": {"runbookUrl": "https://docs.example.com/runbooks"}},
        {"probes": {"liveness": {"timeout": 5}}},
        {"image": {"tag": 20261130}},
        {"config": {"metrics": {"host": "127.0.0.1"}}},
        {"config": {"metrics": {"port": 0}}},
    ):
        with pytest.raises(helm_python.HelmError):
            rendered(values)


def test_helm_s_own_linter_is_content() -> None:
    findings = helm_python.lint(str(CHART))
    assert findings["errors"] == []
    assert all(message["severity"] <= 1 for message in findings["messages"]), findings  # an icon is recommended
