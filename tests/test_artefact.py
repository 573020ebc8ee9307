"""The saved file: bit-exact, the same bytes, never unpickled, refused when damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file

from ddfast.artefact import Artefact, load, save
from ddfast.artefact.file import KEY
from ddfast.data import denormalise, normalise, signed_file

MEAN, STD = (0.1, 0.5), (0.3, 0.25)


def fields(**changed):
    g = torch.Generator().manual_seed(1)
    images = torch.randn((6, 2, 3, 4), generator=g)
    return {
        "images": images,
        "labels": torch.tensor([0, 0, 1, 1, 2, 2]),
        "space": "normalised",
        "mean": MEAN,
        "std": STD,
        "class_names": ("ant", "bee", "čáp"),
        "dataset": "toy",
        "method": "dm",
        "config": {"ipc": 2, "lr_img": 0.1, "nested": {"strategy": None, "steps": [1, 2]}},
        "seed": 7,
    } | changed


def make(**changed) -> Artefact:
    return Artefact(**fields(**changed))


def assert_same(a: Artefact, b: Artefact) -> None:
    for field in dataclasses.fields(Artefact):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype and one.shape == two.shape
            # Bits, not values: signed zeros and all.
            assert one.numpy().tobytes() == two.numpy().tobytes()
        else:
            assert one == two, field.name


def test_round_trip_is_bit_exact(tmp_path):
    special = fields()["images"]
    special.view(-1)[:4] = torch.tensor([-0.0, 1e-45, -3.4e38, 1 / 3])
    soft = torch.rand((6, 3), generator=torch.Generator().manual_seed(2))
    for made in (
        make(images=special),
        make(soft_labels=soft, lr=0.1 + 0.2, space="pixel"),
        make(lr=(0.3, 0.1)),
    ):
        path = made.save(tmp_path / "distilled.safetensors")
        assert_same(made, Artefact.load(path))
        assert Artefact.load(path).config == made.config
    assert set(made.versions) == {"ddfast", "torch"}
    assert made.versions["torch"] == str(torch.__version__)


def test_the_same_artefact_is_the_same_bytes_and_nothing_else_stays(tmp_path):
    contents = set()
    for number in range(5):
        save(make(), tmp_path / f"{number}.safetensors")
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    save(load(tmp_path / "0.safetensors"), tmp_path / "0.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() in contents
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{number}.safetensors" for number in range(5)
    ]


def test_it_owns_its_values():
    source = fields(images=fields()["images"].requires_grad_(), config={"list": (1, 2)})
    made = Artefact(**source)
    kept = made.images.clone()
    with torch.no_grad():
        source["images"].zero_()
        source["labels"].fill_(1)
    source["config"]["list"] = None
    assert torch.equal(made.images, kept) and not made.images.requires_grad
    assert made.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.config == {"list": [1, 2]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3


def test_layouts_are_made_contiguous(tmp_path):
    images = fields()["images"].to(memory_format=torch.channels_last)
    made = make(images=images)
    assert made.images.is_contiguous()
    assert_same(make(), load(made.save(tmp_path / "a.safetensors")))


def test_to_pixels():
    pixels = torch.arange(256, dtype=torch.uint8)[:144].view(6, 2, 3, 4)
    made = make(images=normalise(pixels, MEAN, STD))
    assert torch.equal(made.to_pixels(), pixels)
    assert torch.equal(make(images=pixels / 255, space="pixel").to_pixels(), pixels)
    far = make(images=fields()["images"] * 100)
    assert torch.equal(far.to_pixels(), denormalise(far.images, MEAN, STD))
    assert far.to_pixels().min() == 0 and far.to_pixels().max() == 255


def test_normalised_with_other_constants():
    made = make()
    assert made.normalised(list(MEAN), STD) is made.images
    mean, std = (0.2, 0.4), (0.5, 0.2)
    unit = made.images.double() * torch.tensor(STD).double().view(2, 1, 1)
    unit = unit + torch.tensor(MEAN, dtype=torch.float64).view(2, 1, 1)
    wanted = (unit - torch.tensor(mean, dtype=torch.float64).view(2, 1, 1)) / torch.tensor(
        std, dtype=torch.float64
    ).view(2, 1, 1)
    torch.testing.assert_close(made.normalised(mean, std), wanted.float(), rtol=1e-6, atol=1e-6)
    pixels = torch.rand((6, 2, 3, 4), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        make(images=pixels, space="pixel").normalised(mean, std),
        (pixels - torch.tensor(mean).view(2, 1, 1)) / torch.tensor(std).view(2, 1, 1),
    )
    with pytest.raises(ValueError, match="each of 2 channels"):
        made.normalised((0.5,), (0.5,))


NAN = fields()["images"].clone()
NAN[3, 1, 0, 0] = math.nan
INFINITE = fields()["images"].clone()
INFINITE[5, 0, 2, 3] = -math.inf


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, r"number 3, of class 1 \(bee\), is the first of 1", {"images": NAN}),
        (ValueError, "number 5, of class 2", {"images": INFINITE}),
        (TypeError, "images must be float32", {"images": fields()["images"].double()}),
        (TypeError, "images must be float32", {"images": torch.zeros(6, 2, 3, 4).byte()}),
        (TypeError, "images must be a tensor", {"images": [1.0]}),
        (ValueError, r"\(N, channels, H, W\)", {"images": torch.zeros(6, 2, 3)}),
        (ValueError, "not empty", {"images": torch.zeros(0, 2, 3, 4)}),
        (ValueError, "differ in length: 6 and 5", {"labels": torch.zeros(5).long()}),
        (ValueError, r"labels must lie in 0\.\.2", {"labels": torch.tensor([0, 0, 1, 1, 2, 3])}),
        (ValueError, r"labels must lie in 0\.\.2", {"labels": torch.tensor([0, 0, 1, 1, 2, -1])}),
        (TypeError, "labels must be int64", {"labels": torch.zeros(6)}),
        (ValueError, "space must be one of", {"space": "whitened"}),
        (ValueError, "mean must have one number", {"mean": (0.1,)}),
        (ValueError, "mean must be finite", {"mean": (0.1, math.nan)}),
        (ValueError, "std must be finite and above 0", {"std": (0.1, 0.0)}),
        (TypeError, "std must be a sequence of numbers", {"std": ("a", "b")}),
        (ValueError, "class_names", {"class_names": ()}),
        (ValueError, "class_names", {"class_names": "abc"}),
        (TypeError, "method must be a string", {"method": None}),
        (TypeError, "seed must be an integer", {"seed": 1.5}),
        (TypeError, "config must consist of plain values", {"config": {"a": object()}}),
        (TypeError, "config must consist of plain values", {"config": {"a": math.inf}}),
        (TypeError, "config must be a mapping", {"config": [1]}),
        (ValueError, r"soft_labels must have shape \(6, 3\)", {"soft_labels": torch.zeros(6, 2)}),
        (ValueError, "soft_labels has values", {"soft_labels": torch.full((6, 3), math.inf)}),
        (ValueError, "lr must be finite and above 0", {"lr": -0.1}),
        (ValueError, "lr must be finite and above 0", {"lr": math.nan}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(error, message, changed):
    with pytest.raises(error, match=message):
        make(**changed)


@pytest.fixture
def path(tmp_path):
    return make(lr=0.5).save(tmp_path / "distilled.safetensors")


def test_truncated_at_any_place(path):
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"distilled\.safetensors"):
            load(path)


def test_any_flipped_byte_of_the_data_is_found(path):
    whole = path.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(begin, len(whole), 37):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="do not match its checksum"):
            load(path)


def rewritten(path, change, tensors=None):
    """The file with another header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[KEY])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    save_file(kept if tensors is None else tensors, path, {KEY: json.dumps(header)})


