"""Where a worker computes: on the processor, or on a GPU that torch calls CUDA.

Experimental: tests use a simulated device to check that every tensor is where it belongs. No GPU has run this yet.
"""

from __future__ import annotations

import torch

from schemas.errors import ConfigError

EXPERIMENTAL = "experimental: where tensors are is tested, but no GPU has run this yet"


def site_device(name: str) -> torch.device:
    """The device that a configuration names: cpu, cuda or cuda:N. This thread uses it from now on. Raises ConfigError
    where torch does not see it."""
    if name == "cpu":
        return torch.device(name)
    device = torch.device("cuda", torch.device(name).index or 0)
    if torch.version.cuda is None and torch.version.hip is None:
        what = f"torch {torch.__version__} is built for processors alone; install a build for CUDA"
        raise ConfigError(f"device {name}: {what}, or set device: cpu")
    seen = torch.cuda.device_count()
    if device.index >= seen:
        what = f"it is none of the {seen} that torch sees; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise ConfigError(f"device {name}: {what}, or set device: cpu")
    # Bundles are calibrated on processors, with full precision; TF32 keeps ten bits of each factor.
    torch.backends.cudnn.allow_tf32 = False
    use(device)
    return device


def use(device: torch.device) -> None:
    """Have this thread use the device. Otherwise it begins with the first GPU, where torch would keep another context
    of some hundred megabytes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def described(device: torch.device) -> str:
    """For a log line."""
    return str(device) if device.type == "cpu" else f"{device}, {torch.cuda.get_device_name(device)}"


def out_of_memory(name: str, error: Exception) -> ConfigError:
    """What to do about a GPU that is too small."""
    said = str(error).split(". ")
    return ConfigError(
        f"device {name} has no memory left ({'. '.join(said[:2])}); lower adapt.max_resident_bytes, which is taken at "
        "the start, or batch.max_pass, or threads"
    )
