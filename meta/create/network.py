"""A user's network: reads its weights, and checks that it can be adapted. Every refusal gives its reason."""

from __future__ import annotations

import errno
import inspect
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Container
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from meta.custom_norms import find_custom_norms
from meta.norms import AdaptableModel, norm_layers, run_order
from schemas.errors import BundleError

NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training loops put the weights in a checkpoint
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, of torch.compile, and of Lightning's modules
COUNTER = "n_averaged"  # an additional entry of torch's AveragedModel
TOLERANCE = 1e-3  # of the largest logit
ROUNDING = 1e-5  # tolerance for a sum of probabilities
Say = Callable[[str], None]


def read_weights(path: Path, say: Say) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt or .pth file. No code in the file is run. Raises BundleError."""
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch has looked for the file's end where there is none
            raise BundleError(f"{path} is no file of weights: it is cut off or damaged") from error
        raise BundleError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{path} holds more than tensors, and would run code if it were loaded; save the weights alone with "
            "torch.save(model.state_dict(), ...) or safetensors.torch.save_file"
        ) from error
    except Exception as error:  # torch raises anything for a damaged pickle, such as IndexError or struct.error
        reason = " ".join(str(error).split())[:200] or "it ends too early"
        raise BundleError(f"{path} is no file of weights: {reason}") from error
    nested = next((name for name in NESTED if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    if nested is not None:
        others = [name for name, part in content.items() if name != nested and _tensors(part)]
        say(f"weights: taken from {nested!r} of the checkpoint{f', not from {_some(others)}' if others else ''}")
        content = content[nested]
    tensors = _tensors(content)
    if not tensors:
        found = f", but {_some([str(name) for name in content])}" if isinstance(content, dict) and content else ""
        raise BundleError(f"{path} holds no named tensors{found}; save model.state_dict()")
    return tensors


def _tensors(content: Any) -> dict[str, Tensor]:
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}


def _without_prefix(tensors: dict[str, Tensor], known: Container[str], say: Say) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers, which may be nested, until a name is known. Known names are never changed."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != COUNTER or name in known}
    while not any(name in known for name in tensors):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        say(f"weights: names begin with {prefix!r}, which is left out")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def load_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path, say: Say) -> dict[str, Tensor]:
    """Load weights into `network`, which becomes float32 and is set to eval mode. Returns the bundle's state dict.

    Raises BundleError if names or shapes do not fit, or if a weight is not finite.
    """
    low = sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point() and t.dtype != torch.float32})
    if low or any(p.dtype != torch.float32 for p in network.parameters()):
        say(f"weights: {', '.join(low) or 'the network'} converted to float32, in which the worker computes")
    network.float().eval()
    tensors = _without_prefix(tensors, network.state_dict().keys(), say)
    try:
        wrong = network.load_state_dict(tensors, strict=False)
    except Exception as error:  # Foreign code may process them, too.
        whole = " ".join(str(error).split())
        shapes = whole.partition(":")[2].strip() or whole
        raise BundleError(f"{path} does not fit the network: {shapes[:300]}; check --model-args") from error
    if wrong.missing_keys or wrong.unexpected_keys:
        raise BundleError(
            f"{path} does not fit the network: it lacks {_some(wrong.missing_keys)} "
            f"and has {_some(wrong.unexpected_keys)} that the network does not know; check --model and --model-args"
        )
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{path}: weight {name!r} is not finite")
    if dropout := [name for name, module in network.named_modules() if "drop" in type(module).__name__.lower()]:
        say(f"network: {len(dropout)} dropout layers stay off: it always runs in eval mode")
    return {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "nothing"


def adaptable(network: nn.Module, frames: Tensor, classes: int, say: Say) -> AdaptableModel:
    """Replace the network's norm layers, in place, and check that its predictions stay the same.

    frames (B, ch, h, w), B >= 2: standardised as in operation.

    Raises BundleError if the network cannot be adapted: if it has several inputs, outputs other than logits
    (B, classes), random or batch-dependent predictions, no norm layer with a scale, norm layers that do more than
    normalise, or norm layers whose order of execution varies.
    """
    _one_input(network)
    network.float().eval()
    before = _sound_logits(network, frames, classes)
    swapped = _norm_subclasses(network)
    custom = find_custom_norms(network, frames)
    for kind, count in sorted(custom.others.items()):
        say(
            f"network: {count} {kind} will not adapt: layers of classes of one's own do where they run once a pass and "
            "hold a weight, and no more than a bias besides, of one value per channel; use one of torch's instead"
        )
    model = AdaptableModel(network, _order(network, frames, custom.layouts), custom.layouts)
    _predicts_as_before(model, frames, before, f"; suspect: {', '.join(swapped)}" if swapped else "")
    kinds = Counter(type(layer.norm).__name__ for layer in model.layers)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    say(f"network: {found} with {model.coordinates} scales and shifts to adapt; predictions reproduce")
    if model.memory_format is torch.contiguous_format:
        say("network: runs with frames laid out channel by channel only (it uses view); reshape would be faster")
    return model


def _sound_logits(network: nn.Module, frames: Tensor, classes: int) -> Tensor:
    """The logits of frames, after checks that they are logits, deterministic, and independent of the batch."""
    logits = _logits(network, frames, classes)
    if not torch.equal(logits, _logits(network, frames, classes)):
        raise BundleError(
            "the network answers the same frames differently in eval mode: something in it is random, such as dropout "
            "with training=True; make it depend on self.training"
        )
    # All frames are checked: the logits of one may sum to 1 by chance.
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < ROUNDING).all()):
        raise BundleError(
            "the network returns probabilities, not logits: each row sums to 1; leave its softmax out, or wrap it in a "
            "module that returns their logarithm"
        )
    alone = torch.cat([_logits(network, frame, classes) for frame in frames.split(1)])
    _same(logits, alone, "a frame's answer depends on the others in its batch, so cameras would mix")
    return logits


def _predicts_as_before(model: AdaptableModel, frames: Tensor, before: Tensor, doubt: str) -> None:
    """Check that the network with replaced norm layers gives the same logits, and that gradients reach the layers.

    `doubt` is added to the error message. Raises BundleError.
    """
    try:
        model.fit_layout(frames)
        rows = model.source_affine.expand(len(frames), -1).clone().requires_grad_()
        after, _, _ = model.forward_with_inputs(frames, rows)
        # With another batch size, too: the number of other rows that a norm layer sees may have been that of frames.
        model(frames[1:], rows[1:].detach())
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BundleError(
            f"the network does not run with its norm layers swapped ({_line(error)}){doubt}; "
            "it must call its norm layers as modules, and these must only normalise"
        ) from error
    _same(before, after.detach(), f"with its norm layers swapped the network does not predict what it did{doubt}")
    _has_gradient(after, rows)


def built_again(again: nn.Module, weights: dict[str, Tensor], model: AdaptableModel, frames: Tensor) -> None:
    """Check that a network that is built again, as by every worker, gives the same logits for frames (B, ch, h, w) as
    `model` with the same weights. Raises BundleError."""
    again.float().eval().load_state_dict(weights)
    with torch.no_grad():
        _same(
            model(frames),
            again(frames.contiguous()).float(),
            "the network answers differently each time it is built, with the same weights: something in it is drawn at "
            "random and not saved with these; keep it in a buffer (register_buffer)",
        )


def _one_input(network: nn.Module) -> None:
    if isinstance(network, torch.jit.ScriptModule):
        raise BundleError(
            "the network is scripted or traced, so that its norm layers cannot be reached; name the function that "
            "builds it in Python, before torch.jit"
        )
    parameters = list(inspect.signature(network.forward).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1:
        raise BundleError(
            f"the network takes {len(needed)} inputs ({', '.join(needed)}); a frame is one: "
            "wrap it in a module whose forward takes the picture alone"
        )


@torch.no_grad()
def _logits(network: nn.Module, frames: Tensor, classes: int) -> Tensor:
    """The network's output for contiguous frames, after checks of type, shape and finiteness. Raises BundleError."""
    try:
        out = network(frames.contiguous())
    except Exception as error:  # Foreign code can raise anything.
        raise BundleError(
            f"the network cannot take frames of shape {tuple(frames.shape)}: {_line(error)}; "
            "--size WxH and --mode must be those of its training"
        ) from error
    if not isinstance(out, Tensor):
        raise BundleError(
            f"the network returns a {type(out).__name__}, not logits; wrap it in a module that returns the logits alone"
        )
    if out.dim() != 2 or out.shape[0] != len(frames):
        raise BundleError(
            f"the network returns {tuple(out.shape)} for {len(frames)} frames, not one row of logits each"
        )
    if out.shape[1] == 1 and classes == 2:
        raise BundleError(
            "the network has one output for two classes; wrap it in a module that returns two logits: "
            "torch.cat([torch.zeros_like(z), z], 1) where z is its output before any sigmoid"
        )
    if out.shape[1] != classes:
        raise BundleError(f"the network has {out.shape[1]} classes, the labels are {classes}; check --labels")
    if not bool(torch.isfinite(out).all()):
        raise BundleError("the network's logits are not finite; check --mean, --std and the weights")
    return out.float()


