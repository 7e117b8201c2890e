"""Ours against transformers.Trainer and TRL's SFTTrainer: the upper four layers of the bundled language model, the same chats in the same
order, the same steps, one run in one process.

    python tests/benchmarks/chats.py [--chats 32] [--epochs 3]

Every trainer gets AdamW at 1e-3 without decay, clipping or schedule, batches of 8, float32, and no evaluation; padding is on the right and
the loss is on the answers. The clock starts when the model is open and ends after the last step; what ours computes once for the frozen
layers counts. Prints seconds, their ratio to ours, and the loss of the first and the last epoch.
"""
import argparse
import tempfile
import time

import torch

from sft_course.language import encode_chats, lm_loss
from sft_course.loop import Score, batches
from sft_course.tools.garden_notes import draw_notes, note_chat
from sft_course.tools.language_models import open_language_model
from sft_course.tools.training import fit
from sft_course.tools.upper_layers import UpperLayers, chat_data

LAYERS, RATE, BATCH = 4, 1e-3, 8


def opened():
    "Model and tokenizer; the upper layers and the last norm train."
    model, tokenizer = open_language_model()
    model.requires_grad_(False)
    UpperLayers(model, LAYERS).requires_grad_(True)
    return model, tokenizer


def ours(model, tokenizer, encoded, epochs):
    part = UpperLayers(model, LAYERS)
    data = chat_data(part.lower[0], encoded)
    optimizer = torch.optim.AdamW(part.parameters(), lr=RATE, weight_decay=0.)
    order = batches(len(encoded), BATCH)
    done = fit(part, data, lambda part: Score(0., 0., 1), optimizer, epochs, loss=lm_loss, batch_size=BATCH, order=lambda epoch: order)
    return [row["train_loss"] for row in done.history]


def arguments(kind, folder, epochs, **more):
    return kind(output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant",
                weight_decay=0., max_grad_norm=0., report_to="none", save_strategy="no", logging_strategy="epoch", use_cpu=True, bf16=False,
                disable_tqdm=True, dataloader_pin_memory=False, **more)


def in_order(trainer):
    "The same class, but the rows come as they stand."
    class Ordered(trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    return Ordered


def logged(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_trainer(model, tokenizer, encoded, epochs):
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    rows = [{"input_ids": t.tolist(), "labels": label.tolist(), "attention_mask": [1] * len(t)} for t, label in encoded]
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    tokenizer.padding_side = "right"
    with tempfile.TemporaryDirectory() as folder:
        return logged(in_order(Trainer)(model, arguments(TrainingArguments, folder, epochs), train_dataset=rows, data_collator=collate))


def with_trl(model, tokenizer, encoded, epochs):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows = Dataset.from_list([{"input_ids": t.tolist(), "labels": label.tolist()} for t, label in encoded])
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(SFTConfig, folder, epochs, max_length=None, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
        return logged(in_order(SFTTrainer)(model, args, train_dataset=rows, processing_class=tokenizer))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()
    encoded, _ = encode_chats(opened()[1], [note_chat(n) for n in draw_notes(asked.chats)])
    import datasets  # noqa: F401  before the clock, for all
    import transformers.trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401
    found = {}
    for name, run in {"ours": ours, "transformers.Trainer": with_trainer, "TRL SFTTrainer": with_trl}.items():
        model, tokenizer = opened()
        start = time.perf_counter()
        losses = run(model, tokenizer, encoded, asked.epochs)
        found[name] = time.perf_counter() - start
        print(f"{name:<22}{found[name]:7.1f} s   {found[name] / found['ours']:5.2f} x ours   loss {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
