"""Which device a worker computes on, and what it says where there is none."""

import pytest
import torch

from schemas.config import Kafka, Store, WorkerConfig
from schemas.config_file import load_config
from schemas.errors import ConfigError
from worker import run
from worker.engine.device import site_device
from worker.site.doctor import examine


def test_the_processor_is_always_there() -> None:
    assert site_device(WorkerConfig().device) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "auto", "cuda:1000", "CUDA", "cuda\n"])
def test_other_names_are_refused(name: str, tmp_path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"device: {name!r}\n")
    with pytest.raises(ConfigError, match="device: string should match"):
        load_config(path)


def test_a_build_without_cuda_is_named(monkeypatch, kafka_settings: Kafka, store_settings: Store) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ConfigError, match=r"^device cuda: torch .* is built for processors alone; .*or set device: cpu$"
    ):
        site_device("cuda")
    config = WorkerConfig(device="cuda:1", kafka=kafka_settings, store=store_settings)
    findings = [found for found in examine(config) if found.subject == "device"]
    assert [(found.level, "cuda:1" in found.text) for found in findings] == [("failed", True)]


@pytest.mark.parametrize(("seen", "name"), [(0, "cuda"), (1, "cuda:1"), (2, "cuda:7")])
def test_gpus_that_torch_does_not_see_are_named(monkeypatch, seen: int, name: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(ConfigError, match=f"^device {name}: it is none of the {seen} that torch sees"):
        site_device(name)


def test_a_gpu_that_is_seen_computes_as_exactly_as_a_processor(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert site_device("cuda:1") == torch.device("cuda", 1)
    assert site_device("cuda") == torch.device("cuda", 0)
    assert used == [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert not torch.backends.cudnn.allow_tf32


def test_a_full_gpu_is_an_error_for_people(monkeypatch) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB. Of the allocated ..."

    class Full:
        def __init__(self, *_: object) -> None:
            raise torch.cuda.OutOfMemoryError(said)

    monkeypatch.setattr(run, "Worker", Full)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(run, "switch_often", lambda: None)
    with pytest.raises(ConfigError, match=r"^device cuda:1 has no memory left \(CUDA .* 2.00 GiB\); lower"):
        run.run_worker(WorkerConfig(device="cuda:1"))
