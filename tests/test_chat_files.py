"Chats at the command line: tuned, asked, talked to, refused in a sentence, and gone on with after a stop or a kill."
import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("transformers")
from tiny_chat import tiny_model  # noqa: E402

import sft_course.tools.training as training  # noqa: E402
from sft_course.tools import chat_command, chat_run, cli, language_models  # noqa: E402
from sft_course.tools.chat_files import as_chats, end_of_turn, split_chats, template_notes  # noqa: E402
from sft_course.tools.chat_kinds import holds_chats, is_chat_model  # noqa: E402
from sft_course.tools.chat_run import ChatResult, fine_tune_chats, load_chat_model, make_plan  # noqa: E402
from sft_course.tools.garden_notes import draw_notes, note_chat  # noqa: E402
from sft_course.tools.language_models import open_language_model  # noqa: E402
from sft_course.tools.sentences import holds_texts  # noqa: E402
from sft_course.tools.settings import SFTError  # noqa: E402

SMALL = {"layers": 2, "epochs": 2, "lr": 1e-2}
BYTES = ("model.safetensors", "history.csv", "report.html")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "Twenty chats, in both forms."
    rows = [{"messages": note_chat(n)} if i % 2 else {"prompt": note_chat(n)[:2], "completion": note_chat(n)[2]["content"]}
            for i, n in enumerate(draw_notes(20))]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(base, file, tmp_path_factory):
    "A folder with a model that was tuned by an adapter, and the result."
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, fine_tune_chats(file, out, model=base, test=[note_chat(n) for n in draw_notes(5, seed=9)], adapter="lora", rank=4, **SMALL)


def fresh(*words, cwd, said=None):
    "Exit status, output and errors of `sft-course` in a process of its own."
    done = subprocess.run([sys.executable, "-m", "sft_course", *map(str, words)], cwd=cwd, capture_output=True, text=True, input=said)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "Exit status, output and errors of `sft-course` in this process, which has torch already."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sft-course", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err
    with warnings.catch_warnings():
        yield run
    for s, was in signals.items():
        signal.signal(s, was)


# ---- the command line

def test_chats_are_fitted_asked_and_talked_to(base, file, command, tmp_path):
    status, out, err = fresh("fit", file, "--out", "model", "--backbone", base, "--train", 2, "--epochs", 1, "--json", cwd=tmp_path)
    assert status == 0, err
    card = json.loads(out)
    assert card["task"] == "chat" and card["metrics"]["n_train"] == 16 and card["metrics"]["n_val"] == 4
    assert card["plan"]["layers"] == 2 and card["artifact"] == "model" and "epoch 1: training loss" in err
    (tmp_path / "prompts.txt").write_text("Two roses.\nSix asters, ä.\n", encoding="utf-8")
    status, out, err = command("predict", "model", "One lily.", "prompts.txt", "--json")
    assert status == 0 and [r["prompt"] for r in json.loads(out)["predictions"]] == ["One lily.", "Two roses.", "Six asters, ä."]
    status, out, err = command("predict", "model", "One lily.", "--csv", "said.csv")
    assert status == 0 and pd.read_csv(tmp_path / "said.csv").columns.tolist() == ["prompt", "answer", "finished"]
    status, out, err = fresh("chat", "model", "--max-new-tokens", 4, cwd=tmp_path, said="One lily.\n/new\nTwo roses.\n\nnever read\n")
    assert status == 0 and "(a new conversation)" in out, err
    status, _, err = command("fit", file, "--out", "model", "--backbone", base)
    assert status == 1 and "a model lies there" in err


def test_check_says_what_is_wrong(file, command, tmp_path, monkeypatch):
    def missing():
        raise SFTError("not installed")
    monkeypatch.setattr(language_models, "bundled_file", missing)  # it takes half a minute to unpack
    bad = tmp_path / "bad.jsonl"
    bad.write_text(file.read_text(encoding="utf-8") + '\n{"prompt": "x"}\n', encoding="utf-8")
    status, out, _ = command("check", bad, "--json")
    told = json.loads(out)
    assert status == 0 and "tokens were not counted" in told["notes"][0]
    assert told["n"] == 20 and [p["path"] for p in told["problems"]] == ["bad.jsonl, line 21"]
    status, _, err = command("check", bad, "--strict")
    assert status == 1 and "bad.jsonl, line 21: there is neither" in err


