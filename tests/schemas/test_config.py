from pathlib import Path

import pytest
import yaml

from schemas.config import Kafka, mask_url
from schemas.config_file import effective_yaml, load_config
from schemas.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "driftkeel.example.yaml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.yaml"
    path.write_text(text)
    return path


def test_example_lists_every_option_with_its_default() -> None:
    def keys(content: dict, prefix: str = "") -> dict:
        flat = {}
        for name, value in content.items():
            if isinstance(value, dict):
                flat |= keys(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value
        return flat

    example = keys(yaml.safe_load(EXAMPLE.read_text()))
    defaults = keys(yaml.safe_load(effective_yaml(load_config(None))))
    assert set(example) == set(defaults)
    defaults["worker"] = example["worker"]
    assert example == defaults


# Each line has nine times the keys of the one before.
MERGED = "a0: &a0 {k: 1, l: 2, m: 3, n: 4, o: 5, p: 6, q: 7, r: 8, s: 9}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 7)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kafka: {bootstrp: 'x:1'}", "unknown key 'kafka.bootstrp'; did you mean 'kafka.bootstrap'?"),
        ("kafak: {}", "unknown key 'kafak'; did you mean 'kafka'?"),
        ("bootstrap: 'x:1'", "did you mean 'kafka.bootstrap'?"),
        ("zzzzzz: 1", "'driftkeel config' prints all valid keys"),
        ("batch: {max_batch: 2, min_adapt: 4}", "min_adapt must not be larger than max_batch"),
        ("batch: {max_batch: nine}", "batch.max_batch"),
        ("store: {url: 'http://x'}", "scheme 'http' is not one of redis, rediss, unix"),
        ("kafka: {topics: {dead_letters: frames}}", "kafka.topics: two of these are the same: frames, predictions"),
        ("kafka: {bootstrap: ''}", "kafka.bootstrap: '' is no host:port"),
        ("kafka: {bootstrap: 'a:1,b:kafka'}", "'b:kafka' is no host:port"),
        ("kafka: {bootstrap: 'a:1;b:2'}", "'a:1;b:2' is no host:port, such as kafka-1:9092 or [::1]:9092; commas"),
        ("kafka: {bootstrap: 'a:1 b:2'}", "'a:1 b:2' is no host:port"),
        ("kafka: {bootstrap: ':9092'}", "':9092' is no host:port"),
        ("kafka: {bootstrap: 'a:65536'}", "'a:65536' is no host:port"),
        ("kafka: {bootstrap: '::1'}", "'::1' is no host:port"),
        ("kafka: {bootstrap: '[::1'}", "'[::1' is no host:port"),
        ("kafka: {group: ''}", "kafka.group: string should have at least 1 character"),
        ("worker: ''", "worker: string should have at least 1 character"),
        ("kafka: {topics: {frames: line 3}}", "kafka.topics.frames: string should match pattern"),
        (MERGED, r"is not YAML, line 5: '<<' merges more than 10,000 keys into one section"),
        ("kafka: {group: a}\nbatch: {}\nkafka: {}", "is not YAML, line 3: 'kafka' is there a second time"),
        ("streams:\n  cam-7: {mode: shadow}\n  cam-7: {}", "is not YAML, line 3: 'cam-7' is there a second time"),
        ("- a\n- b", "expected sections"),
        ("a: [", "is not YAML, line 1: expected the node content"),
        ("a:\n\tb: 1", "is not YAML, line 2: found character '\\t'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ("kafka-1", "kafka-1:9092"),
        ("10.0.0.7, kafka_2:9093 ", "10.0.0.7:9092,kafka_2:9093"),
        ("[::1]", "[::1]:9092"),
        ("[fe80::1%eth0]:19092", "[fe80::1%eth0]:19092"),
        ("PLAINTEXT://kafka-1:9092", "PLAINTEXT://kafka-1:9092"),
    ],
)
def test_a_broker_without_a_port_has_the_usual_one(written: str, understood: str) -> None:
    """As in most Kafka clients; messages name it, and so it is no riddle which port was tried."""
    assert Kafka(bootstrap=written).bootstrap == understood


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "kafka: {grup: a}\nbatch: {max_wait: 3}"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('policy: {quiet_hours: "22:00-06:00"}', "policy.quiet_hours: input should be a list, such as [a, b]"),
        (
            'policy: {quiet_hours: ["10:00-10:00"]}',
            "policy.quiet_hours: '10:00-10:00' ends where it begins; "
            "for the whole day write 00:00-12:00 and 12:00-00:00",
        ),
        (
            'streams: {cam-7: {quiet_hours: ["10:00-10:00"]}}',
            "streams.cam-7.quiet_hours: '10:00-10:00' ends where it begins; "
            "for the whole day write 00:00-12:00 and 12:00-00:00",
        ),
        ("streams: {cam-7: shadow}", "streams.cam-7: input should be a section, keys with values"),
        ("streams: [cam-7]", "streams: input should be a section, keys with values"),
        ("kafka:", "kafka: input should be a section, keys with values"),
    ],
)
def test_mistakes_are_said_in_words_of_the_file(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, content))
    assert str(caught.value).endswith(f"worker.yaml: {said}")


