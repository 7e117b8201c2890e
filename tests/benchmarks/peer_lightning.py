# ruff: noqa: I001 (the imports that a user needs stand apart from those that measure)
"""Lightning's Trainer with `BackboneFinetuning`, as its documentation and its own transfer-learning example use it.

The callback's defaults are kept: the backbone starts at a tenth of the head's rate, which then doubles every epoch until both
are equal, and batch norms train while "frozen". It unfreezes after half of the ten epochs, at epoch 5 (the first milestone of
Lightning's example; the callback's own default, 10, would never come). Adam at 1e-3 as in that example. No logger, no
checkpoints and no progress bar, which only saves it time.
"""
# user code begins
import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import ImageFolder

# user code ends
from harness import WORKERS, lite0

NAME = "Lightning BackboneFinetuning"
TRAINER = True


def run(folder, size, classes, seed, epochs, bench):
    # user code begins
    class Classifier(L.LightningModule):
        def __init__(self, num_classes, lr=1e-3):
            super().__init__()
            self.lr = lr
            self.backbone = lite0(0)
            self.head = nn.Linear(self.backbone.num_features, num_classes)
            self.accuracy = MulticlassAccuracy(num_classes, average="micro")

        def forward(self, x):
            return self.head(self.backbone(x))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.accuracy(self(x), y)
            self.log("val_accuracy", self.accuracy, on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)

    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    train_transform = transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize,
    ])
    val_transform = transforms.Compose([
        transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size), transforms.ToTensor(), normalize,
    ])
    train = ImageFolder(folder / "train", train_transform)
    val = ImageFolder(folder / "val", val_transform)
    workers = {"num_workers": WORKERS, "persistent_workers": WORKERS > 0}
    train_loader = DataLoader(train, batch_size=32, shuffle=True, **workers)
    val_loader = DataLoader(val, batch_size=64, **workers)
    model = Classifier(len(train.classes))
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=epochs // 2)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    val_loop = trainer.fit_loop.epoch_loop.val_loop  # bench
    bench.watch(val_loop, "run", lambda _: None if trainer.sanity_checking else trainer.callback_metrics["val_accuracy"])  # bench
    trainer.fit(model, train_loader, val_loader)
    print(trainer.callback_metrics["val_accuracy"])
    # user code ends
