"""IT-GAN against a loop written out by hand, and what it asks of generators."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ddfast import methods, nets
from ddfast.artefact import Artefact
from ddfast.data import normalise
from ddfast.distill import distill, unfinished
from ddfast.generator import Generator, save
from ddfast.methods import Interrupted, it_gan
from ddfast.random import generator

MODULE = '''
import torch
from torch import nn

class Toy(nn.Module):
    """Images in [-1, 1] of 8x8 pixels and two channels."""
    latent_dim = 6

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 6, 128, generator=random).double())

    def forward(self, latents, labels):
        made = torch.einsum("nd,ndp->np", latents, self.weight[labels])
        return torch.tanh(made).view(-1, 2, 8, 8)

def make():
    return Toy()

def single():
    return Toy().float()

def number():
    return 3

def bounded_by_two():
    toy = Toy()
    toy.forward = lambda latents, labels: 2 * Toy.forward(toy, latents, labels)
    return toy
'''

SETTINGS = {
    "generator": "toy_generators:make",
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "lr_img": 0.05,
    "inversion_steps": 3,
}


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_generators.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def literal(dataset, run, iterations):
    """The latents after some iterations, class by class and with autograd throughout."""
    config = run.config
    make = run.make.args[0]
    latents = run.tensors["latents"].detach().clone().requires_grad_()
    m, v = torch.zeros_like(latents), torch.zeros_like(latents)
    places = it_gan.pairs(run)
    count = min(config.batch_latents, config.ipc)
    history = []
    for it in range(iterations):
        net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size).double()
        nets.initialise(net, generator(config.seed, "network", it))
        indices, counts = run.sampler.sample_all(
            config.batch_real, generator(config.seed, "real images", it)
        )
        draw = run.augment.draw(
            generator(config.seed, "augmentation", it), dataset.size, count=3, independent=True
        )
        random = generator(config.seed, "latents", it)
        losses, used = [], torch.zeros(len(latents), dtype=torch.bool)
        for c, chosen in enumerate(indices.split(counts)):
            rows = c * config.ipc + torch.randperm(config.ipc, generator=random)[:count]
            used[rows] = True
            pixels = make(latents[rows], torch.full((count,), c))
            mean, std = (
                torch.tensor(x, dtype=torch.float64).view(-1, 1, 1)
                for x in (dataset.mean, dataset.std)
            )
            images = ((pixels + 1) / 2 - mean) / std
            real, paired = (
                normalise(dataset.train_images[p], dataset.mean, dataset.std, torch.float64)
                for p in (chosen, places[rows])
            )
            s, x, y = (
                net.embed(run.augment(z, draw[:, c : c + 1])) for z in (images, real, paired)
            )
            apart = ((s - y) ** 2).sum(1).mean()
            losses.append(((s.mean(0) - x.mean(0)) ** 2).sum() + config.diversity * apart)
        history.append(torch.stack(losses).detach())
        (gradient,) = torch.autograd.grad(sum(losses), latents)
        # Adam on the rows of the batch; the others stand still.
        new_m, new_v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        m, v = (torch.where(used[:, None], a, b) for a, b in ((new_m, m), (new_v, v)))
        bias = 1 - 0.9 ** (it + 1), 1 - 0.999 ** (it + 1)
        move = config.lr_img * (m / bias[0]) / ((v / bias[1]).sqrt() + 1e-8)
        with torch.no_grad():
            latents[used] -= move[used]
    return latents.detach(), history


@pytest.mark.parametrize("batch_latents", [2, 256])
@pytest.mark.parametrize("diversity", [0.0, 0.3])
def test_equals_the_literal_loop(make_dataset, make_run, batch_latents, diversity):
    dataset = make_dataset([7, 4, 9])
    run = make_run(
        "it_gan", dataset, ipc=3, batch_latents=batch_latents, diversity=diversity, **SETTINGS
    )
    expected, losses = literal(dataset, run, 4)
    begin, found = run.tensors["latents"].detach().clone(), []
    for _ in range(4):
        found.append(it_gan.step(run))
        run.iteration += 1
    torch.testing.assert_close(run.tensors["latents"].detach(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-9, atol=1e-11)
    assert (run.tensors["latents"] - begin).abs().amax(1).min() > 1e-3  # every row moved


def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run):
    dataset = make_dataset([7, 4, 9])
    runs = [make_run("it_gan", dataset, ipc=3, **SETTINGS) for _ in range(2)]
    runs[1].memory = 60_000
    for run in runs:
        for _ in range(3):
            it_gan.step(run)
            run.iteration += 1
    a, b = (run.tensors["latents"] for run in runs)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_inversion_comes_nearer_to_the_real_images(make_dataset, make_run):
    dataset = make_dataset([7, 4, 9])
    run = make_run("it_gan", dataset, ipc=3, **SETTINGS | {"inversion_steps": 40})
    real = normalise(
        dataset.train_images[it_gan.pairs(run)], dataset.mean, dataset.std, torch.float64
    )
    before = (run.training_set()[0] - real).square().mean()
    said = list(it_gan.prepare(run))
    after = (run.training_set()[0] - real).square().mean()
    assert after < 0.9 * before and len(said) == 3 and "name1" in said[1]
    assert list(it_gan.prepare(run)) == []  # done, and so not done again
    assert dataset.train_labels[it_gan.pairs(run)].tolist() == run.labels.tolist()


def test_a_run_is_resumed_in_its_preparation_and_after(make_dataset, tmp_path, monkeypatch):
    dataset = make_dataset([7, 4, 9])
    settings = SETTINGS | {"generator": "toy_generators:single"}
    config = methods.find("it_gan").config(ipc=2, iterations=5, batch_latents=1, **settings)

    def go(folder):
        return distill("it_gan", dataset, config, tmp_path / folder, progress=False)

    whole = go("whole")
    invert, step = it_gan.invert, it_gan.step
    calls = []

    def interrupted(work, after):
        def call(*arguments, **options):
            calls.append(work)
            if len(calls) == after:
                raise Interrupted
            return work(*arguments, **options)

        return call

    for name, work in (("invert", invert), ("step", step)):
        calls.clear()
        monkeypatch.setattr(it_gan, name, interrupted(work, 2))
        with pytest.raises(KeyboardInterrupt):
            go("parts")
        monkeypatch.setattr(it_gan, name, work)
    with pytest.raises(ValueError, match=r"made by a network; grid\.png"):
        unfinished(tmp_path / "parts")
    again = go("parts")
    assert torch.equal(whole.images, again.images)
    assert (tmp_path / "parts" / "grid.png").exists()
    loaded = Artefact.load(tmp_path / "parts" / "distilled.safetensors")
    assert loaded.images.shape == (6, 2, 8, 8) and loaded.decoder is None
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["method"] == "it_gan"


def test_a_generator_of_ours_serves(make_dataset, tmp_path):
    dataset = make_dataset([5, 5, 5])
    network = Generator(channels=2, classes=3, size=(8, 8), generator=generator(0, "test"))
    recipe = {"dataset": "small", "class_names": list(dataset.class_names)}
    save(network, tmp_path / "generator.safetensors", recipe)
    settings = SETTINGS | {"generator": str(tmp_path / "generator.safetensors")}
    config = methods.find("it_gan").config(ipc=2, iterations=2, **settings)
    made = distill("it_gan", dataset, config, tmp_path / "run", progress=False)
    assert made.images.shape == (6, 2, 8, 8)
    save(network, tmp_path / "other.safetensors", recipe | {"class_names": ["a", "b", "c"]})
    settings["generator"] = str(tmp_path / "other.safetensors")
    config = methods.find("it_gan").config(ipc=2, iterations=2, **settings)
    with pytest.raises(ValueError, match="with other classes"):
        distill("it_gan", dataset, config, tmp_path / "else", progress=False)


def test_errors(make_dataset, make_run):
    dataset = make_dataset([7, 4, 9])
    for name, message in (
        (None, "generator: missing"),
        ("toy_generators:nothing", "has no function 'nothing'"),
        ("toy_generators:bounded_by_two", r"expected \[-1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make_run("it_gan", dataset, ipc=2, **SETTINGS | {"generator": name})
    with pytest.raises(TypeError, match="returned int"):
        make_run("it_gan", dataset, ipc=2, **SETTINGS | {"generator": "toy_generators:number"})
    with pytest.raises(FileNotFoundError):
        make_run("it_gan", dataset, ipc=2, **SETTINGS | {"generator": "nowhere.safetensors"})
    with pytest.raises(ValueError, match=r"ipc: got 5.*class 1 \(name1\) has 4"):
        make_run("it_gan", dataset, ipc=5, **SETTINGS)
    with pytest.raises(ValueError, match="IT-GAN has latents"):
        make_run("it_gan", dataset, ipc=2, parametrisation="bases", **SETTINGS)


def test_what_is_unverified_is_said():
    assert "unverified" in methods.find("it_gan").status
    assert "Unverified." in it_gan.__doc__
    said = [name for name, known in methods.methods().items() if "unverified" in known.status]
    assert said == ["it_gan"]


def test_a_user_module_is_used_as_it_is():
    assert isinstance(it_gan.found("toy_generators:make"), nn.Module)
