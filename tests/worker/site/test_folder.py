"""What `driftkeel init` writes is what a worker reads, and what the repository's own files say."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from schemas.config import WorkerConfig
from schemas.config_file import load_config
from schemas.errors import ConfigError
from worker.site.folder import EXAMPLE_BUNDLE, local_services, shipped, site_compose, write_site


def test_the_configuration_is_the_defaults_and_what_was_asked_for(tmp_path: Path) -> None:
    written = write_site(tmp_path / "site", "kafka-1:9092,kafka-2:9092", "rediss://u:p@store:6380/1", None)
    assert all(path.exists() for path in written)
    config = load_config(tmp_path / "site" / "driftkeel.yaml")
    assert config.kafka.bootstrap == "kafka-1:9092,kafka-2:9092"
    assert config.store.url.get_secret_value() == "rediss://u:p@store:6380/1"
    assert (tmp_path / "site" / config.bundle.path / "manifest.json").is_file()
    plain = load_config(None)
    assert config.threads == 1  # a worker for every processor, as the compose file and the chart have it
    same = {"worker", "kafka", "store", "threads"}
    assert config.model_dump(exclude=same) == plain.model_dump(exclude=same)
    assert config.kafka.model_copy(update={"bootstrap": plain.kafka.bootstrap}) == plain.kafka
    assert config.worker == plain.worker  # made at start: workers that share the file do not share a name
    text = (tmp_path / "site" / "driftkeel.yaml").read_text()
    assert text.count("#") > 50


def test_the_bundle_comes_along(tmp_path: Path, tiny_bundle_path: Path) -> None:
    write_site(tmp_path / "site", None, None, tiny_bundle_path)
    config = load_config(tmp_path / "site" / "driftkeel.yaml")
    copies = {p.name: p.read_bytes() for p in (tmp_path / "site" / config.bundle.path).iterdir()}
    assert copies == {p.name: p.read_bytes() for p in tiny_bundle_path.iterdir()}


def test_code_is_allowed_where_it_is_named(tmp_path: Path, tiny_bundle_path: Path) -> None:
    shutil.copytree(tiny_bundle_path, tmp_path / "mine")
    manifest = tmp_path / "mine" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"groupnorm-cnn"', '"my_net:build"'))
    write_site(tmp_path / "site", None, None, tmp_path / "mine", tmp_path)
    config = load_config(tmp_path / "site" / "driftkeel.yaml")
    assert (config.bundle.factories, config.bundle.code) == (("my_net:build",), tmp_path)
    write_site(tmp_path / "plain", None, None, tmp_path / "mine")
    assert load_config(tmp_path / "plain" / "driftkeel.yaml").bundle.factories == ()
    with pytest.raises(ConfigError, match="is built in; leave --code out"):
        write_site(tmp_path / "other", None, None, tiny_bundle_path, tmp_path)


def test_the_compose_file_is_the_repository_s_but_for_the_site_s_files(tmp_path: Path) -> None:
    ours = yaml.safe_load(site_compose())
    theirs = yaml.safe_load(shipped("deploy/compose.yaml").read_text())
    mounts: list[str] = []
    for name in ("worker", "console"):
        service = ours["services"][name]
        assert service.pop("command") == [name, "--config", "/site/driftkeel.yaml"]
        assert service.pop("working_dir") == "/site"
        mounts += service.pop("volumes")
    del theirs["services"]["console"]["command"]
    assert theirs["services"]["worker"].pop("build") == {"context": ".."}
    del theirs["services"]["worker"]["environment"]["DRIFTKEEL__THREADS"]
    assert ours == theirs
    write_site(tmp_path, None, None, None)
    relative = [v for service in ours["services"].values() for v in service.get("volumes", []) if v.startswith("./")]
    assert len(relative) >= 3
    assert all((tmp_path / mount.split(":")[0]).exists() for mount in [*relative, *mounts])
    # A variable of the image or of the compose file would silently go before the mounted configuration.
    image = (Path(__file__).parents[3] / "Dockerfile").read_text()
    assert "DRIFTKEEL__BUNDLE__" not in image + site_compose()
    assert re.search(rf"COPY {EXAMPLE_BUNDLE} /opt/{EXAMPLE_BUNDLE}\n", image)
    assert re.search(r"(?m)^WORKDIR /opt$", image)


@pytest.mark.parametrize("bootstrap", [None, "k:9092"])
@pytest.mark.parametrize("store", [None, "redis://s:6379/0"])
def test_the_compose_file_runs_the_site_that_was_asked_for(
    bootstrap: str | None, store: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_site(tmp_path, bootstrap, store, None)
    site = tmp_path / "driftkeel.yaml"
    assert yaml.safe_load(site.read_text())["threads"] == 1  # as the compose file of the repository has it
    site.write_text(site.read_text().replace("threads: 1", "threads: 4").replace("format: auto", "format: text"))
    content = yaml.safe_load((tmp_path / "compose.yaml").read_text())
    services = content["services"]
    expected = {"worker", "console", "prometheus", "grafana"}
    expected |= set() if bootstrap else {"kafka", "topics"}
    expected |= set() if store else {"store"}
    assert set(services) == expected
    for name in ("worker", "console"):
        with monkeypatch.context() as environment:
            for variable, value in services[name]["environment"].items():
                environment.setenv(variable, "x" * 16 if "TOKEN" in variable else str(value))
            config = load_config(site)
        assert (config.threads, config.log.format) == (4, "text")  # what the file says holds
        assert config.kafka.bootstrap == (bootstrap or "kafka:19092")
        assert config.store.url.get_secret_value() == (store or "redis://store:6379/0")
    used = set()
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        assert service.get("depends_on", True)
        used |= {source for v in service.get("volumes", ()) if not (source := v.split(":")[0]).startswith(".")}
    assert set(content["volumes"]) == used
    head = (tmp_path / "compose.yaml").read_text().split("name:")[0]
    assert ("9092" in head, "broker" in head, "store" in head) == (bootstrap is None, bootstrap is None, store is None)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"compose.yaml exists already; name another folder"):
        write_site(tmp_path, None, None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["compose.yaml"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^store\.url: scheme 'http' is not one of redis"):
        write_site(tmp_path / "a", None, "http://store", None)
    with pytest.raises(ConfigError, match=r"is no bundle: it has no manifest.json"):
        write_site(tmp_path / "b", None, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_local_services_are_local_and_disturb_nobody(bootstrap: str) -> None:
    config = WorkerConfig()
    elsewhere = config.model_copy(update={"kafka": config.kafka.model_copy(update={"bootstrap": "kafka-1:9092"})})
    taken = config.model_copy(update={"kafka": config.kafka.model_copy(update={"bootstrap": bootstrap})})
    with socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{outgoing.getsockname()[1]}"
        in_use = config.model_copy(update={"kafka": config.kafka.model_copy(update={"bootstrap": address})})
        with pytest.raises(ConfigError, match="cannot be had: Address already in use"), local_services(in_use):
            pass
    for wrong, message in ((elsewhere, "a local one needs 127.0.0.1:PORT"), (taken, "something listens on port")):
        with pytest.raises(ConfigError, match=message), local_services(wrong):
            pass
