"""How fast a small language model is tuned: ours, Hugging Face's Trainer, TRL's, and the bare step, on the same chats in the same number of steps.

`python tests/benchmarks/text.py --device cuda` measures and writes text.csv; with nothing else on the device. `--write` puts the table into
README.md. SmolLM2-135M-Instruct, gardener's notes with the records they should become, batches of eight; bfloat16 where the device has it.
"""
import argparse
import copy
import csv
import gc
import tempfile
import time
from pathlib import Path

from marks import between_marks
from tasks import spread

HERE = Path(__file__).parent
RESULTS = HERE / "text.csv"
BEGIN, END = "<!-- text begin -->", "<!-- text end -->"
WAYS = ("upper 4 layers, ours", "upper 4 layers, Trainer", "upper 4 layers, TRL", "upper 4 layers, bare step",
        "LoRA on all layers, ours", "LoRA on all layers, Trainer with peft", "LoRA on all layers, TRL with peft",
        "LoRA on all layers, bare step with peft")
UPPER, RANK, BATCH, EPOCHS = 4, 8, 8, 3


def train_only_upper(model):
    "Freeze all but the upper layers and the final norm."
    model.requires_grad_(False)
    for part in (*model.model.layers[-UPPER:], model.model.norm):
        part.requires_grad_(True)
    return model


def with_peft(model):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))


def padded(rows, pad):
    "A batch: tokens, labels and mask, padded on the right."
    import torch
    from torch.nn.utils.rnn import pad_sequence
    tokens = pad_sequence([torch.as_tensor(r["input_ids"]) for r in rows], batch_first=True, padding_value=pad)
    labels = pad_sequence([torch.as_tensor(r["labels"]) for r in rows], batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones(len(r["input_ids"]), dtype=torch.long) for r in rows], batch_first=True)
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def ours(model, tokenizer, rows, lr, lora, precision, device):
    "What `sft-course fit` runs; the states of the frozen layers are computed within the time."
    import torch

    from sft_course.tools.chat_run import ChatPlan, tune_chats
    encoded = [(torch.tensor(r["input_ids"]), torch.tensor(r["labels"])) for r in rows]
    layers = len(model.model.layers) if lora else UPPER
    plan = ChatPlan(layers, "lora" if lora else None, RANK, lr, EPOCHS, BATCH)
    told, _ = tune_chats(model, plan, encoded, encoded[:1], precision=precision)
    return sum(row["train_loss"] for row in told["history"]) / EPOCHS


def as_ours(folder, lr, precision, device):
    "The options with which a trainer of transformers, or one made from it, does what ours does."
    return {"output_dir": folder, "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": lr,
            "lr_scheduler_type": "cosine", "weight_decay": 0., "max_grad_norm": 0., "save_strategy": "no", "logging_strategy": "no",
            "report_to": [], "disable_tqdm": True, "bf16": precision is not None, "use_cpu": device == "cpu"}


def trainer(model, tokenizer, rows, lr, lora, precision, device):
    "transformers' Trainer."
    from transformers import Trainer, TrainingArguments
    model = with_peft(model) if lora else train_only_upper(model)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**as_ours(folder, lr, precision, device), remove_unused_columns=False)
        return Trainer(model, args, lambda some: padded(some, tokenizer.pad_token_id), rows).train().training_loss


def trl(model, tokenizer, rows, lr, lora, precision, device):
    "TRL's SFTTrainer, on the same tokens and labels."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    model = with_peft(model) if lora else train_only_upper(model)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**as_ours(folder, lr, precision, device), gradient_checkpointing=False)
        return SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train().training_loss


def bare(model, tokenizer, rows, lr, lora, precision, device):
    "Forward, backward, AdamW: nothing else."
    import numpy as np
    import torch
    model = (with_peft(model) if lora else train_only_upper(model)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0., fused=True)
    orders = [np.random.default_rng(e).permutation(len(rows)) for e in range(EPOCHS)]
    steps, losses = [order[i:i + BATCH] for order in orders for i in range(0, len(rows), BATCH)], []
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for step in steps:
        batch = {k: v.to(device) for k, v in padded([rows[i] for i in step], tokenizer.pad_token_id).items()}
        with torch.autocast(device, precision, enabled=precision is not None):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        plan.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


RUNS = {"ours": ours, "Trainer": trainer, "TRL": trl, "bare step": bare}


def measure(device: str, examples: int, repeats: int, results: Path) -> None:
    "Every way once to warm up, then `repeats` times in turn; a row of `results` for each."
    import peft
    import torch
    import transformers

    from sft_course.language import encode_chats
    from sft_course.tools.garden_notes import draw_notes, note_chat
    from sft_course.tools.language_models import open_language_model
    from sft_course.tools.steps import native_bfloat16
    start, tokenizer = open_language_model()
    start.to(device)
    precision = native_bfloat16(device) if device == "cuda" else None
    chats = [note_chat(note) for note in draw_notes(examples)]
    rows = [{"input_ids": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in encode_chats(tokenizer, chats)[0]]
    made = []
    for turn in range(repeats + 1):
        n = examples if turn else 2 * BATCH
        for way in WAYS:
            lora = way.startswith("LoRA")
            run = next(run for name, run in RUNS.items() if name in way)
            model = copy.deepcopy(start)
            gc.collect()
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            loss = run(model, tokenizer, rows[:n], 1e-3, lora, precision, device)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            if not turn:
                continue
            made.append({
                "way": way, "turn": turn, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": torch.get_num_threads(),
                "precision": str(precision).removeprefix("torch."), "examples": n, "seconds": round(seconds, 3),
                "tokens_per_second": round(EPOCHS * sum(len(r["input_ids"]) for r in rows[:n]) / seconds, 1), "loss": round(float(loss), 4),
                "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "peft": peft.__version__})
            print(made[-1], flush=True)
            with results.open("w", newline="", encoding="utf-8") as f:
                out = csv.DictWriter(f, list(made[0]))
                out.writeheader()
                out.writerows(made)


def table(results: Path = RESULTS) -> str:
    "The table as Markdown: mean, least and greatest over the turns."
    with results.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    lines = ["| what trains, and by what | tokens a second | of the bare step's time | mean loss |", "|---|---|---|---|"]
    for way in WAYS:
        mine = [r for r in rows if r["way"] == way]
        base = [float(r["seconds"]) for r in rows if r["way"].startswith(way.split(",")[0]) and "bare" in r["way"]]
        seconds = [float(r["seconds"]) for r in mine]
        share = sum(seconds) / len(seconds) / (sum(base) / len(base))
        lines.append(f"| {way} | {spread([float(r['tokens_per_second']) for r in mine], 0)} | {share:.2f} | "
                     f"{spread([float(r['loss']) for r in mine], 3)} |")
    one = rows[0]
    where = f"{one['threads']} threads of a processor" if one["device"] == "cpu" else one["device"]
    kind = "float32" if one["precision"] == "None" else one["precision"]
    lines += ["", f"Measured on {where} in {kind}, {one['examples']} chats in batches of {BATCH}, {EPOCHS} epochs, "
              f"{len(rows) // len(WAYS)} turns; torch {one['torch']}, transformers {one['transformers']}, peft {one['peft']}."]
    return "\n".join(lines)


def written(text: str) -> str:
    "README.md with the table between its marks."
    return between_marks(text, BEGIN, END, table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.device:
        measure(given.device, given.examples, given.repeats, given.results)
    print(table(given.results))
    if given.write:
        readme = HERE / "README.md"
        readme.write_text(written(readme.read_text(encoding="utf-8")), encoding="utf-8")
