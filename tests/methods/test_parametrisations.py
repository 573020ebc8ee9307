"""Every parametrisation with every method that takes them: gradients, runs, resumes, evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ddfast import data, methods
from ddfast.artefact import Artefact
from ddfast.distill import unfinished
from ddfast.evaluate import evaluate
from ddfast.methods import characteristic, dc, dcc, dm, idm, m3d
from ddfast.methods.feature_matching import sweep
from ddfast.synthetic import decode, repeats

KINDS = {
    "multi_formation": {"factor": 2},
    "hallucinators": {"shared": 3},
    "bases": {"shared": 4, "base_scale": 2},
}
SETTINGS = {"model": "ConvNetD2W4", "batch_real": 5, "init": "real"}


def match_of(name, run):
    """One sweep of a method over all classes."""
    net = run.fresh_net()
    statistics = {
        "dm": dm.mean_features,
        "idm": partial(idm.means_and_cross_entropy, weight=2.0),
        "m3d": partial(m3d.discrepancy, kernel="gaussian"),
        "ncfm": partial(
            characteristic.distances,
            sampling=characteristic.Sampling(run, "none", 50, 0.0, 0.0),
            alpha=0.2,
            beta=0.9,
        ),
    }
    if name in statistics:
        return sweep(run, net.requires_grad_(False), dm.real_batch(run), statistics[name])
    return (dcc.match_together if name == "dcc" else dc.match)(run, net, 0)


@pytest.mark.parametrize("method", ["dm", "idm", "m3d", "ncfm", "dc", "dsa", "dcc"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_images_brought_back(make_dataset, make_run, method, kind):
    """The same images stored as pixels have a gradient; the chain rule through `decode` is ours."""
    dataset = make_dataset([12, 9, 15])
    run = make_run(method, dataset, ipc=2, parametrisation=kind, **KINDS[kind], **SETTINGS)
    images, _ = run.training_set()
    each = len(images) // 3
    assert each == run.decoded_per_class == run.rows_per_class * repeats(run.decoder, run.tensors)
    plain = make_run(method, dataset, ipc=min(each, 9), parametrisation="pixels", **SETTINGS)
    assert plain.decoder is None
    plain.tensors["images"] = images.clone().requires_grad_()
    plain.labels = torch.arange(3).repeat_interleave(each)
    by_images, losses = match_of(method, plain)
    found, other_losses = match_of(method, run)
    torch.testing.assert_close(losses, other_losses, rtol=1e-10, atol=1e-12)

    leaves = {name: t.detach().requires_grad_() for name, t in run.tensors.items()}
    rest = {name: t for name, t in leaves.items() if name != "images"}
    made, _ = decode(run.decoder, leaves["images"], [run.rows_per_class] * 3, rest)
    expected = torch.autograd.grad(made, list(leaves.values()), by_images["images"])
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        assert gradient.abs().max() > 0


IDC, LATENTS = "IDC is multi_formation", "IT-GAN has latents"
REFUSED = {
    **dict.fromkeys([("idc", kind) for kind in ("pixels", "hallucinators", "bases")], IDC),
    **dict.fromkeys([("idc_i", kind) for kind in ("pixels", "hallucinators", "bases")], IDC),
    ("idc_i", "multi_formation"): "idc_i is idc with factor 1",
    **dict.fromkeys([("it_gan", kind) for kind in KINDS], LATENTS),
    **dict.fromkeys([("ls", kind) for kind in KINDS], "expected 'pixels', real images"),
}
FEW: dict[str, Any] = {
    "num_premodel": 1, "pretrain_epochs": 1, "num_freqs": 20, "distill_steps": 1,
    "inner_loop": 1, "outer_loop": 1, "outer_most": 1, "inner_most": 1,
}  # fmt: skip
WITH_EXPERTS = {"mtt", "tesla", "ftd", "datm"}
"""Tested in test_trajectory_matching.py."""


@pytest.mark.parametrize("kind", ["pixels", *KINDS])
@pytest.mark.parametrize("method", sorted(methods.methods().keys() - WITH_EXPERTS))
def test_every_method_takes_them_or_says_why_not(make_dataset, make_run, method, kind):
    """One step moves everything that images are made of."""
    known, dataset = methods.find(method), make_dataset([12, 9, 15])
    settings = {name: n for name, n in FEW.items() if name in known.config.__dataclass_fields__}
    settings |= {"ipc": 2, "parametrisation": kind, **KINDS.get(kind, {}), **SETTINGS}
    if (method, kind) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, kind]):
            make_run(method, dataset, **settings)
        return
    if (method, kind) == ("it_gan", "pixels"):
        return  # its latents, tested in test_it_gan.py
    run = make_run(method, dataset, **settings)
    for _ in known.prepare(run):
        pass
    before = {name: tensor.detach().clone() for name, tensor in run.tensors.items()}
    assert torch.isfinite(known.step(run)).all()
    still = {name for name, was in before.items() if torch.equal(run.tensors[name], was)}
    assert still == ({"images"} if method == "ls" else set())  # LS learns labels alone


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, kind):
    dataset = make_dataset([12, 9, 15])
    settings = {"ipc": 2, "parametrisation": kind, **KINDS[kind], **SETTINGS, "lr_img": 0.3}
    whole, small = (make_run("dm", dataset, **settings) for _ in range(2))
    small.memory = 120_000  # a class at a time, and that in pieces
    for run in (whole, small):
        for _ in range(3):
            dm.step(run)
            run.iteration += 1
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(small.tensors[name], tensor, rtol=1e-9, atol=1e-11)


def test_multi_formation_of_factor_one_is_plain_dm(make_dataset, make_run):
    dataset = make_dataset([7, 6, 9])
    runs = [
        make_run("dm", dataset, ipc=2, lr_img=0.5, **SETTINGS, **options)
        for options in ({}, {"parametrisation": "multi_formation", "factor": 1})
    ]
    for run in runs:
        for _ in range(3):
            dm.step(run)
            run.iteration += 1
    assert torch.equal(runs[0].images, runs[1].images)


def test_learning_rates_of_what_is_shared(make_dataset):
    dataset = make_dataset([7, 6, 9])
    config = methods.find("dm").config

    def groups(**settings):
        resolved = methods.resolve(config(ipc=2, lr_img=3.0, **settings), dataset)
        run = methods.start(resolved, dataset, 1 << 30)
        names = {id(t): name for name, t in run.tensors.items()}
        return [
            (sorted(names[id(p)] for p in group["params"]), group["lr"])
            for group in run.optimiser.param_groups
        ]

    assert groups() == [(["images"], 3.0)]
    own, shared = groups(parametrisation="hallucinators", lr_decoder=0.5)
    assert own == (["images"], 3.0) and shared[1] == 0.5 and "scale" in shared[0]
    own, shared = groups(parametrisation="bases", shared=4)
    assert own == (["coefficients"], 3.0) and shared == (["images"], 3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_with_the_same_bits_and_is_evaluated(tmp_path, kind, same_when_resumed):
    dataset = data.generated(classes=2, size=8, train_per_class=12, test_per_class=4)
    config = methods.find("dm").config(
        ipc=1, parametrisation=kind, iterations=6, lr_img=0.1, **SETTINGS, **KINDS[kind]
    )

    def shown(folder):
        artefact, iteration = unfinished(folder)
        assert iteration == 3 and artefact.decoded().size == (8, 8)

    whole = same_when_resumed("dm", dataset, config, 4, between=shown)
    loaded = Artefact.load(tmp_path / "cut" / "distilled.safetensors")
    assert loaded.decoder == whole.decoder
    assert loaded.decoder_tensors.keys() == whole.decoder_tensors.keys()
    assert loaded.decoded().images.shape[1:] == (3, 8, 8)
    report = evaluate(
        loaded, dataset, "ConvNetD2W4", num_eval=1, selections=1, progress=False, epochs=1
    )
    rows = {row.name: row for row in report.rows}
    # Random selections are as many real images as would take the storage.
    stored = -(-loaded.stored_numbers // (2 * 3 * 64))
    assert rows["random selection"].images == 2 * stored
    assert rows["distilled"].images == len(loaded.decoded().images)


def test_what_is_not_finite_is_named(make_dataset, make_run):
    run = make_run(
        "dm", make_dataset([7, 6]), ipc=1, parametrisation="hallucinators", shared=2, **SETTINGS
    )
    gradients = run.no_gradients()
    gradients["scale"][0, 0, 0, 0] = float("nan")
    with pytest.raises(methods.Diverged, match=r"gradient \(scale\) is not finite .* lr_decoder"):
        run.update(gradients, torch.zeros(2))


def test_settings_that_do_not_fit():
    dataset = data.generated(classes=2, size=8, train_per_class=12, test_per_class=4)
    config = methods.find("dm").config

    def begin(**settings):
        resolved = methods.resolve(config(ipc=1, model="ConvNetD2W4", **settings), dataset)
        return methods.start(resolved, dataset, 1 << 30)

    with pytest.raises(ValueError, match="init: mix needs"):
        begin(init="mix")
    with pytest.raises(ValueError, match="leave no room"):
        begin(parametrisation="bases", shared=500)
    with pytest.raises(ValueError, match="parametrisation: got 'pixel'"):
        config(ipc=1, parametrisation="pixel")
    with pytest.raises(ValueError, match="IDC is multi_formation"):
        methods.find("idc").config(ipc=1, parametrisation="bases")
    # Real images in the cells: each decodes to (about) as many real ones.
    run = begin(parametrisation="multi_formation", init="mix")
    assert run.images.shape == (2, 3, 8, 8) and len(run.training_set()[0]) == 8
