"""Tiny models with a tokenizer, saved as folders, and texts: for trainers that tokenize by themselves."""

import random

import sentence_transformers
import transformers
from models import LENGTH, VOCABULARY, llama, t5
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, set_seed

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **names)


def texts(count, seed=0):
    """Random texts, the same every time."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, LENGTH))) for _ in range(count)]


def _encoder():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1}
    return transformers.BertModel(
        transformers.BertConfig(**sizes, **ids, intermediate_size=24, max_position_embeddings=32)
    )


def save_text_model(folder, build):
    """Save a random model with its tokenizer."""
    set_seed(0)
    model = build()
    model.config.pad_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_text_models(folder):
    """Folders `causal` (Llama), `seq2seq` (T5) and `sentences` (a sentence-transformers model over BERT)."""
    save_text_model(folder / "causal", llama)
    save_text_model(folder / "seq2seq", t5)
    save_text_model(folder / "encoder", _encoder)
    modules = [Transformer(str(folder / "encoder")), Pooling(16)]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(str(folder / "sentences"))
