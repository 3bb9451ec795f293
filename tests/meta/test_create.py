import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import meta.create.run
import tests.foreign
from meta.bundle import load_bundle
from meta.bundle_folder import read_verdict
from meta.create.images import Images, common_size, read_files, read_labels, read_npz, split, without_duplicates
from meta.create.measure import measure, recommend, standard_error
from meta.create.network import adaptable, load_weights, read_weights
from meta.create.piecewise import PiecewiseMGG
from meta.create.run import HELD_BACK, create_bundle
from meta.create.subject import CreateSettings
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from meta.source import Preprocessing
from meta.train import Problem
from schemas.bundle import Manifest, Preprocess
from schemas.config import Frames
from schemas.errors import BundleError, ConfigError, DataError
from schemas.verdict import Measured
from tests.conftest import SHIPPED_BUNDLE
from tests.foreign import LABELS, SIDE, BatchNormNet, batchnorm_net, layernorm_net, pictures, trained, write_folder
from worker.decode.image import decode_image

NETS = {"batchnorm_net": batchnorm_net, "layernorm_net": layernorm_net}


def decode(content: bytes, preprocess: Preprocess) -> np.ndarray:
    return decode_image(content, Frames(), preprocess)


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as somebody would have it: checkpoints and images."""
    folder = tmp_path_factory.mktemp("own")
    for name, build in NETS.items():
        torch.save(trained(build).state_dict(), folder / f"{name}.pt")
    write_folder(folder / "images")
    return folder


def wanted(own: Path, net: str = "batchnorm_net", **changes: Any) -> CreateSettings:
    given = {
        "architecture": f"tests.foreign:{net}",
        "weights": own / f"{net}.pt",
        "data": own / "images",
        "mean": [0.3],
        "std": [0.2],
        "steps": 2,
        "calibration_windows": 2,
        "frames": 48,
        "repeats": 1,
    }
    return CreateSettings.model_validate(given | changes)


def create(settings: CreateSettings, output: Path, say: Callable[[str], None] = quiet) -> Manifest:
    return create_bundle(settings, "mine", output, "test", decode, say)


@pytest.fixture(scope="session")
def made(own: Path) -> tuple[Path, Manifest]:
    """The bundle of `wanted(own)`, made in one go."""
    return own / "made", create(wanted(own), own / "made")


@pytest.mark.parametrize("net", NETS)
def test_a_bundle_from_somebodys_checkpoint(own: Path, made: tuple[Path, Manifest], tmp_path: Path, net: str) -> None:
    folder, manifest = made
    if net != "batchnorm_net":
        folder = tmp_path / "bundle"
        manifest = create(wanted(own, net), folder)
    assert not folder.with_name(f"{folder.name}.work").exists()
    with pytest.raises(BundleError, match=r"list it under bundle.factories"):
        load_bundle(folder)
    bundle = load_bundle(folder, [f"tests.foreign:{net}"])
    assert bundle.hash == manifest.content_hash
    assert bundle.labels == LABELS
    assert manifest.preprocess == Preprocess(mode="L", width=SIDE, height=SIDE, mean=[0.3], std=[0.2])

    network = NETS[net]()
    network.load_state_dict(torch.load(own / f"{net}.pt"))
    frames = torch.randn(4, 1, SIDE, SIDE)
    torch.testing.assert_close(bundle.model(frames), network.eval()(frames), rtol=1e-4, atol=1e-4)
    assert manifest.model.norm_order == (["norm", "last_norm"] if net == "batchnorm_net" else [])
    assert bundle.model.places[0].layer == "norm"

    verdict = read_verdict(folder)
    assert verdict is not None
    assert verdict.images == {"generator": 90, "calibration": 30, "measurement": 30}
    assert verdict.clean_accuracy == manifest.model.clean_accuracy > 0.8
    assert {m.setting for m in verdict.settings} >= {"focus_loss", "no shift"}


def test_same_inputs_same_bundle(own: Path, made: tuple[Path, Manifest], tmp_path: Path) -> None:
    said: list[str] = []
    _, first = made
    assert create(wanted(own), tmp_path / "second", said.append) == first
    assert [line.partition(",")[0] for line in said].count("calibration: 10 of 10 rounds") == 1
    assert create(wanted(own, seed=1), tmp_path / "third") != first


def test_broken_off_runs_go_on_where_they_were(
    own: Path, made: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = made
    with monkeypatch.context() as broken:
        broken.setattr(meta.create.run, "calibrate", _interrupt)
        with pytest.raises(Interrupted):
            create(wanted(own), tmp_path / "bundle")
    with monkeypatch.context() as broken:
        broken.setattr(meta.create.run, "meta_train", _interrupt)
        with pytest.raises(Interrupted):  # Another seed takes nothing over.
            create(wanted(own, seed=1), tmp_path / "bundle")
        assert create(wanted(own), tmp_path / "bundle") == whole


class Interrupted(Exception):
    pass


def _interrupt(*arguments: object, **options: object) -> None:
    raise Interrupted


def test_what_other_code_has_done_is_not_taken_over(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sees that the network gets the wrong pixels breaks off, mends its code and runs the same command again."""
    monkeypatch.setattr(meta.create.run, "calibrate", _interrupt)
    forward = BatchNormNet.forward
    for changed in (forward, lambda network, x: forward(network, x + 0.1)):
        monkeypatch.setattr(BatchNormNet, "forward", changed)
        with pytest.raises(Interrupted):
            create(wanted(own), tmp_path / "bundle")
    found = [path.read_bytes() for path in (tmp_path / "bundle.work").glob("*/statistics.safetensors")]
    assert len(set(found)) == 2


