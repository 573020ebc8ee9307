"""NCFM against loops written out by hand, class after class, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import nets
from ddfast.augment import DSA
from ddfast.data import normalise
from ddfast.methods import Run, characteristic, feature_matching, ncfm
from ddfast.methods.feature_matching import sweep
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
        {"num_freqs": 1},
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


# --- the statistic ------------------------------------------------------------------------------


def matched(run: Run, **settings: Any) -> tuple[Tensor, Tensor]:
    """Gradient by the images and losses of one matching, without a step."""
    config = run.config
    sampling = characteristic.Sampling(
        run,
        config.sampling_net,
        config.num_freqs,
        config.lr_sampling_net,
        config.momentum_sampling_net,
    )

    def statistic(group):
        return characteristic.distances(group, sampling, config.alpha, config.beta)

    held = characteristic.held(run, sampling, config.batch_real)
    net = run.fresh_net().requires_grad_(False)
    gradients, losses = sweep(run, net, ncfm.real_batch(run), statistic, held=held, **settings)
    return gradients["images"], losses


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_with_equal_weights_it_is_the_distance_of_the_functions(
    make_dataset, make_run, weight
) -> None:
    """alpha = beta: 300 mean sqrt(alpha |phi_r - phi_s|^2), and its gradient."""
    dataset = make_dataset([9, 4, 12])
    run = prepared(make_run, dataset, alpha=weight, beta=weight, aug_type="none", factor=1)
    gradient, losses = matched(run)
    net = run.fresh_net()
    images = run.images.detach().clone().requires_grad_()
    indices, counts = run.sampler.sample_all(run.config.batch_real, run.generator("real images"))
    expected = []
    for c, chosen in enumerate(indices.split(counts)):
        features = [net.embed(run.normalised(images[c : c + 1])), net.embed(run.real(chosen))]
        t = frequencies(
            run.config.num_freqs, features[0].shape[1],
            seed_of(0, "frequencies", 0), 1.0, c, 1, torch.float64,
        )[0]  # fmt: skip
        a, b = (torch.exp(1j * F.normalize(x, dim=1) @ t.T.to(torch.complex128)).mean(0)
                for x in (x.to(torch.complex128) for x in features))  # fmt: skip
        expected.append(300 * (weight * (a - b).abs() ** 2).sqrt().mean())
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-10, atol=0)
    by_images = torch.autograd.grad(sum(expected), images)[0]
    torch.testing.assert_close(gradient, by_images, rtol=1e-9, atol=1e-12)


def test_identical_sets_have_the_smallest_loss_and_a_finite_gradient(
    make_dataset, make_run
) -> None:
    run = prepared(make_run, make_dataset([4, 4, 4]), ipc=4, parametrisation="pixels", batch_real=9)
    with torch.no_grad():  # exactly the real ones
        order = torch.cat([run.sampler.indices(c) for c in range(3)])
        run.images.copy_(run.dataset.train_images[order].double() / 255)
    gradient, losses = matched(run)
    floor = 300 * (0.5 * 1e-12) ** 0.5
    torch.testing.assert_close(losses, torch.full_like(losses, floor), rtol=1e-6, atol=0)
    assert torch.isfinite(gradient).all()


def test_features_of_norm_zero_get_no_gradient() -> None:
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 7, generator=random, dtype=torch.float64)
    by_unit = torch.randn(5, 7, generator=random, dtype=torch.float64)
    leaf = rows.clone().requires_grad_()
    (F.normalize(leaf, dim=1) * by_unit).sum().backward()
    norms = rows.norm(dim=1, keepdim=True)
    units = characteristic.unit(rows, norms)
    torch.testing.assert_close(units, F.normalize(rows, dim=1))
    found = characteristic.through_norm(by_unit, units, norms)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=1e-14)
    nothing = torch.zeros(2, 7, dtype=torch.float64)
    norms = nothing.norm(dim=1, keepdim=True)
    assert not characteristic.unit(nothing, norms).any()
    assert not characteristic.through_norm(by_unit[:2], nothing, norms).any()


@pytest.mark.parametrize("images_at_once", [2, 3])
@pytest.mark.parametrize("sampling_net", ["none", "learned"])
def test_chunks_change_nothing_beyond_rounding(
    make_dataset, make_run, monkeypatch, images_at_once, sampling_net
) -> None:
    """Nor do real images of a class that go through the statistic in parts."""
    dataset, settings = make_dataset([7, 3, 9, 2]), {"factor": 1, "sampling_net": sampling_net}
    whole = prepared(make_run, dataset, **settings)
    go(whole, 3)
    run = prepared(make_run, dataset, **settings)
    monkeypatch.setattr(feature_matching, "at_once", lambda *_: images_at_once)
    parts = []
    class_rows = characteristic.class_rows

    def counted(group, most):
        for c, share, rows in class_rows(group, min(most, 2)):
            parts.append((c, share))
            yield c, share, rows

    monkeypatch.setattr(characteristic, "class_rows", counted)
    go(run, 3)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-10, atol=1e-10)
    for name, value in whole.state.items():
        torch.testing.assert_close(run.state[name], value, rtol=1e-10, atol=1e-9)
    assert len(parts) > 3 * 4 and min(share for _, share in parts) < 0.5
