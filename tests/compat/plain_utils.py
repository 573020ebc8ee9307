"""A `utils.py` of plain torch, for the scripts in docs/porting.md."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ddfast import data


class ConvNet(nn.Module):
    def __init__(self, channel, num_classes, depth, im_size, width=128):
        super().__init__()
        layers = []
        for block in range(depth):
            layers += [
                nn.Conv2d(width if block else channel, width, 3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * math.prod(s >> depth for s in im_size), num_classes)

    def embed(self, x):
        return self.features(x).flatten(1)

    def forward(self, x):
        return self.classifier(self.embed(x))


def get_network(model, channel, num_classes, im_size=(32, 32), dist=True):
    return ConvNet(channel, num_classes, int(model.removeprefix("ConvNetD")), im_size)


class TensorDataset(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __len__(self):
        return len(self.images)


def get_dataset(dataset, data_path, **options):
    found = data.load(dataset, None, **options)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (found.mean, found.std))
    train, test = (
        [((image / 255 - mean) / std, int(label)) for image, label in zip(*split, strict=True)]
        for split in (
            (found.train_images, found.train_labels),
            (found.test_images, found.test_labels),
        )
    )
    names, loader = list(found.class_names), torch.utils.data.DataLoader(test)
    shape = found.channels, found.size, found.num_classes
    return *shape, names, found.mean, found.std, train, test, loader


def epoch(mode, dataloader, net, optimizer, criterion, args, aug):
    net.train()
    for images, labels in dataloader:
        loss = criterion(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def match_loss(gw_syn, gw_real, args):
    total = torch.tensor(0.0)
    for s, r in zip(gw_syn, gw_real, strict=True):
        if s.dim() > 1:
            s, r = s.flatten(1), r.flatten(1)
            norms = s.norm(dim=1) * r.norm(dim=1) + 0.000001
            total = total + (1 - (s * r).sum(1) / norms).sum()
    return total


class ParamDiffAug:
    def __init__(self):
        self.latestseed = -1


def DiffAugment(x, strategy="", seed=-1, param=None):
    """Colour, crops, cutout and mirrors; with a seed, one draw for all, which reseeds torch."""
    param.latestseed = seed

    def drawn(numbers):
        if param.latestseed != -1:
            torch.manual_seed(param.latestseed)
            param.latestseed += 1
        found = numbers()
        return found[:1].expand_as(found) if seed != -1 else found

    def uniform():
        return drawn(lambda: torch.rand(len(x))).view(-1, 1, 1, 1)

    def integers(low, high):
        return drawn(lambda: torch.randint(low, high, (len(x),))).tolist()

    names = strategy.split("_")
    name = names[drawn(lambda: torch.randint(0, len(names), (1,))).item()]
    side = x.shape[2]
    if name == "color":
        x = x + uniform() - 0.5
        grey = x.mean(1, keepdim=True)
        x = grey + uniform() * 2.0 * (x - grey)
        level = x.mean((1, 2, 3), keepdim=True)
        return level + (uniform() + 0.5) * (x - level)
    if name == "flip":
        return torch.where(uniform() < 0.5, x.flip(3), x)
    if name == "crop":
        shift = int(side * 0.125 + 0.5)
        padded = F.pad(x, (shift,) * 4)
        places = zip(integers(-shift, shift + 1), integers(-shift, shift + 1), strict=True)
        rows = [
            image[:, shift + i : shift + i + side, shift + j : shift + j + side]
            for image, (i, j) in zip(padded, places, strict=True)
        ]
        return torch.stack(rows)
    hole = int(side * 0.5 + 0.5)
    mask = torch.ones(len(x), 1, side, side)
    centres = zip(*(integers(0, side + 1 - hole % 2) for _ in range(2)), strict=True)
    for k, (i, j) in enumerate(centres):
        top, left = i - hole // 2, j - hole // 2
        mask[k, 0, max(top, 0) : top + hole, max(left, 0) : left + hole] = 0
    return x * mask


class ReparamModule(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.held = [module]  # out of sight of parameters()
        flat = nn.utils.parameters_to_vector(module.parameters())
        self.flat_param = nn.Parameter(flat.detach().clone())

    def forward(self, x, flat_param):
        (module,), views, start = self.held, {}, 0
        for name, parameter in module.named_parameters():
            views[name] = flat_param[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return functional_call(module, views, (x,))