def test_what_another_version_has_done_is_not_taken_over(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta.create.run, "meta_train", _interrupt)
    upgraded = shutil.copytree(meta.create.run.CODE, tmp_path / "meta")
    with (upgraded / "shifts.py").open("a") as code:
        code.write("# another version\n")
    for code_of_version in (meta.create.run.CODE, upgraded):
        monkeypatch.setattr(meta.create.run, "CODE", code_of_version)
        for _ in range(2):  # The second run has what the first one kept.
            with pytest.raises(Interrupted):
                create(wanted(own), tmp_path / "bundle")
    assert len(list((tmp_path / "bundle.work").glob("*/statistics.safetensors"))) == 2


def test_layers_that_are_declared_in_another_order_make_the_same_bundle(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta.create.run, "calibrate", _interrupt)
    stages = []
    for net in ("batchnorm_net", "ordered_net"):
        with pytest.raises(Interrupted):
            create(wanted(own, architecture=f"tests.foreign:{net}"), tmp_path / net)
        kept = (tmp_path / f"{net}.work").rglob("*.safetensors")
        stages.append({path.name: path.read_bytes() for path in kept})
    assert stages[0].keys() == {"statistics.safetensors", "correction.safetensors", "generator.safetensors"}
    assert stages[0] == stages[1]


def test_the_rule_of_another_bundle_is_taken_over(own: Path, tmp_path: Path) -> None:
    manifest = create(wanted(own, steps=None, generator=SHIPPED_BUNDLE), tmp_path / "bundle")
    assert manifest.method.settings["anchor_rank"] == 0
    bundle = load_bundle(tmp_path / "bundle", ["tests.foreign:batchnorm_net"])
    shipped = load_bundle(SHIPPED_BUNDLE)
    assert isinstance(bundle.method, MGG)
    assert isinstance(shipped.method, MGG)
    assert torch.equal(bundle.method.learned.rule.output, shipped.method.learned.rule.output)
    assert not torch.equal(bundle.method.learned.gradient_scale, shipped.method.learned.gradient_scale)

    more = create(wanted(own, steps=2, generator=SHIPPED_BUNDLE), tmp_path / "more")
    assert more.method.settings["anchor_rank"] == 16
    with pytest.raises(ConfigError, match="untrained"):
        create(wanted(own, steps=0), tmp_path / "none")
    paper = SHIPPED_BUNDLE.with_name("fashion-mnist-paper")
    with pytest.raises(BundleError, match="serves its own model only"):
        create(wanted(own, generator=paper), tmp_path / "none")