def _same(expected: Tensor, found: Tensor, problem: str) -> None:
    off = float((expected - found).abs().max())
    if not off <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise BundleError(f"{problem} (logits differ by up to {off:.3g})")


def _order(network: nn.Module, frames: Tensor, custom: Collection[str]) -> list[str]:
    """The names of the norm layers in the order of execution, after a check that it is the same for each frame.

    If not every layer runs exactly once, they are in the order of `norm_layers`; the model then refuses to run.
    """
    order = run_order(network, frames, custom)
    for frame in frames.split(1):
        if (other := run_order(network, frame, custom)) != order:
            odd = next(pair for pair in zip_longest(order, other, fillvalue="none") if pair[0] != pair[1])
            raise BundleError(
                f"the order in which norm layers run varies with the frames ({odd[0]!r} in one pass, where another has "
                f"{odd[1]!r}): what is learned of a layer would meet another; make the network run all of them in turn"
            )
    named = list(norm_layers(network, custom))
    return order if sorted(order) == sorted(named) else named


def _norm_subclasses(network: nn.Module) -> list[str]:
    """The names of classes outside of torch that are derived from its norm layers, and may do more than normalise."""
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
    return sorted(
        {
            f"{type(module).__module__}.{type(module).__name__}"
            for module in network.modules()
            if isinstance(module, kinds) and not type(module).__module__.startswith("torch.nn.")
        }
    )


def _has_gradient(logits: Tensor, rows: Tensor) -> None:
    if logits.grad_fn is None:
        raise BundleError(
            "no gradient reaches the norm layers: the network's forward runs under torch.no_grad, or detaches what it "
            "has worked out; leave that out, as operation adapts by this gradient"
        )
    try:
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), [rows], allow_unused=True)
    except RuntimeError as error:
        raise BundleError(
            f"no gradient can be taken through the network ({_line(error)}); where it checkpoints activations, turn "
            "that off: its norm layers must run once a pass"
        ) from error
    if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        raise BundleError("no usable gradient reaches the norm layers: the network cuts it, or its weights overflow")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
