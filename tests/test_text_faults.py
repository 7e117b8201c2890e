"Broken files of texts and chats, each through the command line: one sentence that says which line, no traceback, nothing lost."
import json
import signal
import sys
import warnings

import pytest

pytest.importorskip("transformers")
from tiny_chat import tiny_model  # noqa: E402

from sft_course.tools import cli  # noqa: E402


def rows(*objects):
    return "\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects).encode()


def say(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def pair(prompt, completion="Yes."):
    return {"prompt": prompt, "completion": completion}


GOOD = [pair(f"Question {i}?", f"Answer {i}.") for i in range(4)]
LONG = pair("Why? " * 80)
SPILLS = pair("Why?", "Because. " * 80)

# name: (what the file holds, what the sentence says); each good line but one
CHATS = {
    "broken JSON": (rows(*GOOD, '{"messages": ['), "line 5: this line is no JSON object"),
    "a broken first line": (rows("{", *GOOD), "line 1: this line is no JSON object"),
    "two objects in a line": (rows(json.dumps(GOOD[0]) * 2, *GOOD), "line 1: this line is no JSON object (Extra data"),
    "a comma after each object": (rows(json.dumps(pair("a")) + ",", *GOOD), "line 1: this line is no JSON object"),
    "single quotes": (rows("{'prompt': 'a', 'completion': 'b'}", *GOOD), "line 1: this line is no JSON object"),
    "nested too deep": (rows(*GOOD, "[" * 100_000), "line 5: this line is no JSON object"),
    "a list of messages without its object": (rows(*GOOD, [{"role": "user", "content": "a"}]), "line 5: this is no JSON object;"),
    "a number": (rows(*GOOD, "3"), "line 5: this is no JSON object;"),
    "null": (rows(*GOOD, "null"), "line 5: this is no JSON object;"),
    "an empty object": (rows(*GOOD, {}), "line 5: there is neither"),
    "a prompt without a completion": (rows(*GOOD, {"prompt": "a"}), "line 5: there is neither `messages` nor `prompt` and `completion` (only 'prompt')"),
    "another trainer's fields": (rows(*GOOD, {"instruction": "a", "output": "b"}), "line 5: there is neither"),
    "conversations with from and value": (rows(*GOOD, {"conversations": [{"from": "human", "value": "a"}]}), "(only 'conversations')"),
    "no messages": (rows(*GOOD, {"messages": []}), "line 5: there are no messages"),
    "messages are a text": (rows(*GOOD, {"messages": "user: a"}), "line 5: there are no messages"),
    "a message without a role": (rows(*GOOD, {"messages": [{"content": "a"}]}), "line 5: message 1 is not an object"),
    "a message without content": (rows(*GOOD, {"messages": [{"role": "user"}]}), "line 5: message 1 is not an object"),
    "content is null": (rows(*GOOD, {"messages": [{"role": "user", "content": None}]}), "line 5: message 1 is not an object"),
    "content is a list of parts": (rows(*GOOD, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}), "message 1 is not an object"),
    "a completion is a number": (rows(*GOOD, pair("a", 3)), "line 5: `prompt` and `completion` must each be a text"),
    "an empty answer": (rows(*GOOD, pair("a", "")), "line 5: message 2 (assistant) is empty"),
    "an answer of spaces": (rows(*GOOD, pair("a", " \n\t ")), "line 5: message 2 (assistant) is empty"),
    "an empty question": (rows(*GOOD, pair("")), "line 5: message 1 (user) is empty"),
    "an empty system message": (rows(*GOOD, say(("system", ""), ("user", "a"), ("assistant", "b"))), "line 5: message 1 (system) is empty"),
    "the assistant first": (rows(*GOOD, say(("assistant", "b"), ("user", "a"))), "line 5: the roles are assistant, user"),
    "nobody answers": (rows(*GOOD, say(("user", "a"))), "line 5: the roles are user;"),
    "two users in a row": (rows(*GOOD, say(("user", "a"), ("user", "b"), ("assistant", "c"))), "line 5: the roles are user, user, assistant"),
    "a system message in the middle": (rows(*GOOD, say(("user", "a"), ("system", "b"), ("assistant", "c"))), "line 5: the roles are user, system"),
    "only a system message": (rows(*GOOD, say(("system", "a"))), "line 5: the roles are system"),
    "roles of another trainer": (rows(*GOOD, say(("human", "a"), ("gpt", "b"))), "line 5: the roles are human, gpt"),
    "not UTF-8": (rows(*GOOD) + b'\n{"prompt": "caf\xe9", "completion": "b"}', "line 5: this line is not UTF-8 (byte 16)"),
    "half a character": (rows(*GOOD, '{"prompt": "a \\ud83d", "completion": "b"}'), "line 5: message 1 holds half a character (\\ud83d)"),
    "a token of the template": (rows(*GOOD, pair("a", "b<end>")), "line 5: a message contains <end>"),
    "no supervised token is left": (rows(*GOOD, LONG), "line 5: no answer begins in the first 200 tokens"),
    "an answer is cut off": (rows(*GOOD, SPILLS), "line 5: the answer is cut after token 200"),
    "one prompt, two answers": (rows(*GOOD, pair("question  0?", "No.")), "line 5: it has the prompt of f.jsonl, line 1 and another answer"),
}