def test_other_versions_and_missing_keys(path):
    whole = path.read_bytes()
    for change, message in (
        (lambda h: h.update(format_version=2), "format version 2, and ddfast .* reads version 1"),
        (lambda h: h.pop("format_version"), "lacks 'format_version'"),
        (lambda h: h.pop("sha256"), "lacks 'sha256'"),
        (lambda h: h.pop("recipe"), "lacks 'recipe'"),
        (lambda h: h["recipe"].pop("mean"), "lacks mean"),
        (lambda h: h["recipe"].update(seed=8), "checksum"),
        (lambda h: h.update(recipe=[]), "lacks space, mean"),
    ):
        path.write_bytes(whole)
        rewritten(path, change)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    rewritten(path, lambda h: None, {"labels": torch.zeros(6).long()})
    with pytest.raises(ValueError, match="lacks images"):
        load(path)


def test_contents_that_do_not_fit_together_name_the_file(path):
    tensors = {"images": torch.full((6, 2, 3, 4), math.nan), "labels": torch.zeros(6).long()}

    def sign(header):
        recipe = json.dumps(header["recipe"], sort_keys=True)
        header["sha256"] = signed_file.digest(tensors, recipe)

    rewritten(path, sign, tensors)
    with pytest.raises(ValueError, match=r"distilled\.safetensors cannot be used: images has"):
        load(path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_nothing_is_unpickled(tmp_path):
    for name, content in (
        ("a.pt", pickle.dumps({"images": Trap()})),
        ("b.safetensors", pickle.dumps(Trap())),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    torch.save({"images": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is no safetensors file"):
        load(tmp_path / "c.pt")


def test_foreign_safetensors_and_missing_files(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(serialise({"images": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"x\.safetensors is no artefact of ddfast"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no artefact at .*nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match="give the artefact's file"):
        load(tmp_path)


def test_a_folder_that_cannot_take_it_costs_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="missing"):
        make().save(tmp_path / "missing" / "a.safetensors")
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match="file"):
        make().save(tmp_path / "file" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        make().save(tmp_path)
    with pytest.raises(TypeError, match="expected an Artefact"):
        save({"images": 1}, tmp_path / "a.safetensors")


def test_what_was_there_survives_a_failure(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on the device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        make(seed=9).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
