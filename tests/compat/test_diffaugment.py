"""`DiffAugment` against the published procedure, written out with torch's own operations.

The procedure (shared by real and synthetic images): a counter starts at the seed; every draw
reseeds the global generator with it and adds one; draws are vectors over the batch, of which a
siamese call uses the first entry for all images.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ddfast.compat.dc import DiffAugment, ParamDiffAug
from ddfast.testing import assert_same_bits, unchanged

EVERY = "color_crop_cutout_flip_scale_rotate"
SEEDS = [*range(12), 4711, 99_999]


def images(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Published:
    """The procedure for one call; seed -1: no reseeding, a number of its own for each image."""

    def __init__(self, x, strategy, seed, mode="S", **settings):
        self.counter, self.siamese, self.device = seed, seed != -1, x.device
        self.settings = vars(ParamDiffAug()) | settings
        self.result = x
        names = strategy.split("_")
        if mode == "S":
            self.reseed()
            names = [names[torch.randint(0, len(names), (1,)).item()]]
        for name in names:
            self.result = getattr(self, name)(self.result, *x.shape)

    def reseed(self):
        if self.siamese:
            torch.manual_seed(self.counter)
            self.counter += 1

    def first(self, drawn):
        return drawn[:1].expand_as(drawn) if self.siamese else drawn

    def uniform(self, n, dtype=torch.float32, device=None):
        self.reseed()
        return self.first(torch.rand(n, dtype=dtype, device=device or self.device))

    def integers(self, n, low, high):
        self.reseed()
        return self.first(torch.randint(low, high, (n,), device=self.device)).tolist()

    def color(self, x, n, c, h, w):
        x = x + ((self.uniform(n, x.dtype) - 0.5) * self.settings["brightness"]).view(n, 1, 1, 1)
        grey = x.mean(1, keepdim=True)
        factor = (self.uniform(n, x.dtype) * self.settings["saturation"]).view(n, 1, 1, 1)
        x = grey + factor * (x - grey)
        level = x.mean((1, 2, 3), keepdim=True)
        factor = (self.uniform(n, x.dtype) + self.settings["contrast"]).view(n, 1, 1, 1)
        return level + factor * (x - level)

    def crop(self, x, n, c, h, w):
        limits = [int(s * self.settings["ratio_crop_pad"] + 0.5) for s in (h, w)]
        shifts = [self.integers(n, -k, k + 1) for k in limits]
        padded = F.pad(x, (limits[1], limits[1], limits[0], limits[0]))
        return torch.stack(
            [
                image[:, limits[0] + i : limits[0] + i + h, limits[1] + j : limits[1] + j + w]
                for image, i, j in zip(padded, *shifts, strict=True)
            ]
        )

    def cutout(self, x, n, c, h, w):
        sides = [int(s * self.settings["ratio_cutout"] + 0.5) for s in (h, w)]
        centres = [
            self.integers(n, 0, s + 1 - side % 2) for s, side in zip((h, w), sides, strict=True)
        ]
        mask = torch.ones(n, 1, h, w, dtype=x.dtype, device=x.device)
        for k, (i, j) in enumerate(zip(*centres, strict=True)):
            top, left = i - sides[0] // 2, j - sides[1] // 2
            mask[k, 0, max(top, 0) : top + sides[0], max(left, 0) : left + sides[1]] = 0
        return x * mask

    def flip(self, x, n, c, h, w):
        chosen = self.uniform(n) < self.settings["prob_flip"]
        return torch.where(chosen.view(n, 1, 1, 1), x.flip(3), x)

    def sampled(self, x, rows):
        theta = torch.stack([torch.stack(row, 1) for row in rows], 1).to(x)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def scale(self, x, n, c, h, w):
        ratio, zero = self.settings["ratio_scale"], torch.zeros(n)
        width = ratio - 1.0 / ratio
        sx, sy = (self.uniform(n, device="cpu") * width + 1.0 / ratio for _ in range(2))
        return self.sampled(x, [(sx, zero, zero), (zero, sy, zero)])

    def rotate(self, x, n, c, h, w):
        largest = self.settings["ratio_rotate"]
        angle = (self.uniform(n, device="cpu") - 0.5) * 2 * largest / 180 * math.pi
        cos, sin = torch.cos(angle.double()), torch.sin(angle.double())
        zero = torch.zeros(n)
        return self.sampled(x, [(cos, -sin, zero), (sin, cos, zero)])


@pytest.mark.parametrize("mode", ["S", "M"])
@pytest.mark.parametrize("strategy", [*EVERY.split("_"), EVERY, "flip_color"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_values_and_gradients_for_a_seed(mode, strategy, dtype):
    param = ParamDiffAug()
    param.aug_mode = mode
    # Copies are copies; the rest differs by rounding, in float32 mostly by that of torch's grid.
    exact = not set(strategy.split("_")) & {"color", "scale", "rotate"}
    tolerance = 0 if exact else {torch.float32: 5e-5, torch.float64: 1e-13}[dtype]
    for shape in ((5, 3, 16, 12), (2, 1, 28, 28)):
        x = images(*shape, dtype=dtype).requires_grad_()
        g = images(*shape, seed=1, dtype=dtype)
        for seed in SEEDS:
            before = torch.random.get_rng_state()
            with unchanged(x):
                ours = DiffAugment(x, strategy, seed, param)
            assert torch.equal(before, torch.random.get_rng_state())
            with torch.random.fork_rng(devices=[]):
                published = Published(x, strategy, seed, mode)
            torch.testing.assert_close(ours, published.result, rtol=0, atol=tolerance)
            gradients = [torch.autograd.grad(y, x, g)[0] for y in (ours, published.result)]
            torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)
            assert param.Siamese and param.latestseed == published.counter


@pytest.mark.parametrize("mode", ["S", "M"])
@pytest.mark.parametrize("strategy", [*EVERY.split("_"), EVERY])
def test_without_a_seed_the_numbers_come_from_the_global_generator(mode, strategy):
    param = ParamDiffAug()
    param.aug_mode = mode
    x = images(5, 3, 16, 12, dtype=torch.float64)

    def ours():
        return DiffAugment(x, strategy, param=param)

    def published():
        return Published(x, strategy, -1, mode).result

    for state in range(4):
        results, after = [], []
        for call in (ours, published):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(state)
                results.append(call())
                after.append(torch.random.get_rng_state())
        torch.testing.assert_close(*results, rtol=0, atol=1e-13)
        assert torch.equal(*after), "a different number of draws"
        assert not param.Siamese and param.latestseed == -1


@pytest.mark.parametrize("strategy", EVERY.split("_"))
def test_a_generator_takes_the_place_of_the_global_one(strategy):
    x = images(6, 3, 16, 12, dtype=torch.float64)
    ours = DiffAugment(x, strategy, generator=torch.Generator().manual_seed(5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = Published(x, strategy, -1).result
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_siamese_and_a_batch_of_one():
    """The official code cannot take one image on current torch; ours gives it the batch's draw."""
    x = images(9, 3, 16, 12)
    for seed in SEEDS:
        whole = DiffAugment(x, EVERY, seed, ParamDiffAug())
        for count in (1, 4):
            assert_same_bits(DiffAugment(x[:count], EVERY, seed, ParamDiffAug()), whole[:count])


