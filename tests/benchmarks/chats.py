"""Ours against transformers.Trainer and TRL's SFTTrainer on chats: the same language model, the same chats in the same order, the same steps,
one process, one run after the other. Run by hand.

    python tests/benchmarks/chats.py run               measure, and add a line for each run to chats.jsonl
    python tests/benchmarks/chats.py table [--write]   the table, or the table written into README.md

Two cases: the weights of the upper four layers, and LoRA of rank 8 on all linear layers of all layers (peft's for the others, from the same
start). Everybody has AdamW without decay, clipping or schedule, batches of 8 padded on the right, float32, the loss on the answers only, no
evaluation and one thread. The clock counts seconds of processor time, so that other processes do not matter. It starts when the model is open
and the libraries are imported, and ends after the last step: what ours computes once for the frozen layers counts.
"""
import argparse
import gc
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "chats.jsonl"
MARKS = ("<!-- chats begin -->", "<!-- chats end -->")
BATCH, RANK, ALPHA = 8, 8, 16
CASES = {"upper 4 of 30 layers": {"layers": 4, "rate": 1e-3, "chats": 32, "epochs": 3},
         "LoRA on all layers": {"layers": 30, "rate": 3e-3, "chats": 16, "epochs": 2}}
PACKAGES = ("torch", "transformers", "trl", "peft", "sft_course")


# The same start for everybody

def opened(case):
    "Model, tokenizer, and the part of the model that trains; all else is frozen."
    from sft_course.tools.language_models import open_language_model
    from sft_course.tools.upper_layers import UpperLayers
    model, tokenizer = open_language_model()
    tokenizer.padding_side = "right"
    model.requires_grad_(False)
    part = UpperLayers(model, case["layers"])
    if "LoRA" not in case["name"]:
        part.requires_grad_(True)
    return model, tokenizer, part


def with_our_lora(model, part):
    "LoRA in every linear layer of `part`; the model's own names of these layers, with the A that each starts from."
    import torch
    from torch import nn

    from sft_course.language import LoRA
    from sft_course.tools.torch_state import seeded
    from sft_course.tools.upper_layers import swap_layers
    with seeded(0):
        swap_layers(part.layers, nn.Linear, lambda layer: LoRA(layer, RANK, ALPHA))
    return {name: torch.clone(module.A.detach()) for name, module in model.named_modules() if isinstance(module, LoRA)}


def with_peft_lora(model, start):
    "The model in peft's hands, its adapters at the same start as ours."
    import torch
    from peft import LoraConfig, get_peft_model
    net = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0., target_modules="all-linear", task_type="CAUSAL_LM"))
    places = {name.removeprefix("base_model.model."): module for name, module in net.named_modules() if hasattr(module, "lora_A")}
    assert places.keys() == start.keys()
    with torch.no_grad():
        for name, A in start.items():
            places[name].lora_A["default"].weight.copy_(A)
    return net


# Three trainers; each returns the loss of every step

def ours(case, model, tokenizer, part, encoded):
    import torch

    from sft_course.language import lm_loss
    from sft_course.loop import Score, batches
    from sft_course.tools.training import fit
    from sft_course.tools.upper_layers import chat_data
    data, losses = chat_data(part.lower[0], encoded), []

    def noted(outputs, targets):
        total, count = lm_loss(outputs, targets)
        losses.append(total.item() / count)
        return total, count
    optimizer = torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=case["rate"], weight_decay=0.)
    order = batches(len(encoded), BATCH)
    fit(part, data, lambda part: Score(0., 0., 1), optimizer, case["epochs"], loss=noted, batch_size=BATCH, order=lambda epoch: order)
    return losses


def arguments(kind, folder, case, **more):
    return kind(output_dir=folder, num_train_epochs=case["epochs"], per_device_train_batch_size=BATCH, learning_rate=case["rate"],
                lr_scheduler_type="constant", weight_decay=0., max_grad_norm=0., report_to="none", save_strategy="no", logging_steps=1,
                use_cpu=True, bf16=False, disable_tqdm=True, dataloader_pin_memory=False, **more)


def run_in_order(trainer, *args, **kwargs):
    "Train with a class of trainer, the rows as they stand; the logged losses."
    import torch

    class Ordered(trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs, *args):  # a loss is printed for every step otherwise
            self.state.log_history.append(logs)
    it = Ordered(*args, **kwargs)
    it.train()
    return [row["loss"] for row in it.state.log_history if "loss" in row]


def transformers_trainer(case, model, tokenizer, part, encoded):
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    rows = [{"input_ids": tokens.tolist(), "labels": labels.tolist(), "attention_mask": [1] * len(tokens)} for tokens, labels in encoded]
    with tempfile.TemporaryDirectory() as folder:
        return run_in_order(Trainer, model, arguments(TrainingArguments, folder, case), train_dataset=rows,
                            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True))


def trl_trainer(case, model, tokenizer, part, encoded):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows = Dataset.from_list([{"input_ids": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in encoded])
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(SFTConfig, folder, case, max_length=None, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
        return run_in_order(SFTTrainer, model, args, train_dataset=rows, processing_class=tokenizer)


TRAINERS = {"sft_course": ours, "transformers.Trainer": transformers_trainer, "TRL SFTTrainer": trl_trainer}


# Measuring

def measure(case, name, start):
    "Seconds of processor time and the losses of one trainer on one case; `start`: where ours began, for the others."
    from sft_course.language import encode_chats
    from sft_course.tools.garden_notes import draw_notes, note_chat
    model, tokenizer, part = opened(case)
    encoded, _ = encode_chats(tokenizer, [note_chat(note) for note in draw_notes(case["chats"])])
    if "LoRA" in case["name"]:
        if name == "sft_course":
            start |= with_our_lora(model, part)
        else:
            model = with_peft_lora(model, start)
    before = time.process_time()
    losses = TRAINERS[name](case, model, tokenizer, part, encoded)
    return time.process_time() - before, losses


def run():
    import torch
    torch.set_num_threads(1)
    import datasets  # noqa: F401  before the clock, for all
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for title, case in CASES.items():
        start = {}
        for name in TRAINERS:
            seconds, losses = measure(case | {"name": title}, name, start)
            rows.append({"case": title, **case, "trainer": name, "seconds": round(seconds, 2), "losses": [round(v, 5) for v in losses],
                         "versions": {package: importlib.metadata.version(package) for package in PACKAGES}})
            print(f"{title}, {name}: {seconds:.1f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
            gc.collect()
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The table

def table():
    "What chats.jsonl holds, as Markdown."
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    text = ("| what trains | trainer | processor seconds | of ours | loss, first step to last | largest difference to our losses |\n"
            "|---|---|--:|--:|--:|--:|\n")
    for row in rows:
        own = next(r for r in rows if r["case"] == row["case"] and r["trainer"] == "sft_course")
        apart = max(abs(a - b) for a, b in zip(row["losses"], own["losses"], strict=True))
        text += (f"| {row['case']}, {row['chats']} chats, {len(row['losses'])} steps | {row['trainer']} | {row['seconds']:.1f} "
                 f"| {row['seconds'] / own['seconds']:.2f} × | {row['losses'][0]:.3f} to {row['losses'][-1]:.3f} "
                 f"| {'' if row is own else f'{apart:.3f}'} |\n")
    return text + "\nVersions: " + ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items()) + ".\n"


def write():
    "Put the table between its marks in README.md."
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
    readme.write_text(f"{before}{MARKS[0]}\n\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    asked = parser.parse_args()
    if asked.what == "run":
        run()
    elif asked.write:
        write()
    else:
        print(table())


if __name__ == "__main__":
    main()
