from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ddfast.data import channel_statistics, load
from ddfast.data.decode import decode_all, to_pixels
from ddfast.random import generator


def picture(height, width, purpose, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    values = torch.randint(256, shape, generator=generator(0, purpose)).numpy().astype(np.uint8)
    return Image.fromarray(values)


def pixels_of(image):
    values = np.asarray(image)
    return torch.from_numpy(
        (values if values.ndim == 3 else values[:, :, None]).transpose(2, 0, 1).copy()
    )


@pytest.fixture
def folder(tmp_path):
    """train/ has owl (2), ant (3) and bee (1 image); val/ lacks ant. Lossless 6x6 files."""
    made = {}
    for split, classes in (
        ("train", {"owl": 2, "ant": 3, "bee": 1}),
        ("val", {"owl": 1, "bee": 2}),
    ):
        for name, number in classes.items():
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for index in range(number):
                image = picture(6, 6, f"{split} {name} {index}")
                image.save(place / f"{index}.png")
                made[split, name, index] = pixels_of(image)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path, made


def test_layout(folder):
    root, made = folder
    dataset = load("ImageFolder", root)
    assert dataset.class_names == ("ant", "bee", "owl")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert dataset.test_labels.tolist() == [1, 1, 2]
    train = [("ant", 0), ("ant", 1), ("ant", 2), ("bee", 0), ("owl", 0), ("owl", 1)]
    assert torch.equal(dataset.train_images, torch.stack([made[("train", *key)] for key in train]))
    test = [("bee", 0), ("bee", 1), ("owl", 0)]
    assert torch.equal(dataset.test_images, torch.stack([made[("val", *key)] for key in test]))
    assert dataset.mean == (0.485, 0.456, 0.406)
    assert load("image_folder", root, dataset_name="mine").name == "mine"


def test_test_comes_before_val(folder):
    root, _ = folder
    (root / "test" / "owl").mkdir(parents=True)
    only = picture(6, 6, "only")
    only.save(root / "test" / "owl" / "a.bmp")
    dataset = load("ImageFolder", root)
    assert torch.equal(dataset.test_images, pixels_of(only)[None])


def test_grey(folder):
    root, made = folder
    dataset = load("ImageFolder", root, channels=1)
    red, green, blue = made["train", "bee", 0].double()
    # The luma of ITU-R 601-2, which Pillow documents for RGB to L.
    luma = red * 0.299 + green * 0.587 + blue * 0.114
    assert (dataset.train_images[3, 0].double() - luma).abs().max() <= 0.51
    assert (dataset.mean, dataset.std) == channel_statistics(dataset.train_images)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_conversion_to_rgb(mode):
    image = picture(5, 5, "convert", mode)
    expected = pixels_of(image)[:3].expand(3, 5, 5)
    assert np.array_equal(to_pixels(image, None, 3), expected.numpy())
    palette = picture(5, 5, "palette").quantize(8)
    assert np.array_equal(to_pixels(palette, 5, 3), pixels_of(palette.convert("RGB")).numpy())


@pytest.mark.parametrize("height, width", [(9, 9), (9, 14), (13, 9), (9, 10)])
def test_centre_crop_without_resizing(height, width):
    image = picture(height, width, "crop")
    top, left = round((height - 9) / 2), round((width - 9) / 2)
    expected = pixels_of(image)[:, top : top + 9, left : left + 9]
    assert np.array_equal(to_pixels(image, 9, 3), expected.numpy())


@pytest.mark.parametrize("height, width", [(24, 24), (40, 24), (24, 37), (5, 7), (8, 8)])
def test_resizing_against_torch(height, width):
    """Torch's antialiased bilinear interpolation is an independent implementation."""
    image = picture(height, width, "resize")
    size = 8
    new = (
        (size, int(size * width / height))
        if height <= width
        else (int(size * height / width), size)
    )
    resized = torch.nn.functional.interpolate(
        pixels_of(image)[None].double(), new, mode="bilinear", antialias=True
    )[0]
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    expected = resized[:, top : top + size, left : left + size]
    got = torch.from_numpy(to_pixels(image, size, 3).copy()).double()
    assert got.shape == (3, size, size)
    # Pillow rounds after each of its two passes.
    assert (got - expected).abs().max() <= 1.1


def test_different_sizes_need_size(folder):
    root, _ = folder
    picture(6, 8, "wide").save(root / "train" / "owl" / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png has 6x8 pixels .*0.png 6x6: pass size"):
        load("ImageFolder", root)
    assert load("ImageFolder", root, size=6).train_images.shape == (7, 3, 6, 6)


def test_unreadable_images_are_named(folder):
    root, _ = folder
    broken = root / "train" / "owl" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing more")
    with pytest.raises(ValueError, match=r"broken.jpg cannot be read as an image"):
        load("ImageFolder", root)
    broken.unlink()
    whole = root / "train" / "ant" / "1.png"
    whole.write_bytes(whole.read_bytes()[:70])
    with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
        load("ImageFolder", root)


def test_sixteen_bits_are_refused_rather_than_cut(folder):
    root, _ = folder
    values = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    Image.fromarray(values).save(root / "train" / "owl" / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png .* more than 8 bits a channel"):
        load("ImageFolder", root)


def test_missing_folders_and_classes(folder, tmp_path):
    root, _ = folder
    with pytest.raises(ValueError, match=r"data_path must say where"):
        load("ImageFolder")
    with pytest.raises(
        FileNotFoundError, match=r"train, test or val .* missing in .*nowhere: train"
    ):
        load("ImageFolder", root / "nowhere")
    (root / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"no images in the folder of class cat"):
        load("ImageFolder", root)
    (root / "train" / "cat").rmdir()
    (root / "val" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"val has classes that .*train has not: dog"):
        load("ImageFolder", root)


def test_wrong_options(folder):
    root, _ = folder
    with pytest.raises(ValueError, match=r"channels of image files must be 1 or 3, got 2"):
        load("ImageFolder", root, channels=2)
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        load("ImageFolder", root, size=0)


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"needs PIL: pip install ddfast\[images\]"):
        load("ImageFolder", folder[0])


def test_cache_is_used_and_refreshed(folder, tmp_path, monkeypatch):
    root, _ = folder
    cache = tmp_path / "cache" / "deep"
    plain = load("ImageFolder", root, size=4)
    first = load("ImageFolder", root, size=4, cache=cache)
    files = sorted(cache.iterdir())
    assert len(files) == 2 and all(path.suffix == ".npy" for path in files)
    with monkeypatch.context() as patch:
        patch.setattr("ddfast.data.decode._decode", None)  # nothing may be decoded now
        second = load("ImageFolder", root, size=4, cache=cache)
    for dataset in (first, second):
        assert torch.equal(dataset.train_images, plain.train_images)
        assert torch.equal(dataset.test_images, plain.test_images)
    # Writing to the mapped images stays in this process.
    second.train_images.zero_()
    assert torch.equal(
        load("ImageFolder", root, size=4, cache=cache).train_images, plain.train_images
    )

    changed = root / "train" / "ant" / "1.png"
    picture(6, 6, "another").save(changed)
    os.utime(changed, ns=(1, 1))  # whatever the resolution of the clock
    fresh = load("ImageFolder", root, size=4, cache=cache)
    assert torch.equal(fresh.train_images, load("ImageFolder", root, size=4).train_images)
    assert not torch.equal(fresh.train_images, plain.train_images)
    # Another size is another file.
    assert load("ImageFolder", root, size=5, cache=cache).size == (5, 5)


def test_a_failed_cache_leaves_nothing(folder, tmp_path):
    root, _ = folder
    (root / "train" / "owl" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.png"):
        load("ImageFolder", root, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_decoding_uses_threads_and_keeps_the_order(tmp_path):
    """More images than one block of work, from several threads."""
    place = tmp_path / "many"
    place.mkdir()
    paths = [place / f"{index:04d}.bmp" for index in range(1100)]
    for index, path in enumerate(paths):
        Image.new("RGB", (2, 1), (index % 256, index // 256, 7)).save(path)
    before = threading.active_count()
    images = decode_all(paths, place, None)
    assert threading.active_count() == before
    index = torch.arange(1100)
    assert torch.equal(images[:, 0, 0, 1], (index % 256).to(torch.uint8))
    assert torch.equal(images[:, 1, 0, 0], (index // 256).to(torch.uint8))


@pytest.fixture
def tiny(tmp_path):
    """Three wnids, listed out of order, two training images each and four for validation."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n300", "n100", "n200"]
    for wnid in wnids:
        place = root / "train" / wnid / "images"
        place.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 64), (int(wnid[1]) * 60, index * 100, 30)).save(
                place / f"{wnid}_{index}.JPEG", quality=95
            )
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for index, wnid in enumerate(["n200", "n300", "n100", "n200"]):
        Image.new("RGB", (64, 64), (int(wnid[1]) * 60, 200, 30)).save(
            root / "val" / "images" / f"val_{index}.JPEG", quality=95
        )
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("cached", [False, True])
def test_tiny_imagenet(tiny, cached, tmp_path):
    cache = tmp_path / "cache" if cached else None
    for place in (tiny, tiny.parent):
        dataset = load("Tiny", place, cache=cache)
        assert dataset.class_names == ("n100", "n200", "n300")
        assert dataset.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert dataset.test_labels.tolist() == [1, 2, 0, 1]
        assert dataset.train_images.shape == (6, 3, 64, 64)
        # Plain colours survive JPEG within a few levels and tell classes and images apart.
        red = dataset.train_images[:, 0, 9, 50].int()
        assert ((red - torch.tensor([60, 60, 120, 120, 180, 180])).abs() < 8).all()
        green = dataset.train_images[:, 1, 40, 3].int()
        assert ((green - torch.tensor([0, 100] * 3)).abs() < 8).all()
        red = dataset.test_images[:, 0, 9, 50].int()
        assert ((red - torch.tensor([120, 180, 60, 120])).abs() < 8).all()
        assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)


def test_tiny_imagenet_errors(tiny):
    table = tiny / "val" / "val_annotations.txt"
    good = table.read_text()
    table.write_text(good + "val_9.JPEG\tn100\t0\t0\t1\t1\n")
    with pytest.raises(FileNotFoundError, match=r"lacks images .*: val_9.JPEG"):
        load("TinyImageNet", tiny)
    table.write_text(good + "val_9.JPEG\tn999\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt, line 5: expected .*n999"):
        load("TinyImageNet", tiny)
    table.write_text(good)
    for path in (tiny / "train" / "n200" / "images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"has no images for n200"):
        load("TinyImageNet", tiny)
    (tiny / "wnids.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"wnids.txt\. .* archive tiny-imagenet-200.zip"):
        load("TinyImageNet", tiny)