# these stop a run with and without --strict
HOPELESS = {
    "UTF-16": (rows(*GOOD).decode().encode("utf-16"), "line 1: this line is not UTF-8"),
    "every line is broken": (rows('{"prompt": 1', "{"), "no line holds a chat"),
    "one chat": (rows(GOOD[0]), "two prompts are needed"),
    "one prompt, many times": (rows(*GOOD[:1] * 5), "two prompts are needed"),
    "all too long": (rows(LONG, LONG), "no chat is left to train on"),
}

TABLES = {
    "a text with two labels": ("t.csv", "text,label\na,x\nA ,y\nb,x\nc,y\n", "lines 2, 3: 'a' is labelled x and y"),
    "a label that occurs once": ("t.csv", "text,label\na,x\nb,x\nc,y\nd,y\ne,z\n", "label 'z' occurs once"),
    "an empty text": ("t.csv", "text,label\na,x\n ,x\nc,y\nd,y\n", "line 3: the text is empty"),
    "an empty label": ("t.csv", "text,label\na,x\nb,x\nc,\nd,\n", "line 4: the label is empty"),
    "labels that differ in case only": ("t.csv", "text,label\na,card\nb,card\nc,Card\nd,Card\n", "labels 'Card' and 'card' differ only in case or spaces"),
    "a separator without quotes": ("t.csv", "text,label\nyes, no,x\n", "line 2: 3 cells under 2 titles"),
    "a quote that is not closed": ("t.csv", 'text,label\na,x\n"b,x\nc,y\nd,y\n', "line 3: a quote is not closed"),
    "only titles": ("t.csv", "text,label\n", "there are no items"),
    "one label": ("t.csv", "text,label\na,x\nb,x\n", "there is one label, 'x'"),
    "two columns could be the label": ("t.csv", "text,a,b\nx,1,2\n", "which column holds the labels"),
    "no column for labels": ("t.csv", "text\nx\n", "which column holds the labels"),
    "Latin-1": ("t.csv", "text,label\ncaf\xe9,x\n".encode("latin-1"), "line 2: not UTF-8"),
    "a null among the texts": ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": null, "label": "x"}', "line 2: there is no 'text'"),
    "a row without a label": ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}', "line 2: there is no 'label'"),
    "broken JSON": ("t.jsonl", '{"text": "a", "label": "x"}\n{"text":', "line 2: broken JSON"),
    "a broken first line": ("t.jsonl", '{"text": "a", "label"\n{"text": "b", "label": "x"}', "line 1: broken JSON"),
    "nested too deep": ("t.jsonl", '{"text": "a", "label": "x"}\n' + "[" * 100_000, "line 2: broken JSON"),
    "half a character": ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "\\ud83d", "label": "x"}', "line 2: the text holds half a character"),
    "a list in place of a text": ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": ["b"], "label": "x"}', "line 2: the text is a list"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        yield tmp_path
    for s, was in signals.items():
        signal.signal(s, was)


