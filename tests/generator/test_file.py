"""The file of a generator: round trip, same bytes, and every kind of damage."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise

from ddfast.generator import Generator, load, save
from ddfast.generator.file import KEY

RECIPE = {"dataset": "digits", "mean": [0.5], "class_names": ["a", "b", "c"]}


@pytest.fixture
def generator() -> Generator:
    made = Generator(3, 1, 8, 3, 2).train()
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        made(torch.randn(6, 3, generator=random), torch.arange(6) % 3)
    return made.eval()


def test_round_trip(generator, tmp_path) -> None:
    path = save(generator, tmp_path / "generator.safetensors", RECIPE)
    found = load(path)
    latents, labels = torch.randn(3, 3, generator=torch.Generator()), torch.arange(3)
    assert torch.allclose(found(latents, labels), generator(latents, labels), atol=1e-4)
    assert found.architecture == generator.architecture
    assert found.recipe == RECIPE
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_the_same_generator_is_the_same_bytes_also_when_read_and_written(
    generator, tmp_path
) -> None:
    first, second, third = (
        save(generator, tmp_path / "1", RECIPE),
        save(generator, tmp_path / "2", RECIPE),
        save(load(tmp_path / "1"), tmp_path / "3"),
    )
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_what_cannot_be_saved(generator, tmp_path) -> None:
    path = tmp_path / "generator.safetensors"
    save(generator, path, RECIPE)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"got Linear, expected ddfast\.generator\.Generator"):
        save(torch.nn.Linear(1, 1, device="meta"), path)
    with pytest.raises(TypeError, match="recipe: got values that are not plain"):
        save(generator, path, {"net": generator})
    with pytest.raises(IsADirectoryError):
        save(generator, tmp_path)
    with pytest.raises(FileNotFoundError):
        save(generator, tmp_path / "no" / "folder")
    with torch.no_grad():
        generator.last.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"last\.bias has values that are not finite"):
        save(generator, path, RECIPE)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_damaged_file_is_found_out(generator, tmp_path) -> None:
    path = save(generator, tmp_path / "g", RECIPE)
    content = path.read_bytes()
    for cut in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=str(path)):
            load(path)
    end = bytearray(content)
    end[-1] ^= 1
    path.write_bytes(end)
    with pytest.raises(ValueError, match="do not match its checksum"):
        load(path)


def rewritten(path, change) -> None:
    """The file with changed tensors and header, but no word about it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[KEY])
    change(tensors, header)
    path.write_bytes(serialise(tensors, {KEY: json.dumps(header)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, h: h.update(format_version=2),
            "format version 2, and ddfast",
        ),
        (lambda t, h: h.pop("architecture"), "it lacks 'architecture'"),
        (lambda t, h: h.pop("sha256"), "it lacks 'sha256'"),
        (lambda t, h: h["recipe"].update(dataset="MNIST"), "do not match its checksum"),
        (lambda t, h: h["architecture"].update(width=3), "do not match its checksum"),
        (lambda t, h: t.pop("last.bias"), "do not match its checksum"),
        (lambda t, h: t["last.bias"].add_(1), "do not match its checksum"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(generator, tmp_path, change, message) -> None:
    path = save(generator, tmp_path / "g", RECIPE)
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"{path} cannot be used: .*{message}"):
        load(path)


def test_what_is_no_generator(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no generator at"):
        load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    path = tmp_path / "other"
    path.write_bytes(serialise({"images": torch.zeros(1)}, {"ddfast": "{}"}))
    with pytest.raises(ValueError, match="is no generator of ddfast: its metadata have no"):
        load(path)
    path.write_text("a text")
    with pytest.raises(ValueError, match="no safetensors file, or it is damaged"):
        load(path)
