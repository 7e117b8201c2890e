# ruff: noqa: I001 (the imports that a user needs stand apart from those that measure)
"""Hugging Face's Trainer, as in its image-classification guide: AdamW, linear decay after a tenth of warm-up, random resized crops
and mirror images, timm's network in transformers' own `TimmWrapper`.

Departures from the guide: ten epochs, not three; batches of 16 without its four-fold accumulation of gradients, which would leave
four steps an epoch on 244 images; a rate of 5e-4, not 5e-5, which is meant for transformers and many more steps (with it, ten
epochs left this network at 0.72 on ants_bees at 96 pixels); the same images read by torchvision's ImageFolder instead of the
datasets library. Evaluation every epoch, no saving and no logging service.
"""
# user code begins
import numpy as np
import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

# user code ends
from harness import WORKERS, lite0

NAME = "Hugging Face Trainer"
TRAINER = True


def run(folder, size, classes, seed, epochs, bench):
    # user code begins
    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    train_transform = transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize,
    ])
    val_transform = transforms.Compose([
        transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size), transforms.ToTensor(), normalize,
    ])
    train = ImageFolder(folder / "train", train_transform)
    val = ImageFolder(folder / "val", val_transform)

    def collate_fn(examples):
        return {"pixel_values": torch.stack([x for x, _ in examples]), "labels": torch.tensor([y for _, y in examples])}

    def compute_metrics(eval_pred):
        return {"accuracy": float(np.mean(np.argmax(eval_pred.predictions, axis=1) == eval_pred.label_ids))}

    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=len(train.classes))
    model = TimmWrapperForImageClassification(config)
    model.timm_model = lite0(len(train.classes))
    args = TrainingArguments(
        output_dir="output",
        remove_unused_columns=False,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        learning_rate=5e-4,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        num_train_epochs=epochs,
        warmup_steps=0.1,
        dataloader_num_workers=WORKERS,
        dataloader_persistent_workers=WORKERS > 0,
        seed=seed,
    )
    trainer = Trainer(
        model=model, args=args, data_collator=collate_fn, train_dataset=train, eval_dataset=val, compute_metrics=compute_metrics,
    )
    bench.watch(trainer, "evaluate", lambda metrics: metrics["eval_accuracy"])  # bench
    trainer.train()
    print(trainer.state.log_history[-1])
    # user code ends
