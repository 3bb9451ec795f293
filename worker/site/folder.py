"""The files that an installation carries besides code, and the folder that `driftkeel init` makes of them."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from meta.bundle_folder import read_manifest
from schemas.config import WorkerConfig
from schemas.errors import ConfigError, DriftkeelError, mistakes
from worker.embedded import embedded_services
from worker.kafka.client import create_topics

EXAMPLE_BUNDLE = "bundles/fashion-mnist"
LOCAL_PARTITIONS = 4
LOOPBACK = ("127.0.0.1", "localhost")
_IMAGE_IS_BUILT = "    build: {context: ..}\n"
_CONSOLE = '    command: ["console"]\n'
_FILE_SAYS = "      DRIFTKEEL__THREADS: 1\n"
_ON_THE_SITE = """\
    command: ["{command}", "--config", "/site/driftkeel.yaml"]
    working_dir: /site
    volumes:
      - ./driftkeel.yaml:/site/driftkeel.yaml:ro
      - ./bundles:/site/bundles:ro
"""
# How the compose file mentions its own broker and store: services, variable with the address, words of its header.
_FRAMES = "Frames go to 127.0.0.1:9092, topic `frames`; "
_BROKER = (("kafka", "topics"), "DRIFTKEEL__KAFKA__BOOTSTRAP", ("broker, ", _FRAMES))
_STORE = (("store",), "DRIFTKEEL__STORE__URL", ("store, ",))


def shipped(name: str) -> Path:
    """A file or folder of the repository, or its copy in the installed package. Raises DriftkeelError."""
    for root in (Path(__file__).parents[1] / "shipped", Path(__file__).parents[2]):
        if (root / name).exists():
            return root / name
    raise DriftkeelError(f"this installation lacks {name}; install driftkeel again")


def site_config(changes: dict[str, Any]) -> str:
    """The example configuration, with every option explained, adjusted to a site. Raises ConfigError.

    `changes` are values by the last part of their keys.
    """
    text = shipped("driftkeel.example.yaml").read_text(encoding="utf-8")
    # Workers that share this file need different names: leave it to the default, which is unique.
    text = text.replace("\nworker: ", "\n# worker: ", 1)
    # A site runs a worker for every processor rather than several passes in one (docs/performance.md).
    text = text.replace("\nthreads: 0 ", "\nthreads: 1 ", 1)
    for key, value in changes.items():
        quoted = json.dumps(value).replace("\\", r"\\")
        text = re.sub(rf"(?m)^(  {key}: )\S+", rf"\g<1>{quoted}", text, count=1)
    try:
        WorkerConfig(**yaml.safe_load(text))  # A value in `changes` may be wrong.
    except ValidationError as error:
        raise ConfigError("; ".join(f"{where}: {words}" for where, words in mistakes(error))) from error
    return text


def site_compose(own_broker: bool = False, own_store: bool = False) -> str:
    """The repository's compose file for the site's configuration and bundles, with an image that is built already.

    Without its broker or store if the site has its own, and without their variables, which would override the
    configuration.
    """
    text = shipped("deploy/compose.yaml").read_text(encoding="utf-8")
    text = text.replace("-f deploy/compose.yaml up --build", "up")
    text = text.replace(_FILE_SAYS, "")
    text = text.replace(_IMAGE_IS_BUILT, _ON_THE_SITE.format(command="worker"))
    text = text.replace(_CONSOLE, _ON_THE_SITE.format(command="console"))
    for services, variable, words in [_BROKER] * own_broker + [_STORE] * own_store:
        text = re.sub(rf"(?m)^ +{variable}: .*\n", "", text)
        for word in words:
            text = text.replace(word, "", 1)
        for service in services:
            text = _without(service, text)
    return re.sub(r"(?m)^    depends_on:\n(?!      )", "", text)


def _without(service: str, text: str) -> str:
    """A compose file without a service, its volume, and the conditions of others to wait for it."""
    text = re.sub(rf"(?m)^      {service}: {{condition: .*\n", "", text)
    return re.sub(rf"(?m)^(?:  #.*\n)*  {service}:\n(?:    .*\n|\n)*", "", text)


def write_site(
    folder: Path, bootstrap: str | None, store: str | None, bundle: Path | None, code: Path | None = None
) -> list[Path]:
    """Write the configuration, the compose file with what it mounts, and a copy of the bundle; return what was written.

    `bootstrap` and `store` are addresses; None keeps the defaults. `code` is the folder of the function that builds the
    bundle's model, if it is not built in; naming it allows the bundle to run that function. Nothing is overwritten.
    Raises ConfigError.
    """
    source = bundle or shipped(EXAMPLE_BUNDLE)
    copy = Path("bundles") / source.resolve().name
    changes: dict[str, Any] = {"path": copy.as_posix()}
    changes |= {"bootstrap": bootstrap} if bootstrap else {}
    changes |= {"url": store} if store else {}
    changes |= {"factories": [_factory(source)], "code": str(code.resolve())} if code else {}
    if not (source / "manifest.json").is_file():
        raise ConfigError(f"{source} is no bundle: it has no manifest.json")
    texts = {
        Path("driftkeel.yaml"): site_config(changes),
        Path("compose.yaml"): site_compose(bootstrap is not None, store is not None),
    }
    folders = {
        copy: source,
        Path("prometheus"): shipped("deploy/prometheus"),
        Path("grafana"): shipped("deploy/grafana"),
    }
    existing = [str(folder / name) for name in (*texts, *folders) if (folder / name).exists()]
    if existing:
        there = f"{', '.join(existing)} exist{'s' if len(existing) == 1 else ''} already"
        raise ConfigError(f"{there}; name another folder, or remove {'it' if len(existing) == 1 else 'them'} first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, origin in folders.items():
            shutil.copytree(origin, folder / name)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    return [folder / name for name in (*texts, *folders)]


def _factory(bundle: Path) -> str:
    """The `module:function` that builds a bundle's model. Raises ConfigError or BundleError."""
    architecture = read_manifest(bundle).model.architecture
    if ":" not in architecture:
        raise ConfigError(f"{bundle} needs no code: its model {architecture} is built in; leave --code out")
    return architecture


@contextmanager
def local_services(config: WorkerConfig) -> Iterator[None]:
    """Run a broker with the topics, and a store, at the configured addresses. Raises DriftkeelError."""
    broker_port = _local_port("kafka.bootstrap", config.kafka.bootstrap)
    address = urlsplit(config.store.url.get_secret_value())
    store_port = _local_port("store.url", f"{address.hostname}:{address.port or 6379}")
    with embedded_services(broker_port, store_port):
        create_topics(config.kafka.model_copy(update={"security_protocol": "PLAINTEXT"}), LOCAL_PARTITIONS)
        yield


def _local_port(key: str, address: str) -> int:
    host, _, port = address.rpartition(":")
    if host not in LOOPBACK or not port.isdigit():
        raise ConfigError(f"{key} is {address}: a local one needs 127.0.0.1:PORT")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(port))) == 0:
            raise ConfigError(f"{key}: something listens on port {port} already; stop it, or configure another port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As servers do, to restart at once.
        try:
            probe.bind(("127.0.0.1", int(port)))
        except OSError as error:  # The embedded broker would end without a message.
            raise ConfigError(
                f"{key}: port {port} cannot be had: {error.strerror}; an outgoing connection may use it, "
                "so configure another"
            ) from error
    return int(port)