@pytest.mark.parametrize(
    "content",
    ["worker: 2026-13-45", "worker: 2026-01-01 25:61:00", f"threads: {'1' * 5_000}", "threads: !!int one", "[" * 5_000],
)
def test_what_looks_like_a_date_or_a_number_and_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"site\.yaml is not YAML: "):
        load_config(path)


def test_sections_may_share_what_they_have_in_common(tmp_path: Path) -> None:
    """With anchors, of which the section's own keys say otherwise."""
    shared = "streams: {cam-7: &pilot {mode: shadow, frozen: true}, cam-8: {<<: *pilot, frozen: false}}"
    found = load_config(write(tmp_path, shared)).streams["cam-8"]
    assert (found.mode, found.frozen) == ("shadow", False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIFTKEEL__BATCH__MAX_BATCH", "32")
    monkeypatch.setenv("DRIFTKEEL__KAFKA__TOPICS__FRAMES", "line-3")
    config = load_config(write(tmp_path, "batch: {max_batch: 8, max_wait_ms: 7}"))
    assert (config.batch.max_batch, config.batch.max_wait_ms) == (32, 7)
    assert config.kafka.topics.frames == "line-3"
    assert config.kafka.topics.updates == "updates"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"THREADS": "two"}, "environment variable DRIFTKEEL__THREADS: threads: input should be a valid integer"),
        ({"batch__max_batch": "x"}, "environment variable DRIFTKEEL__batch__max_batch: batch.max_batch: input"),
        ({"BATCH": '{"max_batch": "x"}'}, "environment variable DRIFTKEEL__BATCH: batch.max_batch: input"),
        ({"CONSOLE__HOSTS": "a"}, "environment variable DRIFTKEEL__CONSOLE__HOSTS: lists and sections are written as"),
        ({"KAFKA": "a", "STORE": "{}"}, "environment variable DRIFTKEEL__KAFKA: lists and sections are written as"),
    ],
)
def test_a_bad_variable_is_named_and_not_the_file(
    variables: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in variables.items():
        monkeypatch.setenv(f"DRIFTKEEL__{name}", content)
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "kafka: {group: a}"))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("variable", [("BATCH__MAX_BATCH", "32"), ("BATCH", '{"max_batch": 32}')])
def test_a_mistake_of_the_file_is_not_the_environment_s(
    variable: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DRIFTKEEL__{variable[0]}", variable[1])
    with pytest.raises(ConfigError, match=r"^config .*worker.yaml: batch.max_wait_ms: input"):
        load_config(write(tmp_path, "batch: {max_wait_ms: x}"))


def test_a_rule_of_a_section_may_be_broken_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIFTKEEL__BATCH__MIN_ADAPT", "16")
    with pytest.raises(
        ConfigError, match=r"^config .* and environment variable DRIFTKEEL__BATCH__MIN_ADAPT: batch: min_adapt must"
    ):
        load_config(write(tmp_path, "batch: {max_batch: 8}"))


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("DRIFTKEEL__BATCH__MAX_BACH", "'batch.max_batch'"),
        ("DRIFTKEEL__BATCH__MAX__BATCH", "DRIFTKEEL__BATCH__MAX_BATCH"),
        ("DRIFTKEEL__BATCH_MAX_BATCH", "DRIFTKEEL__BATCH__MAX_BATCH"),
        ("DRIFTKEEL_BATCH__MAX_BATCH", "DRIFTKEEL__BATCH__MAX_BATCH"),
        ("DRIFTKEEL_BATCH__MAX_BACH", "'batch.max_batch'"),
        ("DRIFTKEEL_BATCH_MAX_BATCH", "DRIFTKEEL__BATCH__MAX_BATCH"),
        ("driftkeel_batch_max_batch", "DRIFTKEEL__BATCH__MAX_BATCH"),
        ("DRIFTKEEL___BATCH__MAX_BATCH", "DRIFTKEEL__BATCH__MAX_BATCH"),
        ("DRIFTKEEL_THREADS", "DRIFTKEEL__THREADS"),
    ],
)
def test_a_variable_that_is_meant_for_an_option_and_names_none(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "32")
    with pytest.raises(ConfigError) as caught:
        load_config(None)
    assert str(caught.value) == f"environment variable {variable} names no option; did you mean {meant}?"