def test_changed_parameters_are_used():
    x = images(4, 3, 16, 12, dtype=torch.float64)
    settings = {
        "prob_flip": 1.0,
        "ratio_scale": 1.7,
        "ratio_rotate": 90.0,
        "ratio_crop_pad": 0.4,
        "ratio_cutout": 0.3,
        "brightness": 3.0,
        "saturation": 0.5,
        "contrast": 2.0,
    }
    param = ParamDiffAug()
    for name, value in settings.items():
        assert hasattr(param, name)
        setattr(param, name, value)
    for strategy in EVERY.split("_"):
        for seed in range(4):
            with torch.random.fork_rng(devices=[]):
                expected = Published(x, strategy, seed, **settings).result
            found = DiffAugment(x, strategy, seed, param)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
            assert not torch.equal(found, DiffAugment(x, strategy, seed)) or strategy == "flip"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = images(3, 3, 8, 8, dtype=dtype)
    for strategy in EVERY.split("_"):
        y = DiffAugment(x, strategy, 3)
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("strategy", ["", "none", "None"])
def test_identity(strategy):
    x = images(2, 3, 4, 4)
    assert DiffAugment(x, strategy, 3, ParamDiffAug()) is x


def test_the_official_names_and_values():
    param = ParamDiffAug()
    expected = {
        "aug_mode": "S",
        "prob_flip": 0.5,
        "ratio_scale": 1.2,
        "ratio_rotate": 15.0,
        "ratio_crop_pad": 0.125,
        "ratio_cutout": 0.5,
        "brightness": 1.0,
        "saturation": 2.0,
        "contrast": 0.5,
    }
    assert {name: getattr(param, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("color_blur", 3), ValueError, "unknown operation 'blur'"),
        (("color", -2), ValueError, "seed: got -2"),
        (("color", 1.5), TypeError, "float"),
        (("color", 3, None, torch.Generator()), ValueError, "generator: given together"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        DiffAugment(images(2, 3, 4, 4), *arguments)


def test_wrong_images_cost_no_random_numbers():
    before = torch.random.get_rng_state()
    with pytest.raises(TypeError, match=r"x: got torch\.uint8"):
        DiffAugment(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "color")
    with pytest.raises(ValueError, match="x: got shape"):
        DiffAugment(torch.zeros(3, 4, 4), "color")
    assert torch.equal(before, torch.random.get_rng_state())
    param = ParamDiffAug()
    param.aug_mode = "X"
    with pytest.raises(ValueError, match="aug_mode: got 'X'"):
        DiffAugment(torch.zeros(2, 3, 4, 4), "color", 3, param)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", EVERY.split("_"))
def test_on_a_gpu(strategy):
    """There the official code draws from the GPU's generator, except for scale and rotate."""
    x = images(300, 3, 16, 12, dtype=torch.float64).cuda()
    for seed in SEEDS:
        before = [torch.random.get_rng_state(), torch.cuda.get_rng_state()]
        found = DiffAugment(x, strategy, seed)
        after = [torch.random.get_rng_state(), torch.cuda.get_rng_state()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        with torch.random.fork_rng(devices=[x.device]):
            expected = Published(x, strategy, seed).result
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
