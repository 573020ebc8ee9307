"""NCFM against loops written out by hand, class after class, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import methods, nets
from ddfast.augment import DSA
from ddfast.data import normalise
from ddfast.distill import distill
from ddfast.methods import Run, characteristic, ncfm
from ddfast.methods.feature_matching import RealBatch
from ddfast.methods.pretrained import FINAL, INITIAL
from ddfast.nets.sampling import released_frequencies, sampled_frequencies
from ddfast.random import generator, seed_of
from ddfast.reference.frequencies import frequencies

SETTINGS: dict[str, Any] = {
    "ipc": 1,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "factor": 2,
    "num_freqs": 40,
    "num_premodel": 2,
    "pretrain_epochs": 3,
    "batch_train": 6,
    "lr_img": 0.05,
    "weight_decay": 0.1,
    "iterations": 3,
}


def prepared(make_run, dataset, **settings: Any) -> Run:
    run = make_run("ncfm", dataset, **SETTINGS | settings)
    for _ in ncfm.prepare(run):
        pass
    return run


def go(run: Run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(ncfm.step(run))
        run.iteration += 1
    return history


def crops(s: Tensor, factor: int) -> Tensor:
    """All crops of every image, at full size."""
    side = s.shape[-1] // factor
    parts = [
        image[None, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
        for image in s
        for i in range(factor)
        for j in range(factor)
    ]
    size = s.shape[-2:]
    return torch.cat([F.interpolate(p, size=size, mode="bilinear") for p in parts])


def distance(x: Tensor, y: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    """Of two sets of features, as the paper writes it."""
    a, b = (
        torch.exp(1j * (F.normalize(each, dim=1) @ t.T).to(torch.complex128)).mean(0)
        for each in (x, y)
    )
    amplitude = (a.abs() - b.abs()) ** 2
    phase = 2 * (a.abs() * b.abs() - a.real * b.real - a.imag * b.imag)
    return 300 * (alpha * amplitude + beta * phase.clamp(min=1e-12)).sqrt().mean()


def literal(dataset, run: Run, iterations: int) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The published algorithm, with steps class after class or one for all of them."""
    config, classes = run.config, range(dataset.num_classes)
    joint = config.step == "joint"

    def random(purpose: str, *step: int) -> torch.Generator:
        return generator(config.seed, purpose, *step)

    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (dataset.mean, dataset.std)
    )
    state = {name: value.clone() for name, value in run.state.items()}
    ascending = {
        name.removeprefix("sampling network "): value.requires_grad_()
        for name, value in state.items()
        if name.startswith("sampling network ")
    }
    climb = None
    if config.sampling_net == "learned":
        rates = config.lr_sampling_net, config.momentum_sampling_net
        climb = torch.optim.SGD(list(ascending.values()), *rates, maximize=True)
    images = run.images.detach().clone().requires_grad_()
    optimiser = torch.optim.AdamW(
        [images], config.lr_img, (config.momentum, 0.999), weight_decay=config.weight_decay
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=ncfm.PATIENCE
    )
    augment = DSA(config.aug_type, mode="C")
    net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size).double()
    history = []
    for it in range(iterations):
        choice = random("network", it)
        number = int(torch.randint(config.num_premodel, (), generator=choice))
        share = float(torch.rand((), generator=choice, dtype=torch.float64))
        before, after = (state[name.format(number)] for name in (INITIAL, FINAL))
        with torch.no_grad():
            images.clamp_(0, 1)
        total = torch.zeros(len(classes), dtype=torch.float64)
        for phase in ("augmentation", "calibration"):
            weights = share * before + (1 - share) * after if phase == "augmentation" else after
            torch.nn.utils.vector_to_parameters(weights.clone(), net.parameters())
            draw = augment.draw(
                random(phase, it), dataset.size, count=len(classes), independent=True
            )
            batches = random("real images", it)
            if phase == "calibration" and not config.calib_weight:
                continue
            losses = []
            for c in classes:
                s = images[c * config.ipc : (c + 1) * config.ipc]
                s = (crops(s, config.factor) - mean) / std
                s = augment(s, draw[:, c : c + 1])
                if phase == "calibration":
                    label = torch.full((len(s),), c)
                    loss = config.calib_weight * F.cross_entropy(net(s), label)
                else:
                    chosen = run.sampler.sample(c, config.batch_real, batches)
                    if config.real_batches == "first":
                        members = (dataset.train_labels == c).nonzero()[:, 0]
                        chosen = members[: config.batch_real]
                    x = normalise(
                        dataset.train_images[chosen], dataset.mean, dataset.std, torch.float64
                    )
                    x = net.embed(augment(x, draw[:, c : c + 1])).detach()
                    if config.sampling_net == "learned":
                        t = sampled_frequencies(
                            ascending, config.num_freqs, random("frequencies", it, c)
                        )
                    elif config.sampling_net == "released":
                        t = released_frequencies(ascending, random("frequencies", it, c))
                        t = t.detach().repeat(16, 1)
                    else:
                        seed = seed_of(config.seed, "frequencies", it)
                        t = frequencies(
                            config.num_freqs, x.shape[1], seed, 1.0, c, 1, torch.float64
                        )[0]
                    loss = distance(net.embed(s), x, t, config.alpha, config.beta)
                total[c] += loss.detach()
                losses.append(loss)
                if joint and c < classes[-1]:
                    continue
                optimiser.zero_grad()
                if climb is not None:
                    climb.zero_grad()
                (sum(losses) if joint else loss).backward()
                optimiser.step()
                if climb is not None and phase == "augmentation":
                    climb.step()
        plateau.step(total.mean().item())
        history.append(total)
    return images.detach(), history, {name: value.detach() for name, value in ascending.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ipc": 2, "init": "noise", "factor": 1, "calib_weight": 0.0},
        {"step": "per_class"},
        {"real_batches": "first", "step": "per_class", "calib_weight": 0.3},
        {"sampling_net": "learned"},
        {"sampling_net": "learned", "step": "per_class", "num_freqs": 33},
        {"sampling_net": "released"},
        {"alpha": 0.2, "beta": 0.9, "aug_type": "none"},
        {"alpha": 0.0, "beta": 1.0, "aug_type": "color_flip", "momentum": 0.0},
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, monkeypatch, settings) -> None:
    """Four iterations; with a patience of 1 the learning rate falls in the course of them."""
    monkeypatch.setattr(ncfm, "PATIENCE", 1)
    monkeypatch.setattr(ncfm, "THRESHOLD", 1e-4)
    dataset = make_dataset([9, 4, 12])
    run = prepared(make_run, dataset, **settings)
    start, state = run.images.detach().clone(), run.state
    expected, losses, ascended = literal(dataset, run, 4)
    found = go(run, 4)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-10, atol=1e-10)
    assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # every image moved
    for name, value in ascended.items():
        now = run.state[f"sampling network {name}"]
        torch.testing.assert_close(now, value, rtol=1e-10, atol=1e-10)
        same = torch.equal(now, state[f"sampling network {name}"])
        assert same == (run.config.sampling_net == "released"), name
