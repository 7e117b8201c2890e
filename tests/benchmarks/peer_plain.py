# ruff: noqa: I001 (the imports that a user needs stand apart from those that measure)
"""The plain loop of the field's best-known transfer-learning example: all layers, SGD with momentum 0.9, a tenth of the rate
after seven epochs, random crops and mirror images.

As in that example but for three things. Ten epochs, as for every trainer here, not twenty-five. Batches of 32, not 4, which
is eight times fewer steps; so the rate is eight times 0.001 (Goyal et al. 2017: rate in proportion to the batch).
And the accuracy reported is that of the last epoch: the example keeps the epoch that the reported images like best, which is
choosing on the images one reports.
"""
# user code begins
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

# user code ends
from contextlib import nullcontext as nothing

from harness import WORKERS, lite0

NAME = "plain loop"
TRAINER = True


def run(folder, size, classes, seed, epochs, bench):
    # user code begins
    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    data_transforms = {
        "train": transforms.Compose([
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]),
        "val": transforms.Compose([
            transforms.Resize(round(size / 0.875)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            normalize,
        ]),
    }
    image_datasets = {x: datasets.ImageFolder(folder / x, data_transforms[x]) for x in ("train", "val")}
    dataloaders = {
        x: DataLoader(image_datasets[x], batch_size=32, shuffle=x == "train", num_workers=WORKERS, persistent_workers=WORKERS > 0)
        for x in ("train", "val")
    }
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = lite0(len(image_datasets["train"].classes)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.008, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for _ in range(epochs):
        for phase in ("train", "val"):
            model.train(phase == "train")
            corrects = 0
            watch = bench.evaluation() if phase == "val" else nothing()  # bench
            with watch:  # bench
                for inputs, labels in dataloaders[phase]:
                    inputs, labels = inputs.to(device), labels.to(device)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        outputs = model(inputs)
                        loss = criterion(outputs, labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                    corrects += (outputs.argmax(1) == labels).sum().item()
                if phase == "train":
                    scheduler.step()
                accuracy = corrects / len(image_datasets[phase])
                print(phase, accuracy)
                if phase == "val":
                    bench.point(accuracy)  # bench
    # user code ends