@pytest.mark.parametrize("options, said", [(["--image-size", "64"], "--image-size is for images"), (["--loss", "focal"], "--loss is for images"),
                                           (["--train", "head"], "has no head of its own"), (["--adapter", "ia3"], "use lora"),
                                           (["--backbone", "nowhere"], "no language model here")])
def test_what_does_not_fit_is_refused(file, command, tmp_path, options, said):
    status, _, err = command("fit", file, *options, "--out", "out")
    assert status == 1 and said in err and len(err.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_an_option_of_chats_is_refused_elsewhere(command, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,x\n", encoding="utf-8")
    status, _, err = command("fit", "t.csv", "--rank", 4)
    assert status == 1 and "--rank is for chats" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_stopped_command_goes_on_to_the_same_bytes(base, file, command, tmp_path, how):
    words = ["fit", str(file), "--out", "a", "--backbone", str(base), "--epochs", "20", "--batch-size", "2", "--lr", "1e-3"]
    started = [sys.executable, "-m", "sft_course", *words]
    with subprocess.Popen(started, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        for line in run.stderr:
            if line.startswith("epoch 2:"):
                run.send_signal(how)
                break
        said = run.stderr.read()
    assert (tmp_path / "a" / "last.ckpt").exists() and not is_chat_model(tmp_path / "a")
    if how == signal.SIGTERM:
        assert run.returncode == 143 and "--resume" in said
    status, _, err = command(*words)
    assert status == 1 and "an unfinished run lies there" in err
    status, _, err = command(*words, "--resume")
    assert status == 0, err
    words[words.index("a")] = "b"
    assert command(*words)[0] == 0
    # after a stop inside an epoch its training loss is the mean of two means, weighted by chats and not by tokens; the weights are the same
    for name in BYTES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert not list((tmp_path / "a").glob(".model*")) and not (tmp_path / "a" / "last.ckpt").exists()


# ---- stops in Python

@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("at", ["epoch", "writing"])
def test_a_run_that_dies_goes_on_to_the_same_bytes(base, file, tmp_path, monkeypatch, adapter, at):
    plan = SMALL | {"adapter": adapter, "model": base}
    module, name = {"epoch": (training, "save_checkpoint"), "writing": (chat_run, "chat_report")}[at]
    whole = getattr(module, name)

    def dies(*args, **kwargs):
        whole(*args, **kwargs)
        raise RuntimeError("the power fails")
    monkeypatch.setattr(module, name, dies)
    with pytest.raises(RuntimeError, match="the power fails"):
        fine_tune_chats(file, tmp_path / "a", **plan)
    assert (tmp_path / "a" / "last.ckpt").exists() and not is_chat_model(tmp_path / "a")
    monkeypatch.setattr(module, name, whole)
    with pytest.raises(SFTError, match="an unfinished run lies there"):
        fine_tune_chats(file, tmp_path / "a", **plan)
    with pytest.raises(SFTError, match="other plan"):
        fine_tune_chats(file, tmp_path / "a", resume=True, **plan | {"lr": 2e-2})
    with pytest.raises(SFTError, match="other chats"):
        fine_tune_chats(as_chats(file).chats[:-1], tmp_path / "a", resume=True, **plan)
    fine_tune_chats(file, tmp_path / "a", resume=True, **plan)
    fine_tune_chats(file, tmp_path / "b", **plan)
    for part in (*BYTES, *(["adapter/adapter_model.safetensors"] if adapter else [])):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes(), part


def test_a_run_that_has_ended_is_given_back(base, file, tmp_path):
    one = fine_tune_chats(file, tmp_path / "a", model=base, **SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir() if p.name != ".lock"}
    with pytest.warns(UserWarning, match="has ended already"):
        two = fine_tune_chats(file, tmp_path / "a", model=base, resume=True, **SMALL)
    assert one.card == two.card and {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(SFTError, match="a model lies there"):
        fine_tune_chats(file, tmp_path / "a", model=base, **SMALL)


# ---- what is written

@pytest.mark.slow
def test_plain_transformers_opens_the_folder_in_a_fresh_process(tuned, tmp_path):
    out, result = tuned
    tokens = torch.arange(20)[None]
    torch.save(result.model(tokens).logits, tmp_path / "logits.pt")
    code = ("import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "m, t = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])\n"
            "assert not any('sft_course' in name for name in sys.modules)\n"
            "assert m.lm_head.weight is m.model.embed_tokens.weight and t.chat_template and m.generation_config.eos_token_id == 257\n"
            "assert torch.equal(m(torch.arange(20)[None]).logits, torch.load(sys.argv[2]))\n")
    subprocess.run([sys.executable, "-c", code, out, tmp_path / "logits.pt"], check=True)


def test_peft_opens_the_adapter_and_both_give_the_same_logits(tuned, base):
    peft = pytest.importorskip("peft")
    out, result = tuned
    tokens = torch.arange(40)[None]
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    assert torch.allclose(apart(tokens).logits, result.model(tokens).logits, atol=1e-5)
    assert not torch.allclose(open_language_model(base)[0](tokens).logits, result.model(tokens).logits, atol=1e-3)
    again = apart.merge_and_unload()
    assert torch.allclose(again(tokens).logits, result.model(tokens).logits, atol=1e-5)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_card_and_the_history_say_what_was_done(tuned):
    out, result = tuned
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert card == result.card and card["plan"]["adapter"] == "lora" and card["metrics"]["n_test"] == 5
    history = pd.read_csv(out / "history.csv")
    assert card["best_epoch"] == 1 + history.val_loss.argmin() and np.isclose(history.val_loss.min(), card["metrics"]["val_loss"], rtol=1e-3)
    assert card["system"] and len(card["samples"]) == 3 and "<table>" in (out / "report.html").read_text(encoding="utf-8")
    assert result.val_loss < card["metrics"]["start_loss"]


def test_what_is_loaded_answers_as_what_was_tuned(tuned, tmp_path):
    out, result = tuned
    prompts = ["Two roses.", [{"role": "system", "content": "s"}, {"role": "user", "content": "Six asters by the wall."}]]
    again = load_chat_model(out)
    assert again.predict(prompts, 6) == result.predict(prompts, 6) == [result.predict([p], 6)[0] for p in prompts]
    assert result.chat("x")[0] == {"role": "system", "content": result.card["system"]} and result.chat(prompts[1]) == prompts[1]
    saved = load_chat_model(result.save(tmp_path / "saved"))
    assert saved.predict(prompts, 6) == result.predict(prompts, 6)
    with pytest.raises(SFTError, match="something already"):
        result.save(tmp_path / "saved")
    with pytest.raises(SFTError, match="no tuned language model"):
        load_chat_model(tmp_path)


@pytest.mark.parametrize("layers", [1, "all"])
def test_what_is_frozen_stays(base, file, layers):
    before = open_language_model(base)[0].state_dict()
    result = fine_tune_chats(file, model=base, layers=layers, epochs=1)
    moved = [k for k, v in result.model.state_dict().items() if not torch.equal(v, before[k])]
    first = 2 if layers == 1 else 0
    assert moved and all(k.startswith(("model.norm.", *(f"model.layers.{i}." for i in range(first, 3)))) for k in moved)


# ---- the end of a turn, plans, splits

def test_where_eos_is_not_the_end_of_a_turn_the_tuned_model_stops_at_the_turn(base, file, tmp_path):
    model, tokenizer = open_language_model(base)
    tokenizer.add_special_tokens({"eos_token": "<s>"})
    assert end_of_turn(tokenizer) == "<end>" and "stops at <end>" in template_notes(tokenizer)[-1]
    result = fine_tune_chats(file, tmp_path / "o", model=(model, tokenizer), epochs=1)
    config = json.loads((tmp_path / "o" / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == 257 and result.tokenizer.eos_token == "<end>"


@pytest.mark.parametrize("template, said", [(None, "no chat template"), ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                                            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", "no end-of-turn token")], ids=["none", "endless"])
def test_a_template_that_never_ends_a_turn_is_refused_before_training(file, tmp_path, template, said):
    folder = tiny_model(tmp_path / "m", template)
    with pytest.raises(SFTError, match=said):
        fine_tune_chats(file, tmp_path / "o", model=folder)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("given, said", [({"depth": 1}, "no part of a plan"), ({"layers": 0}, "layers = 0"), ({"lr": -1.}, "lr = -1.0"),
                                         ({"epochs": 1.5}, "epochs = 1.5"), ({"rank": True}, "rank = True"), ({"seed": -1}, "seed = -1")],
                         ids=lambda v: str(v)[:20])
def test_a_plan_that_is_none_is_refused(given, said):
    with pytest.raises(SFTError, match=said):
        make_plan(**given)


def test_more_layers_than_there_are_is_one_sentence(base, file):
    with pytest.raises(SFTError, match="use 1 to 3"):
        fine_tune_chats(file, model=base, layers=9)


def test_equal_prompts_stay_on_one_side_and_seeds_differ():
    chats = [note_chat(n) for n in draw_notes(30)] * 2
    sides = [split_chats(chats, seed=s) for s in (0, 0, 1)]
    for train, val in sides:
        assert len(val) == 12 and sorted([*train, *val]) == list(range(60)) and not set(train % 30) & set(val % 30)
    assert (sides[0][1] == sides[1][1]).all() and not (sides[0][1] == sides[2][1]).all()


@pytest.mark.parametrize("content, held", [(b'{"prompt": "a", "completion": "b"}', True), (b'{\n{"messages": []}', True), (b'{"text": "a", "label": 1}', False),
                                           ('{"messages": []}'.encode("utf-16"), True), (b"", False), (b'{"conversations": []}', True)],
                         ids=["pair", "broken", "text", "UTF-16", "empty", "other form"])
def test_a_file_of_chats_is_known_by_its_first_field(tmp_path, content, held):
    (tmp_path / "f.jsonl").write_bytes(content)
    assert holds_chats(tmp_path / "f.jsonl") is held and not holds_chats(tmp_path)


# ---- talking

def test_a_conversation_grows_and_forgets_its_oldest_turns(tuned):
    result = tuned[1]
    said = chat_command.talk(result, ["a", "b", "", "c"], lambda text: None, 3)
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user", "assistant"]
    long = [{"role": "system", "content": "s"}] + [{"role": r, "content": "x" * 900} for r in ("user", "assistant", "user", "assistant", "user")]
    kept = chat_command._fitting(result, long, 100)
    assert kept[0]["role"] == "system" and len(kept) == 2 and kept[-1] is long[-1]
    said = []
    answer = chat_command.answer_turn(result, result.chat("One lily."), said.append, 8)
    assert answer == result.predict(["One lily."], 8)[0].text and bool(answer) == bool("".join(said).strip())


def test_prompts_come_as_words_lines_and_rows(tmp_path):
    rows = [{"messages": note_chat(draw_notes(1)[0])}, {"prompt": "Why?"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert chat_command.read_prompts([Path("a word"), tmp_path / "p.jsonl"]) == ["a word", rows[0]["messages"][:2], "Why?"]
    long = Path("Why? " * 100)
    assert chat_command.read_prompts([long]) == [str(long)] and not holds_texts(long)
    (tmp_path / "p.csv").write_text("prompt\nWhy?\n", encoding="utf-8")
    with pytest.raises(SFTError, match="prompts are read from .txt files"):
        chat_command.read_prompts([tmp_path / "p.csv"])
    for bad in ("[1]", "{", '{"prompt": 3}', '{"messages": [3]}', '{"messages": [{"role": "assistant", "content": "x"}]}'):
        (tmp_path / "p.jsonl").write_text(bad, encoding="utf-8")
        with pytest.raises(SFTError, match="p.jsonl, line 1"):
            chat_command.read_prompts([tmp_path / "p.jsonl"])


def test_a_result_needs_no_folder():
    assert ChatResult(None, None, [], {"metrics": {"val_loss": 1.}}, {}).val_loss == 1.


# ---- the real model

@pytest.mark.long
def test_the_bundled_model_learns_the_notes(tmp_path):
    try:
        language_models.bundled_file()
    except SFTError as missing:
        pytest.skip(str(missing))
    result = fine_tune_chats([note_chat(n) for n in draw_notes(10)], tmp_path / "o", layers=1, epochs=2, batch_size=4)
    assert result.val_loss < result.card["metrics"]["start_loss"]
    assert result.card["model"] == "SmolLM2-135M-Instruct" and (tmp_path / "o" / "model.safetensors").stat().st_size > 5e8
