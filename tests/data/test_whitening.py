"""Whitening: the four definitions, fewer images than pixels, inverse, and where it is applied."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ddfast import data
from ddfast.artefact import Artefact
from ddfast.data import Dataset, Whitening, fit_whitening, hold_out, normalise, whitened
from ddfast.data.whitening import MODES

MEAN, STD = (0.4, 0.6), (0.2, 0.3)


def pixels(count: int, size: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth noise: pixels that depend on each other, so that there is something to whiten."""
    random = torch.Generator().manual_seed(seed)
    low = torch.rand((count, 2, size, size), generator=random)
    return (255 * (low + low.roll(1, 3) + low.roll(1, 2)) / 3).to(torch.uint8)


def literal(images: torch.Tensor, mode: str, others: torch.Tensor) -> np.ndarray:
    """The definition in NumPy, from pixels; `others` transformed as `images` say."""
    scale = np.repeat(np.array(STD), images[0, 0].numel())
    shift = np.repeat(np.array(MEAN), images[0, 0].numel())
    x, z = (t.flatten(1).double().numpy() / 255 for t in (images, others))
    if mode != "mtt":
        x, z = ((t - shift) / scale for t in (x, z))
    if mode == "kip":
        x, z = (t - t.mean(1, keepdims=True) for t in (x, z))
        x, z = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (x, z))
    middle = x.mean(0) if mode in ("frepo", "mtt") else 0
    covariance = (x - middle).T @ (x - middle) / (len(x) - (mode == "mtt"))
    values, vectors = np.linalg.eigh(covariance)
    added = 0.1 if mode == "mtt" else 0.1 * np.trace(covariance) / len(covariance)
    factors = 1 / np.sqrt(values + added)
    if mode == "kip" and len(x) < len(covariance):
        factors[: len(covariance) - len(x)] = 1
    return (z - middle) @ (vectors @ np.diag(factors) @ vectors.T)