def test_training_does_not_hold_back_and_its_generator_does(
    own: Path, made: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the generator that is trained on comes from a bundle that was made so."""
    seen: list[GeneratorSettings] = []
    train = meta.create.run.meta_train

    def note(problems: Sequence[Problem], *others: Any) -> list[float]:
        seen.append(problems[0].method.settings)
        return train(problems, *others)

    monkeypatch.setattr(meta.create.run, "meta_train", note)
    folder, first = made
    with monkeypatch.context() as broken:
        broken.setattr(meta.create.run, "calibrate", _interrupt)  # What is trained first is what `made` has.
        with pytest.raises(Interrupted):
            create(wanted(own), tmp_path / "first")
    second = create(wanted(own, generator=folder), tmp_path / "second")
    default = GeneratorSettings()
    for settings in seen:
        assert {name: getattr(settings, name) for name in HELD_BACK} == {
            name: getattr(default, name) for name in HELD_BACK
        }
    assert len(seen) == 2
    for manifest in (first, second):
        assert manifest.method.settings.items() >= HELD_BACK.items()


def test_images_without_labels(own: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((own / "images").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    settings = wanted(own, data=flat, labels=tmp_path / "labels.txt")
    said: list[str] = []
    manifest = create(settings, tmp_path / "bundle", said.append)
    verdict = read_verdict(tmp_path / "bundle")
    assert verdict is not None
    assert (verdict.truth, manifest.model.clean_accuracy) == ("source", 1.0)
    assert any("accuracy is unknown" in note for note in verdict.notes)


# --- networks ----------------------------------------------------------------------------------------------------


class Answering(nn.Module):
    """A small classifier that does something odd with its answer."""

    def __init__(self, change: Callable[[Tensor], Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.change = change
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), norm or nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * (SIDE - 2) ** 2, 3)

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.layers(x)))


class TokensFirst(nn.Module):
    """Six tokens of each frame, in the dimension where others have their frames."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.adaptive_avg_pool2d(self.first(x), (2, 3)).flatten(2).permute(2, 0, 1)
        return self.head(self.norm(tokens).relu().mean(0))


class Checkpointed(Answering):
    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(self.layers, x, use_reentrant=False))


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class NormAndMore(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + 1


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(800, 3)))


class Wandering(nn.Module):
    """Runs its norm layers in an order that each frame decides, to the same end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.other = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)

    def _one(self, x: Tensor) -> Tensor:
        layers = [self.norm, self.other] if float(x.mean()) > 0 else [self.other, self.norm]
        return self.head(sum(layer(self.first(x)) for layer in layers).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._one(frame) for frame in x.split(1)])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.norm(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (TwoInputs, r"takes 2 inputs \(x, mask\)"),
        (lambda: Answering(lambda z: (z, z)), "returns a tuple, not logits"),
        (lambda: Answering(lambda z: {"logits": z}), "returns a dict, not logits"),
        (lambda: Answering(lambda z: z[:, :2]), "has 2 classes, the labels are 3"),
        (lambda: Answering(lambda z: z.sum(0)), "not one row of logits each"),
        (lambda: Answering(lambda z: z / 0), "logits are not finite"),
        (lambda: Answering(lambda z: z.softmax(1)), "returns probabilities, not logits: .*leave its softmax out"),
        (lambda: Answering(lambda z: nn.functional.dropout(z)), "something in it is random"),
        (lambda: Answering(lambda z: z - z.mean(0)), "depends on the others in its batch"),
        (lambda: Answering(lambda z: z, nn.Identity()), "nothing can adapt"),
        (lambda: Answering(lambda z: z, nn.BatchNorm2d(8, track_running_stats=False)), "in its batch"),
        (lambda: Answering(lambda z: z, weight_norm(nn.GroupNorm(2, 8))), "weights out from others, .*bake them in"),
        (lambda: Answering(lambda z: z, old_weight_norm(nn.GroupNorm(2, 8))), "weights out from others"),
        (scripted, "is scripted or traced, .*before torch.jit"),
        (lambda: Answering(lambda z: z, NormAndMore(2, 8)), r"does not predict what it did; suspect: .*NormAndMore"),
        (lambda: Answering(lambda z: z.detach()), "no gradient reaches .*, or detaches what it has worked out"),
        (TokensFirst, "sees 6 rows for 5 frames"),
        (lambda: Checkpointed(lambda z: z), "checkpoints activations, turn that off: its norm layers"),
        (Twice, "uses norm layer 'norm' 2 times"),
        (Wandering, r"order in which norm layers run varies with the frames \('norm' in one pass, where another has "),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), "cannot take frames of shape .*--size WxH"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # which people still use
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm:FutureWarning")
def test_networks_that_cannot_be_adapted(build: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    network = build().eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    with pytest.raises(BundleError, match=message):
        adaptable(network, torch.randn(6, 1, SIDE, SIDE), 3, quiet)


def test_one_output_for_two_classes_is_not_two_logits() -> None:
    network = Answering(lambda z: z[:, :1])
    with pytest.raises(BundleError, match=r"one output for two classes; wrap it .*zeros_like"):
        adaptable(network, torch.randn(6, 1, SIDE, SIDE), 2, quiet)


class Volume(nn.Module):
    """Its first weights have no layout channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv3d(1, 8, (1, 3, 3)), nn.BatchNorm3d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x.unsqueeze(2)))).mean((2, 3, 4)))