@pytest.mark.parametrize(
    "variables",
    [
        dict.fromkeys(("DRIFTKEEL_CONFIG", "DRIFTKEEL_CACHE", "DRIFTKEEL_CIFAR10", "DRIFTKEEL_TEST_BOOTSTRAP"), "x"),
        {"DRIFTKEEL_CONSOLE_TOKEN": "sixteen-of-them."},  # the compose file makes an option of it
        {"DRIFTKEEL_STORE_URL": "redis://h:1", "DRIFTKEEL__STORE__URL": "redis://h:1"},  # and so do others
        # What Kubernetes gives all pods beside a service of the name driftkeel-console.
        {"DRIFTKEEL_CONSOLE_PORT": "tcp://10.0.0.7:8464", "DRIFTKEEL_CONSOLE_SERVICE_HOST": "10.0.0.7"},
        {"DRIFTKEEL_CONSOLE_PORT_8464_TCP_ADDR": "10.0.0.7", "DRIFTKEEL_CONSOLE_SERVICE_PORT": "8464"},
        {"DRIFTKEEL_VERSION": "1"},
    ],
)
def test_variables_of_others_are_left_alone(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in variables.items():
        monkeypatch.setenv(name, content)
    load_config(None)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hun@ter2@h:1/0",
        "redis://:hun/ter2@h:1/0",
        "redis+cluster://u:hunter2@a:1,b:2",
        "redis://h:1/0?password=hunter2&db=3",
        "rediss://h:1/0?ssl_ca_certs=x&ssl_password=hunter2",
    ],
)
def test_no_part_of_a_password_is_shown(url: str) -> None:
    assert "ter2" not in mask_url(url)
    assert mask_url(mask_url(url)) == mask_url(url)
    assert mask_url("redis://h:1/0?db=3") == "redis://h:1/0?db=3"


def test_secrets_are_masked(tmp_path: Path) -> None:
    text = (
        "store: {url: 'rediss://site:hunter2@store:6380/1'}\n"
        "kafka: {security_protocol: SASL_SSL, sasl_mechanism: PLAIN, sasl_username: u, sasl_password: sesame}"
    )
    config = load_config(write(tmp_path, text))
    shown = effective_yaml(config) + repr(config)
    assert "hunter2" not in shown
    assert "sesame" not in shown
    assert "rediss://site:***@store:6380/1" in shown
    assert config.store.url.get_secret_value() == "rediss://site:hunter2@store:6380/1"