def refused(words, monkeypatch, capsys):
    "The one sentence of a command that ended with a status that is not 0."
    monkeypatch.setattr(sys, "argv", ["sft-course", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    lines = [line for line in err.strip().splitlines() if line.startswith("sft-course: ") and not line.startswith("sft-course: note: ")]
    assert end.value.code == 1 and out == "" and len(lines) == 1, (end.value.code, out, err)
    assert "Traceback" not in err and "unexpected" not in err
    return lines[0]


def is_refused(here, name, content, words, said, monkeypatch, capsys):
    "A command refuses a file with a sentence, leaves it as it is, and writes nothing."
    file = here / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused(words, monkeypatch, capsys)
    assert said in sentence and len(sentence) < 400 and sentence.endswith("."), sentence
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert sorted(p.name for p in here.iterdir()) == [name]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_that_is_no_good_is_named(here, base, name, monkeypatch, capsys):
    words = ("fit", "f.jsonl", "--strict", "--backbone", base, "--max-tokens", 200, "--out", "out")
    is_refused(here, "f.jsonl", CHATS[name][0], words, CHATS[name][1], monkeypatch, capsys)


@pytest.mark.parametrize("name", HOPELESS)
def test_a_file_that_holds_too_little_is_refused(here, base, name, monkeypatch, capsys):
    words = ("fit", "f.jsonl", "--backbone", base, "--max-tokens", 200, "--out", "out")
    is_refused(here, "f.jsonl", HOPELESS[name][0], words, HOPELESS[name][1], monkeypatch, capsys)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_no_good_is_refused(here, name, monkeypatch, capsys):
    file, content, said = TABLES[name]
    is_refused(here, file, content, ("fit", file, "--strict", "--out", "out"), said, monkeypatch, capsys)


@pytest.mark.parametrize("file, content", [("f.json", rows(GOOD)), ("f.jsonl", b'{"messages": 1')], ids=["a JSON array", "nothing but a broken line"])
def test_what_holds_no_chat_is_refused_by_check_too(here, file, content, monkeypatch, capsys):
    is_refused(here, file, content, ("check", file), "", monkeypatch, capsys)


def test_test_prompts_that_train_are_named(here, base, monkeypatch, capsys):
    (here / "test.jsonl").write_bytes(rows(pair("Question 1?")))
    (here / "f.jsonl").write_bytes(rows(*GOOD))
    words = ("fit", "f.jsonl", "--test", "test.jsonl", "--strict", "--backbone", base, "--out", "out")
    assert "test.jsonl, line 1: its prompt is that of f.jsonl, line 2" in refused(words, monkeypatch, capsys)
    assert not (here / "out").exists()


def test_without_strict_what_is_no_good_is_left_out_and_counted(here, base, monkeypatch, capsys):
    (here / "f.jsonl").write_bytes(rows(*GOOD, "{", LONG, SPILLS))
    words = ("fit", "f.jsonl", "--backbone", str(base), "--max-tokens", "200", "--epochs", "1", "--out", "out", "--json")
    monkeypatch.setattr(sys, "argv", ["sft-course", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    card = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and card["left_out"] == 3 and card["metrics"]["n_train"] + card["metrics"]["n_val"] == 4
    assert [text.split(":")[0] for text in card["problems"]] == [f"f.jsonl, line {n}" for n in (5, 6, 7)]
    assert "<end> pads and ends a turn" in card["notes"][0]
    assert json.loads((here / "out" / "card.json").read_text(encoding="utf-8"))["problems"] == card["problems"]


def test_there_are_enough_of_them():
    assert len(CHATS) + len(HOPELESS) + len(TABLES) >= 40