class Scripted(nn.Module):
    """A part of it, without norm layers, is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.jit.script(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()))
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Answering(lambda z: z.half()),
        lambda: Answering(lambda z: z.double()),
        lambda: Answering(lambda z: torch.where(z[:, :1] > z[:, 1:2], z.softmax(1), z)),
        Volume,
        Scripted,
    ],
    ids=["half", "double", "sums of some are 1", "volume", "scripted"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # which people still use
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm:FutureWarning")
def test_networks_that_are_somewhat_odd(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network, frames = build().eval(), torch.randn(6, 1, SIDE, SIDE)
    expected = network(frames).detach().float()
    model = adaptable(network, frames, 3, quiet)
    torch.testing.assert_close(model(frames), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("persistent", [True, False])
def test_what_is_drawn_when_a_network_is_built_must_be_among_its_weights(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    """A worker builds the network anew."""

    def build() -> nn.Module:
        network = batchnorm_net()
        network.first.register_buffer("odd", torch.rand(()), persistent)
        network.first.register_forward_hook(lambda layer, _, out: out + layer.odd)
        return network

    monkeypatch.setattr(tests.foreign, "drawn", build, raising=False)
    monkeypatch.setattr(meta.create.run, "source_statistics", _interrupt)
    torch.save(torch.load(own / "batchnorm_net.pt") | {"first.odd": torch.tensor(0.1)}, tmp_path / "saved.pt")
    weights = tmp_path / "saved.pt" if persistent else own / "batchnorm_net.pt"
    settings = wanted(own, architecture="tests.foreign:drawn", weights=weights)
    with pytest.raises(
        Interrupted if persistent else BundleError, match=None if persistent else "each time it is built"
    ):
        create(settings, tmp_path / "bundle")


def test_channels_keep_their_place_where_layers_run_in_another_order() -> None:
    network = batchnorm_net().eval()
    model = AdaptableModel(network)
    frames = torch.randn(5, 1, SIDE, SIDE)
    model.fit_layout(frames)
    assert model.memory_format is torch.contiguous_format
    assert [layer.place.layer for layer in model.layers] == ["last_norm", "norm"]
    rows = model.source_affine.expand(5, -1).clone()
    place = model.layers[0].place
    rows[:, place.scale : place.end] = 0
    _, features, first = model.forward_with_inputs(frames, rows)
    assert (features[:, :16] == 0).all()
    assert not (features[:, 16:] == 0).all()
    assert first.shape == (5, 16)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "nowhere:build", "json:build", "odd:"])
def test_architectures_that_are_not_there(name: str) -> None:
    with pytest.raises(BundleError, match=r"list it under bundle\.factories"):
        build_network(name, {})
    with pytest.raises(BundleError, match=f"architecture '{name}'"):
        build_network(name, {}, [name])


def test_a_factory_that_fails() -> None:
    with pytest.raises(BundleError, match=r"does not take the bundle's arguments \{'classes': 'x'\}"):
        build_network("groupnorm-cnn", {"classes": "x"})


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("under", "half"), [("state_dict", False), ("state_dict", True), ("net", False)])
def test_checkpoints_as_training_loops_leave_them(tmp_path: Path, under: str, half: bool) -> None:
    source = batchnorm_net()
    weights = {f"module.{name}": t.half() if half and t.is_floating_point() else t for name, t in _weights(source)}
    torch.save({"epoch": 3, under: weights}, tmp_path / "w.pt")
    said: list[str] = []
    network = batchnorm_net()
    shipped = load_weights(network, read_weights(tmp_path / "w.pt", said.append), tmp_path / "w.pt", said.append)
    for name, tensor in _weights(source):
        torch.testing.assert_close(shipped[name], tensor, rtol=1e-3, atol=1e-3)
        assert shipped[name].dtype == tensor.dtype
    assert ("converted to float32" in " ".join(said)) == half
    assert "dropout" in " ".join(said)
    assert not network.training


def _weights(network: nn.Module) -> list[tuple[str, Tensor]]:
    return list(network.state_dict().items())


@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("own", ["", "module."])
def test_names_that_wrappers_put_in_front(tmp_path: Path, wrapped: str, own: str) -> None:
    """What a network calls its own parts is left alone, whatever it looks like."""
    source, network = batchnorm_net(), batchnorm_net()
    torch.save({f"{wrapped}{own}{name}": t for name, t in _weights(source)}, tmp_path / "w.pt")
    whole = nn.ModuleDict({"module": network}) if own else network
    load_weights(whole, read_weights(tmp_path / "w.pt", quiet), tmp_path / "w.pt", quiet)
    for (_, expected), (_, found) in zip(_weights(source), _weights(network), strict=True):
        assert torch.equal(found, expected)


def test_the_means_of_weights_that_torch_keeps(tmp_path: Path) -> None:
    source, network = batchnorm_net(), batchnorm_net()
    torch.save({"model": AveragedModel(source).state_dict(), "model_ema": source.state_dict()}, tmp_path / "w.pt")
    said: list[str] = []
    load_weights(network, read_weights(tmp_path / "w.pt", said.append), tmp_path / "w.pt", quiet)
    assert said == ["weights: taken from 'model' of the checkpoint, not from model_ema"]
    for (_, expected), (_, found) in zip(_weights(source), _weights(network), strict=True):
        assert torch.equal(found, expected)


class Particular(nn.Linear):
    def _load_from_state_dict(self, *_: Any) -> None:
        raise ValueError("of another version")


def test_a_network_that_will_not_have_them(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"w.pt does not fit the network: of another version; check --model-args"):
        load_weights(Particular(2, 2), {"weight": torch.zeros(2, 2)}, tmp_path / "w.pt", quiet)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def load(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, tmp_path / "w.safetensors")
        path = tmp_path / "w.safetensors"
        load_weights(batchnorm_net(), read_weights(path, quiet), path, quiet)

    weights = dict(_weights(batchnorm_net()))
    with pytest.raises(BundleError, match=r"lacks head.bias and has odd"):
        load({name: t for name, t in weights.items() if name != "head.bias"} | {"odd": torch.zeros(1)})
    with pytest.raises(BundleError, match=r"size mismatch for head.bias.*check --model-args"):
        load(weights | {"head.bias": torch.zeros(4)})
    with pytest.raises(BundleError, match=r"weight 'head.bias' is not finite"):
        load(weights | {"head.bias": torch.full((3,), torch.nan)})


def test_files_that_are_no_weights(own: Path, tmp_path: Path) -> None:
    torch.save(batchnorm_net(), tmp_path / "whole.pt")
    with pytest.raises(BundleError, match=r"would run code if it were loaded; save the weights alone"):
        read_weights(tmp_path / "whole.pt", quiet)
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(BundleError, match=r"no file of weights|would run code"):
            read_weights(tmp_path / name, quiet)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BundleError, match="no named tensors; save"):
        read_weights(tmp_path / "list.pt", quiet)
    torch.save({"epoch": 1, "ema": batchnorm_net().state_dict()}, tmp_path / "list.pt")
    with pytest.raises(BundleError, match="no named tensors, but epoch, ema; save"):
        read_weights(tmp_path / "list.pt", quiet)
    with pytest.raises(BundleError, match="cannot read the weights"):
        read_weights(tmp_path / "absent.pt", quiet)
    for damaged in (b"\x80\x02.", b"\x80\x02}q\x00J"):  # pickles at which torch raises IndexError and struct.error
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(BundleError, match=r"damaged.pt is no file of weights: "):
            read_weights(tmp_path / "damaged.pt", quiet)
    whole = (own / "batchnorm_net.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"cut.pt is no file of weights: it is cut off or damaged"):
        read_weights(tmp_path / "cut.pt", quiet)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(BundleError, match=r"empty.pt is no file of weights: it ends too early"):
        read_weights(tmp_path / "empty.pt", quiet)


# --- images ------------------------------------------------------------------------------------------------------


def test_parts_share_no_image_and_have_every_class() -> None:
    images, labels = pictures(150, 0)
    images = np.concatenate([images, images[:7]])
    labels = np.concatenate([labels, labels[:7]])
    once = without_duplicates(Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)), quiet)
    assert len(once) == 150
    parts = split(once, 3, 0, quiet)
    seen = [image.numpy().tobytes() for part in parts.values() for image in part.images]
    assert len(set(seen)) == len(seen) == 150
    for part in parts.values():
        assert part.labels is not None
        assert set(part.labels.tolist()) == {0, 1, 2}


def test_parts_are_in_no_order_of_classes() -> None:
    """The correction of single frames takes the first images of a part for all: sorted, they were of one class."""
    images, labels = pictures(300, 0)
    order = np.argsort(labels, kind="stable")
    parts = split(Images(torch.from_numpy(images[order]).unsqueeze(1), torch.from_numpy(labels[order])), 3, 0, quiet)
    for part in parts.values():
        assert part.labels is not None
        assert set(part.labels[: len(part) // 3].tolist()) == {0, 1, 2}


def test_too_few_images() -> None:
    images, labels = pictures(90, 0)
    with pytest.raises(DataError, match="there are 90; 100 are needed"):
        split(Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)), 3, 0, quiet)
    images, labels = pictures(120, 0)
    labels[:2] = 3
    with pytest.raises(DataError, match="class 3 has 2"):
        split(Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)), 4, 0, quiet)
    with pytest.raises(DataError, match="outside of 0 to 2"):
        split(Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)), 3, 0, quiet)


def test_classes_without_images_are_said(own: Path, tmp_path: Path) -> None:
    images, labels = pictures(150, 0)
    said: list[str] = []
    split(Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)), 5, 0, said.append)
    assert said == ["data: 2 of 5 classes have no image, so nothing is known of how they fare"]


def test_images_of_other_sizes(own: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    Image.new("RGB", (40, 20)).save(folder / "bolt" / "large.png")
    with pytest.raises(DataError, match="2 different sizes; say --size WxH"):
        create(wanted(own, data=folder), tmp_path / "bundle")
    (folder / "nut" / "broken.png").write_bytes(b"\x89PNG nothing")
    said: list[str] = []
    paths = sorted(folder.rglob("*.png"))
    preprocess = Preprocess(mode="L", width=SIDE, height=SIDE, mean=[0.3], std=[0.2])
    images = read_files(paths, [0] * len(paths), preprocess, decode, 1_000, 0, said.append)
    assert images.images.shape == (151, 1, SIDE, SIDE)
    assert "broken.png (" in said[0]
    assert len(read_files(paths, None, preprocess, decode, 100, 0, quiet)) in (99, 100)


def test_folders_and_labels_that_do_not_match(own: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("bolt\nnut\n")
    with pytest.raises(DataError, match="folder 'washer' is none of the 2 labels"):
        create(wanted(own, labels=tmp_path / "labels.txt"), tmp_path / "bundle")
    (tmp_path / "labels.txt").write_text("bolt\nnut\nwasher\nscrew\n")
    with pytest.raises(BundleError, match="has 3 classes, the labels are 4"):
        create(wanted(own, labels=tmp_path / "labels.txt"), tmp_path / "bundle")
    (tmp_path / "labels.txt").write_text("washer\nbolt\nnut\n")
    with pytest.raises(BundleError, match=r"about as chance has it: check .*order of --labels"):
        create(wanted(own, labels=tmp_path / "labels.txt"), tmp_path / "bundle")
    with pytest.raises(DataError, match=r"^cannot read labels \S+none.txt: No such file or directory$"):
        read_labels(tmp_path / "none.txt", own)
    (tmp_path / "labels.txt").write_text("nut\nnut\n")
    with pytest.raises(DataError, match="stands there twice"):
        read_labels(tmp_path / "labels.txt", own)
    with pytest.raises(DataError, match="no folder per class"):
        read_labels(None, tmp_path)
    with pytest.raises(DataError, match="absent is no folder of images"):
        read_labels(None, tmp_path / "absent")
    (tmp_path / "labels.txt").write_text("bolt\nnut\n", encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels.txt", own) == ["bolt", "nut"]
    for name in ("bolt", "nut", ".ipynb_checkpoints"):
        (tmp_path / "images" / name).mkdir(parents=True)
    assert read_labels(None, tmp_path / "images") == ["bolt", "nut"]


@pytest.mark.parametrize("name", [b"two\nlines", b"caf\xe9"])
def test_folders_whose_names_are_no_labels(own: Path, tmp_path: Path, name: bytes) -> None:
    """Said before anything is measured, not when the labels are written."""
    (tmp_path / os.fsdecode(name)).mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"is no line of text in UTF-8, as a label must be; rename it"):
        read_labels(None, tmp_path)


def test_what_pillow_refuses_is_left_out(tmp_path: Path) -> None:
    """It says so with more kinds of error than that of a file that cannot be read."""
    text = PngInfo()
    text.add_text("comment", "x" * (3 << 20), zip=True)
    Image.new("L", (9, 9)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(DataError, match=r"none of the 1 images can be read, first .*a.png"):
        common_size([tmp_path / "a.png"])
    Image.new("L", (7, 5)).save(tmp_path / "b.png")
    assert common_size([tmp_path / "a.png", tmp_path / "b.png"]) == (7, 5)


def test_an_output_that_cannot_be_written(own: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is there already"):
        create(wanted(own), tmp_path / "file")
    with pytest.raises(ConfigError, match=r"bundle cannot be written: Not a directory; name another --output"):
        create(wanted(own), tmp_path / "file" / "bundle")


def test_a_stage_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdict.unfinished").symlink_to("/dev/full")
    with pytest.raises(
        ConfigError, match=r"verdict.json cannot be written: No space left .* run the same command again"
    ):
        meta.create.run._keep(tmp_path / "verdict.json", b"{}")


def test_arrays(own: Path, tmp_path: Path) -> None:
    images, labels = pictures(150, 0)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    settings = wanted(own, data=tmp_path / "data.npz", labels=tmp_path / "labels.txt")
    assert create(settings, tmp_path / "bundle").preprocess.width == SIDE
    with pytest.raises(DataError, match="holds L images of 12x12"):
        create(settings.model_copy(update={"width": 9, "height": 9}), tmp_path / "other")
    np.savez(tmp_path / "odd.npz", images=images.astype(np.float32), labels=labels)
    with pytest.raises(DataError, match="must be uint8"):
        read_npz(tmp_path / "odd.npz", 1_000, 0)
    np.savez(tmp_path / "odd.npz", images=images[:0], labels=labels[:0])
    with pytest.raises(DataError, match=r"odd.npz: 'images' is empty"):
        read_npz(tmp_path / "odd.npz", 1_000, 0)
    np.savez(tmp_path / "odd.npz", images=images, labels=labels[:9])
    with pytest.raises(DataError, match="one for each of the 150 images"):
        read_npz(tmp_path / "odd.npz", 1_000, 0)
    np.savez(tmp_path / "odd.npz", images=np.array([{}]), labels=labels)
    with pytest.raises(DataError, match=r"an .npz with the arrays"):
        read_npz(tmp_path / "odd.npz", 1_000, 0)


def test_arrays_that_are_damaged(tmp_path: Path) -> None:
    images, labels = pictures(150, 0)
    np.savez_compressed(tmp_path / "data.npz", images=images, labels=labels)
    content = (tmp_path / "data.npz").read_bytes()
    for damaged in (content[:999], content[:99] + bytes(99) + content[198:], content[:400] + b"x" + content[401:]):
        (tmp_path / "data.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"an .npz with the arrays"):
            read_npz(tmp_path / "data.npz", 1_000, 0)


# --- the verdict -------------------------------------------------------------------------------------------------


def settings_with(gain: float, healthy: float, error: float = 0.004) -> list[Measured]:
    shifts = ("light_failing", "focus_loss", "shot_noise", "haze", "tilt")
    found = [Measured(setting=s, frames=640, source=0.6, adapted=0.6 + gain, error=error) for s in shifts]
    return [*found, Measured(setting="no shift", frames=640, source=0.9, adapted=0.9 + healthy, error=error)]


@pytest.mark.parametrize(
    ("gain", "healthy", "error", "expected", "reason"),
    [
        (0.08, -0.004, 0.004, "adapt", "+8.0"),
        (0.015, 0.0, 0.004, "adapt with care", "the gain is small"),
        (0.08, -0.03, 0.004, "adapt with care", "it loses there"),
        (0.08, -0.03, 0.02, "adapt with care", "cannot be ruled out"),
        (0.02, -0.06, 0.004, "do not adapt", "loses more there"),
        (0.0, 0.0, 0.004, "do not adapt", "too small"),
        (0.03, 0.0, 0.05, "do not adapt", "told from chance"),
        (-0.05, 0.0, 0.004, "do not adapt", "too small"),
    ],
)
def test_verdicts(gain: float, healthy: float, error: float, expected: str, reason: str) -> None:
    recommendation, reasons = recommend(settings_with(gain, healthy, error))
    assert recommendation == expected
    assert reason in " ".join(reasons)


def test_what_holds_for_cameras_without_runs_of_a_class() -> None:
    runs = Measured(setting="no shift, classes in runs", frames=640, source=0.9, adapted=0.6, error=0.01)
    recommendation, reasons = recommend([*settings_with(0.08, -0.004), runs])
    assert recommendation == "do not adapt"
    assert reasons[-1] == "for cameras that never show one class for long: adapt"
    _, reasons = recommend([*settings_with(0.0, -0.02), runs.model_copy(update={"adapted": 0.9})])
    assert "one class for long" not in " ".join(reasons)


def a_method(classes: int = 3, **changes: Any) -> tuple[AdaptableModel, Any, LearnedOptimizer]:
    torch.manual_seed(3)
    model = AdaptableModel(layernorm_net(classes))
    source = feature_statistics(model.forward_with_features(torch.randn(64, 1, SIDE, SIDE))[1])
    learned = LearnedOptimizer(GeneratorSettings.model_validate(changes), model).requires_grad_(False)
    return model, source, learned


def test_a_single_micro_batch_would_measure_nothing(own: Path) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 32"):
        wanted(own, frames=31)


def test_a_method_that_does_nothing_gains_nothing() -> None:
    model, source, learned = a_method(class_filter=False)
    method = PiecewiseMGG(model, source, learned, 3, 32)
    method.step_scale = 0.0
    images, labels = pictures(120, 0)
    held_out = Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))
    found = measure(method, held_out, Preprocessing(torch.tensor([0.3]), torch.tensor([0.2])), 48, 1, 0, quiet)
    assert [(m.gain, m.error) for m in found] == [(0.0, 0.0)] * 7
    method.step_scale = 10.0
    found = measure(method, held_out, Preprocessing(torch.tensor([0.3]), torch.tensor([0.2])), 48, 2, 0, quiet)
    assert any(m.gain for m in found)
    assert [m.frames for m in found] == [2 * 48] * 7


def test_cameras_that_differ_more_than_their_frames_explain_make_the_error_larger() -> None:
    mixed = torch.tensor([[1.0, 0.0] * 50] * 2)  # cameras alike
    apart = torch.tensor([[1.0] * 100, [0.0] * 100])  # the same frames, all that gain from one camera
    of_frames = math.sqrt(0.25 / 200)
    assert standard_error(mixed, 1_000) == pytest.approx(of_frames)
    assert standard_error(apart, 1_000) == pytest.approx(math.sqrt(of_frames**2 + 0.5 / 2))
    assert standard_error(mixed, 50) == pytest.approx(2 * of_frames)  # each image is seen four times
    assert standard_error(mixed[:1], 1_000) == pytest.approx(math.sqrt(0.25 / 100))


def test_a_few_streams_at_a_time_give_what_all_at_once_give() -> None:
    model, source, learned = a_method(memory_precision="float32")
    whole, pieces = MGG(model, source, learned, 3), PiecewiseMGG(model, source, learned, 3, 8)
    state, other = whole.fresh(5), pieces.fresh(5)
    stream = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 4, 4])
    for _ in range(3):
        frames = torch.randn(len(stream), 1, SIDE, SIDE)
        forward, piecewise = whole.serve(frames, stream, state), pieces.serve(frames, stream, other)
        torch.testing.assert_close(piecewise.answer, forward.answer)
        torch.testing.assert_close(piecewise.features, forward.features)
        torch.testing.assert_close(piecewise.head, forward.head)
        update, joined = whole.update(forward), pieces.update(piecewise)
        torch.testing.assert_close(joined.signals, update.signals)
        state, other = update.state, joined.state
        for name, tensor in state.items():
            # As many streams, as the products round.
            rounding = {"rtol": 1e-4, "atol": 1e-5} if name.startswith("memory_") else {}
            torch.testing.assert_close(other[name], tensor, **rounding)


def test_an_altered_verdict_is_refused(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    path = shutil.copytree(made[0], tmp_path / "bundle") / "verdict.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"gain": 0.5}))
    with pytest.raises(BundleError, match=r"verdict.json"):
        load_bundle(tmp_path / "bundle", ["tests.foreign:batchnorm_net"])


def test_bundles_without_a_verdict() -> None:
    assert read_verdict(SHIPPED_BUNDLE) is None
