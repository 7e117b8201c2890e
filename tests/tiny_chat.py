"A language model that is small enough for tests."
import torch

TEMPLATE = ("{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant:{% endif %}")


def tiny_model(folder, template=TEMPLATE):
    "A Llama with three small layers and random weights, and a tokenizer of bytes, in a folder."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_special_tokens(["<s>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