@pytest.mark.parametrize("count", [200, 7, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_definition(mode, count):
    images, others = pixels(count), pixels(5, seed=1)
    fitted = fit_whitening(images, MEAN, STD, mode)
    found = fitted(normalise(others, MEAN, STD, torch.float64))
    expected = torch.from_numpy(literal(images, mode, others)).view(5, 2, 3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    single = fitted(normalise(others, MEAN, STD))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_it_whitens(mode):
    """Of the training images, the covariance's eigenvalues move towards each other."""
    images = pixels(500)
    x = normalise(images, MEAN, STD, torch.float64)
    y = fit_whitening(images, MEAN, STD, mode)(x)

    def spread(t):
        values = torch.linalg.eigvalsh(t.flatten(1).T.cov())[1:]  # kip: one is zero
        return values.max() / values.min()

    assert spread(y) < spread(x) / 2


@pytest.mark.parametrize("mode", ["rfad", "frepo", "mtt"])
def test_the_inverse(mode):
    images = pixels(50)
    x = normalise(images, MEAN, STD)
    fitted = fit_whitening(images, MEAN, STD, mode)
    torch.testing.assert_close(fitted.inverse(fitted(x)), x, rtol=1e-4, atol=1e-4)


def test_the_inverse_of_images_without_length():
    """Brightness and contrast of an image are lost, and the mean contrast stands in."""
    images = pixels(50)
    x = normalise(images, MEAN, STD, torch.float64)
    fitted = fit_whitening(images, MEAN, STD, "kip")
    rows = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
    assert fitted.length == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-12)
    expected = rows / rows.norm(dim=1, keepdim=True) * fitted.length
    torch.testing.assert_close(fitted.inverse(fitted(x)).flatten(1), expected, rtol=1e-4, atol=1e-4)
    brighter = fitted(3 * x + 5)
    torch.testing.assert_close(brighter, fitted(x), rtol=1e-6, atol=1e-6)
    assert fitted(torch.ones(1, 2, 3, 3)).isfinite().all()


def test_svhn_of_rfad_centres_and_divides_each_image():
    images = pixels(40)
    dataset = Dataset("SVHN", images, torch.arange(40) % 2, images, torch.arange(40) % 2,
                      ("a", "b"), MEAN, STD)  # fmt: skip
    assert whitened(dataset, "rfad").whitening.length > 0
    assert whitened(dataset, "frepo").whitening.length == 0
    other = dataclasses.replace(dataset, name="CIFAR10")
    assert whitened(other, "rfad").whitening.length == 0
    assert whitened(other, "none") is other


def test_the_chunk_does_not_matter(monkeypatch):
    images = pixels(23)
    whole = fit_whitening(images, MEAN, STD, "frepo")
    monkeypatch.setattr("ddfast.data.whitening.CHUNK", 18 * 5)
    torch.testing.assert_close(fit_whitening(images, MEAN, STD, "frepo").matrix, whole.matrix)


def test_a_data_set_shows_whitened_images():
    dataset = data.load("digits")
    fitted = whitened(dataset, "frepo")
    some = dataset.test_images[:9]
    plain = dataset.normalised(some)
    assert torch.equal(plain, normalise(some, dataset.mean, dataset.std))
    assert torch.equal(fitted.normalised(some), fitted.whitening(plain))
    held = hold_out(fitted, 0.2, 0)
    assert held.whitening is fitted.whitening


@pytest.mark.parametrize("mode", MODES)
def test_an_artefact_keeps_it(mode, tmp_path):
    images = pixels(12)
    fitted = fit_whitening(images, MEAN, STD, mode)
    x = fitted(normalise(images, MEAN, STD))
    made = Artefact(
        images=x, labels=torch.arange(12) % 2, space="normalised", mean=MEAN, std=STD,
        class_names=("a", "b"), dataset="toy", method="kip", config={}, seed=0, whitening=fitted,
    )  # fmt: skip
    made.save(tmp_path / "set")
    found = Artefact.load(tmp_path / "set")
    assert (found.whitening.mode, found.whitening.length) == (mode, fitted.length)
    for name in ("shift", "matrix"):
        assert torch.equal(getattr(found.whitening, name), getattr(fitted, name))
    assert torch.equal(found.images, x)
    if mode != "kip":
        assert torch.equal(found.to_pixels(), images)
    assert found.picture(tmp_path / "grid.png").stat().st_size > 0
    assert found.unwhitened().whitening is None
    looks = found.normalised((0.0, 0.0), (1.0, 1.0))
    assert torch.equal(looks, found.unwhitened().normalised((0.0, 0.0), (1.0, 1.0)))
    again = (tmp_path / "set").read_bytes()
    found.save(tmp_path / "set")
    assert (tmp_path / "set").read_bytes() == again


def wide_pixels(count: int, height: int = 6, width: int = 9, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    low = torch.rand((count, 2, height, width), generator=random)
    return (255 * (low + low.roll(1, 3) + low.roll(1, 2)) / 3).to(torch.uint8)


def test_blocks_of_large_images(monkeypatch, tmp_path):
    """FRePo's: each position less its mean, then one matrix for all blocks."""
    monkeypatch.setattr("ddfast.data.whitening.BLOCK", 3)
    images, others = wide_pixels(30), wide_pixels(5, seed=1)
    x, z = (normalise(t, MEAN, STD, torch.float64).numpy() for t in (images, others))
    x, z = x - x.mean(0), z - x.mean(0)
    corners = [(top, left) for top in (0, 3) for left in (0, 3, 6)]
    parts = [x[:, :, top : top + 3, left : left + 3].reshape(30, 18) for top, left in corners]
    covariance = np.mean([part.T @ part / 30 for part in parts], 0)
    values, vectors = np.linalg.eigh(covariance)
    matrix = vectors @ np.diag(1 / np.sqrt(values + 0.1 * values.mean())) @ vectors.T
    expected = np.empty_like(z)
    for top, left in corners:
        block = z[:, :, top : top + 3, left : left + 3].reshape(5, 18)
        expected[:, :, top : top + 3, left : left + 3] = (block @ matrix).reshape(5, 2, 3, 3)

    fitted = fit_whitening(images, MEAN, STD, "frepo")
    assert (fitted.block, tuple(fitted.matrix.shape), fitted.size) == (3, (18, 18), 108)
    given = normalise(others, MEAN, STD, torch.float64)
    found = fitted(given)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted.inverse(found), given, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("ddfast.data.whitening.CHUNK", 108 * 7)
    torch.testing.assert_close(fit_whitening(images, MEAN, STD, "frepo").matrix, fitted.matrix)

    made = Artefact(
        images=fitted(normalise(images, MEAN, STD)), labels=torch.arange(30) % 2,
        space="normalised", mean=MEAN, std=STD, class_names=("a", "b"), dataset="toy",
        method="frepo", config={}, seed=0, whitening=fitted,
    )  # fmt: skip
    made.save(tmp_path / "set")
    loaded = Artefact.load(tmp_path / "set")
    assert loaded.whitening.block == 3
    assert torch.equal(loaded.to_pixels(), images)


def test_blocks_that_do_not_fit(monkeypatch):
    monkeypatch.setattr("ddfast.data.whitening.BLOCK", 3)
    with pytest.raises(ValueError, match="are 6x8; mode frepo has blocks of 3 pixels a side"):
        fit_whitening(wide_pixels(5, width=8), MEAN, STD, "frepo")
    same = torch.full((4, 2, 6, 6), 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match="all alike"):
        fit_whitening(same, MEAN, STD, "frepo")
    fitted = fit_whitening(wide_pixels(20), MEAN, STD, "frepo")
    with pytest.raises(ValueError, match="multiples of 3"):
        fitted(torch.zeros(1, 2, 27, 2))
    for block in (-1, True, 2.0):
        with pytest.raises(ValueError, match="block must be an integer of at least 0"):
            Whitening("own", torch.zeros(8), torch.eye(8), block=block)
    with pytest.raises(ValueError, match="blocks of 3 pixels a side do not divide"):
        Whitening("own", torch.zeros(8), torch.eye(8), block=3)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"whitening": "frepo"}, TypeError, "whitening must be a Whitening, got str"),
        ({"space": "pixel"}, ValueError, "whitening is for normalised images of 18 numbers"),
        ({"images": torch.zeros(12, 2, 4, 4)}, ValueError, "whitening is for normalised images"),
    ],
)
def test_an_artefact_refuses_what_does_not_fit(changes, kind, message):
    fitted = fit_whitening(pixels(12), MEAN, STD, "rfad")
    fields = {
        "images": torch.zeros(12, 2, 3, 3), "labels": torch.arange(12) % 2, "space": "normalised",
        "mean": MEAN, "std": STD, "class_names": ("a", "b"), "dataset": "toy", "method": "kip",
        "config": {}, "seed": 0, "whitening": fitted,
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        Artefact(**fields | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((pixels(5), MEAN, STD, "pca"), "mode must be one of kip, rfad, frepo, mtt"),
        ((pixels(1), MEAN, STD, "kip"), "images must be at least two"),
        ((torch.zeros(2, 3, 65, 64, dtype=torch.uint8), MEAN, STD, "kip"), "offered up to 12288"),
        ((torch.full((3, 2, 3, 3), 9, dtype=torch.uint8), MEAN, STD, "frepo"), "all alike"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_whitening(*arguments)


def test_errors_of_a_transform():
    with pytest.raises(TypeError, match="shift must be a float32 tensor"):
        Whitening("own", torch.zeros(2).double(), torch.eye(2))
    with pytest.raises(ValueError, match=r"matrix must have shape \(2, 2\)"):
        Whitening("own", torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        Whitening("own", torch.zeros(2), torch.eye(2) * torch.nan)
    with pytest.raises(ValueError, match="length must be finite"):
        Whitening("own", torch.zeros(2), torch.eye(2), -1.0)
    own = Whitening("own", torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="images must have 2 numbers each"):
        own(torch.zeros(1, 1, 1, 3))
    dataset = data.load("digits")
    with pytest.raises(ValueError, match="whitening is for images of 2 numbers"):
        dataclasses.replace(dataset, whitening=own)
    with pytest.raises(ValueError, match="is whitened already"):
        whitened(whitened(dataset, "kip"), "kip")
