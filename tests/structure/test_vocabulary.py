"""Tokens that are never used leave model and tokenizer: the same texts have the same tokens and the same outputs."""

import copy
import json
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_prune import StructureError, shrink_vocabulary
from hf_prune.errors import ArgumentError
from hf_prune.structure.tokens import tokens_to_keep
from hf_prune.structure.vocabulary import smaller_vocabulary

SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>", "mask_token": "<mask>"}


def made_up_texts(count, seed=0):
    """Texts of made-up words, the same every time."""
    generator = random.Random(seed)
    syllables = ["ba", "ko", "li", "mur", "sta", "ne", "wi", "drof", "é", "xu"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(150)]
    return [" ".join(generator.choices(words, k=generator.randint(2, 9))) for _ in range(count)]


CORPUS = made_up_texts(300)
USED, OTHER = CORPUS[:12], [*CORPUS[12:], "Something else, with 12 new words: жук", ""]


def pieces():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    ends = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    made.decoder = decoders.WordPiece()
    return made


def byte_merges():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    ends = [(token, made.token_to_id(token)) for token in ("</s>", "<s>")]
    made.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def suffix_merges():
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return made


def fallback_merges():
    """Merges over words with a mark for the space, and bytes for other characters, as Llama's first tokenizer has."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def scores():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = decoders.Metaspace()
    return made


def words():
    vocabulary = [*SPECIAL, *sorted({word for text in CORPUS for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS = [pieces, byte_merges, suffix_merges, fallback_merges, scores, words]


def fast(made, **names):
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **{**NAMES, **names})


def llama(tokenizer, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    config = transformers.LlamaConfig(**{"vocab_size": len(tokenizer), **sizes, **ids, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def bert_for_masks(tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer) + 7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def bart(tokenizer):
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=3, decoder_start_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    return model


def gpt2(tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tokens_of(tokenizer, texts):
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


def logits_of(model, tokenizer, texts):
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_same_tokens_and_outputs_and_other_texts_have_tokens(kind, tmp_path):
    tokenizer = fast(kind())
    model = llama(tokenizer)
    before, known = tokens_of(tokenizer, USED), tokenizer.get_vocab()
    expected = logits_of(model, tokenizer, USED)
    smaller = shrink_vocabulary(model, tokenizer, USED)
    assert len(smaller) == model.config.vocab_size < len(known)
    assert tokens_of(smaller, USED) == before
    kept = [known[token] for token, _ in sorted(smaller.get_vocab().items(), key=lambda pair: pair[1])]
    assert kept == sorted(kept)
    assert torch.equal(logits_of(model, smaller, USED), expected[..., kept])
    for text, old in zip(OTHER, tokens_of(tokenizer, OTHER), strict=True):
        [new] = tokens_of(smaller, [text])
        assert new or not old
        if kind is not words:
            assert new.count("<unk>") == old.count("<unk>")
            assert smaller.decode(smaller(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert tokenizer.get_vocab() == known  # of the one that was given, nothing changed
    model.save_pretrained(tmp_path)
    smaller.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, AutoTokenizer.from_pretrained(tmp_path), USED), expected[..., kept])


@pytest.mark.parametrize("build", [bert_for_masks, bart, gpt2])
def test_tied_embeddings_biases_and_buffers_lose_the_same_rows(build, tmp_path):
    tokenizer = fast(byte_merges())
    model = build(tokenizer)
    expected = logits_of(model, tokenizer, USED)
    known = tokenizer.get_vocab()
    smaller = shrink_vocabulary(model, tokenizer, USED)
    kept = [known[token] for token, _ in sorted(smaller.get_vocab().items(), key=lambda pair: pair[1])]
    assert torch.equal(logits_of(model, smaller, USED), expected[..., kept])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert torch.equal(logits_of(again.eval(), smaller, USED), expected[..., kept])


def _merged(made):
    model = json.loads(made.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _scored():
    return {"vocab": [tuple(pair) for pair in json.loads(scores().to_str())["model"]["vocab"]]}


MARKS = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
CLASSES = {
    "BertTokenizer": lambda: {"vocab": pieces().get_vocab(), **MARKS},
    "MPNetTokenizer": lambda: {"vocab": pieces().get_vocab(), "unk_token": "<unk>"},
    "GPT2Tokenizer": lambda: {**_merged(byte_merges()), **NAMES},
    "RobertaTokenizer": lambda: _merged(byte_merges()),
    "Qwen2Tokenizer": lambda: _merged(byte_merges()),
    "WhisperTokenizer": lambda: {**_merged(byte_merges()), **NAMES},
    "LlamaTokenizer": lambda: {**_merged(fallback_merges()), "pad_token": "<pad>"},
    "GemmaTokenizer": lambda: {**_merged(fallback_merges()), **NAMES},
    "NllbTokenizer": lambda: _merged(fallback_merges()),
    "CLIPTokenizer": lambda: {**_merged(suffix_merges()), **NAMES},
    "T5Tokenizer": lambda: {**_scored(), "extra_ids": 5},
    "XLMRobertaTokenizer": _scored,
    "MBartTokenizer": _scored,
    "XLNetTokenizer": lambda: {**_scored(), **NAMES},
    "AlbertTokenizer": lambda: {**_scored(), **MARKS},
    "DebertaV2Tokenizer": lambda: {**_scored(), **MARKS},
}


@pytest.mark.parametrize("name", list(CLASSES))
def test_tokenizers_of_many_classes_keep_the_tokens_of_texts_and_open_again(name, tmp_path):
    tokenizer = getattr(transformers, name)(**CLASSES[name]())
    model = llama(tokenizer, vocab_size=max(tokenizer.get_vocab().values()) + 1, bos_token_id=None, eos_token_id=None)
    smaller = smaller_vocabulary(model, tokenizer, USED).tokenizer
    assert type(smaller) is type(tokenizer)
    assert len(smaller) < len(tokenizer)
    assert tokens_of(smaller, USED) == tokens_of(tokenizer, USED)
    decoded = [[one.decode(ids) for ids in one(OTHER)["input_ids"]] for one in (tokenizer, smaller)]
    assert decoded[0] == decoded[1]
    smaller.save_pretrained(tmp_path)
    assert tokens_of(AutoTokenizer.from_pretrained(tmp_path), USED) == tokens_of(tokenizer, USED)


def test_ids_in_the_configurations_are_those_of_the_same_tokens():
    made = pieces()
    made.add_special_tokens(["<image>"])
    made.add_tokens(["drofxu!"])
    tokenizer = fast(made)
    last, plain = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.convert_tokens_to_ids("drofxu!")
    unused = next(
        token
        for token in tokenizer.get_vocab()
        if len(token) > 4 and not any(token in t for t in tokens_of(tokenizer, USED))
    )
    model = llama(tokenizer, eos_token_id=[1, last])
    model.generation_config.suppress_tokens = [plain, -1]
    model.generation_config.bad_words_ids = [[tokenizer.convert_tokens_to_ids(unused)]]
    model.generation_config.lang_to_id = {"<|en|>": last}
    smaller = shrink_vocabulary(model, tokenizer, USED)
    new = smaller.convert_tokens_to_ids(["<image>", "drofxu!", unused])
    assert max(new) < len(smaller) < len(tokenizer)
    assert new[0] != last
    assert model.config.eos_token_id == [1, new[0]]
    assert model.generation_config.eos_token_id == [1, new[0]]
    assert model.generation_config.suppress_tokens == [new[1], -1]
    assert model.generation_config.bad_words_ids == [[new[2]]]
    assert model.generation_config.lang_to_id == {"<|en|>": new[0]}
    model.generate(**smaller(USED[:1], return_tensors="pt"), max_new_tokens=2, use_cache=True)


def test_named_tokens_stay_and_training_goes_on():
    tokenizer = fast(pieces())
    model = llama(tokenizer)
    long_ones = [token for token in tokenizer.get_vocab() if len(token) > 4]
    optimizer = torch.optim.Adam(model.parameters())
    inputs = tokenizer(USED, return_tensors="pt", padding=True)["input_ids"]
    model(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state[model.model.embed_tokens.weight]["exp_avg"])
    smaller = shrink_vocabulary(model, tokenizer, USED[:1], keep=long_ones, optimizer=optimizer)
    assert set(long_ones) <= set(smaller.get_vocab())
    known = tokenizer.get_vocab()
    kept = [known[token] for token, _ in sorted(smaller.get_vocab().items(), key=lambda pair: pair[1])]
    assert torch.equal(optimizer.state[model.model.embed_tokens.weight]["exp_avg"], before[kept])
    inputs = smaller(USED[:1], return_tensors="pt")["input_ids"]
    model(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()


def test_the_tokens_that_a_token_is_merged_from_stay():
    merges = [["l", "o"], ["lo", "w"], ["o", "w"], ["e", "r"], ["low", "er"]]
    vocabulary = ["l", "o", "w", "e", "r", "lo", "low", "ow", "er", "lower"]
    model = {"type": "BPE", "vocab": {token: place for place, token in enumerate(vocabulary)}, "merges": merges}
    kept = tokens_to_keep({"model": model, "added_tokens": []}, ["lower"])
    assert kept == {"l", "o", "w", "e", "r", "lo", "low", "er", "lower"}


def test_words_that_single_characters_cannot_spell_stay():
    vocabulary = ["[UNK]", "a", "##a", "b", "abba", "ada", "aa"]
    model = {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "vocab": {token: place for place, token in enumerate(vocabulary)},
    }  # fmt: skip
    assert tokens_to_keep({"model": model, "added_tokens": []}, []) == {*vocabulary} - {"aa"}


def test_what_cannot_be_done_is_refused_and_nothing_is_changed():
    tokenizer = fast(pieces())
    model = llama(tokenizer)
    for texts in (USED[0], [], [USED[0], None]):
        with pytest.raises(ArgumentError, match="texts: expected one or more texts, got"):
            shrink_vocabulary(model, tokenizer, texts)
    with pytest.raises(StructureError, match="keep: expected tokens of the tokenizer, got 'Drof'"):
        shrink_vocabulary(model, tokenizer, USED, keep=["Drof"])
    with pytest.raises(StructureError, match=r"tokenizer: expected ids below 50, the model's vocabulary, got"):
        shrink_vocabulary(llama(tokenizer, vocab_size=50), tokenizer, USED)
    slow = type("Slow", (transformers.PythonBackend,), {"vocab_size": 5, "get_vocab": lambda self: {}})
    with pytest.raises(StructureError, match="tokenizer: expected a fast tokenizer, which has"):
        shrink_vocabulary(model, slow(), USED)
    with pytest.raises(StructureError, match="model: ViTForImageClassification has no embeddings of tokens"):
        shrink_vocabulary(transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )), tokenizer, USED)  # fmt: skip
    dropping = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
    with pytest.raises(StructureError, match="tokenizer: expected merges without dropout, got"):
        shrink_vocabulary(model, PreTrainedTokenizerFast(tokenizer_object=dropping), ["ab"])
    assert model.config.vocab_size == len(tokenizer)


def test_two_vocabularies_are_refused():
    tokenizer = fast(pieces())
    one = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(one, copy.deepcopy(one))
    model = transformers.EncoderDecoderModel(config)
    with pytest.raises(StructureError, match="model: expected one field of EncoderDecoderConfig that sets"):
        shrink_vocabulary(model, tokenizer, USED)
