"""Any configuration of transformers made small, by the names of its fields: no model is known by its name.

`VALUES` alone has values for single model types.
"""

import dataclasses
import math
import re

from transformers import PreTrainedConfig

VOCABULARY, POSITIONS = 256, 128
WIDTH, HEADS = 64, 4
IMAGE, PATCH = 64, 16


@dataclasses.dataclass(frozen=True)
class Size:
    """A way to make a configuration small; they are tried in turn."""

    name: str
    scaled: bool = False  # widths divided by one factor, instead of each set
    layers: int = 2
    kinds: bool = True  # one layer of each kind, where a list names the kinds
    images: bool = True  # small images and patches
    widths: bool = True
    sections: bool = False  # rotary positions with sections


SIZES = [
    Size("set"),
    Size("set, with sections of rotary positions", sections=True),
    Size("scaled", scaled=True),
    Size("set, the first layers", kinds=False),
    Size("set, the first layers, images as they are", kinds=False, images=False),
    Size("scaled, four layers", scaled=True, kinds=False, layers=4),
]

# Fields whose values the names do not tell.
VALUES = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 80, "mask_token_id": 64, "pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "lilt": {"hidden_size": 96, "intermediate_size": 128},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
    },
    "superpoint": {"keypoint_decoder_dim": 65},
    "xmod": {"default_language": "en_XX"},
}

# The id of a special token, by its name.
SPECIAL_TOKENS = {"pad": 0, "blank": 0, "bos": 1, "cls": 1, "decoder_start": 1, "eos": 2, "sep": 2, "decoder_end": 2}
SPECIAL_TOKENS["unk"] = 3

# Names of fields that count layers, heads, or widths. Full matches; the second of each pair is left out of the first.
LAYERS = (
    r"num_hidden_layers|n_layers?|depth|.*_depth|n_blocks|block_num|num_block_records|.*layers"
    r"|num_blocks|.*num_.*_blocks",
    r"num_kv_shared_layers|num_residual_layers|num_adapter_layers|.*pos_conv.*|max_window_layers|num_hash_layers"
    r"|num_nextn_predict_layers|share_.*|.*_proj_layers|num_memory_blocks|num_conv_layers|.*subsampling.*"
    r"|insert_layer.*|num_mtp_layers",
)
ATTENTION_HEADS = (r"n_heads?|nhead|.*_heads|.*num_.*_heads", r".*max.*")
WIDTHS = (
    r".*hidden_sizes?|d_model|n_embd|.*emb(ed)?ding_size|embed_size|.*_dims?|dim|.*width|.*channels?|.*intermediate_size"
    r"|d_ff|ffn|ffn_.*size|n_inner|.*_inner|d_.*|.*out_features|.*latent_size|.*proj_size|.*projection_size|stem_.*"
    r"|.*attention_size|.*num_filters|.*_planes|.*lora_rank.*|.*bottleneck.*|output_size|.*feature_size|.*units"
    r"|classifier_proj_size|upsample_groups|.*dim_per_stage|.*conv_filter.*",
    r"(image|num|in|num_image|audio|input|num_input|out)_channels|d_state|d_conv|.*kernel.*|.*mamba_d.*|.*rope.*"
    r"|rotary_dim|(query|position|pos|cond|state|act)_dim|max_.*|window_.*|.*head_dim|.*conv_dim|.*tdnn.*"
    r"|.*action_dim|.*_position_embed.*",
)
IMAGE_SIZES = r"image_size|.*_image_size|crop_size|(max_)?img_size"


def at_most(most):
    """A rule: whole numbers, alone or in lists, become this at most."""
    return lambda value: [min(one, most) for one in value] if isinstance(value, (list, tuple)) else min(value, most)


# Expression -> rule for fields of whole numbers. The first that matches the whole name counts.
RULES = [
    (r".*vocab(ulary)?_size(_.*)?|n_vocab|n_tokens|num_tokens|.*_vocab", at_most(VOCABULARY)),
    (r".*codebook_size|num_embeddings|n_codes|num_codes", at_most(VOCABULARY)),
    (
        r"(.*_)?(max_position_embeddings|n_positions|max_sequence_length|max_seq_len(gth)?|n_ctx|context_length"
        r"|max_length|max_(source|target)_positions|max_2d_position_embeddings|max_text_len"
        r"|max_encoder_position_embeddings)",
        at_most(POSITIONS),
    ),
    (
        r"(.*_)?(num_experts|n_experts|n(um)?_routed_experts|num_local_experts|moe_num_experts|num_moe_experts)",
        at_most(4),
    ),
    (
        r"(.*_)?(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_selected_experts|experts_per_token)",
        at_most(2),
    ),
    (r"n_group|topk_group|num_expert_groups?|num_limited_groups|.*_offset", at_most(1)),
    (r"first_k_dense_replace|.*dense_layers|moe_layer_start_index|max_window_layers", at_most(1)),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_denoising", at_most(0)),
    (r".*_period|(.*_)?blocks_per_stage", at_most(2)),
    (r"num_.*_labels|.*train_num_points", at_most(64)),
]
# The same for fields that are widths.
WIDTH_RULES = [
    (r"(.*_)?n_filters|num_filters|mamba_(n|num)_heads", at_most(8)),
    (r"ngf|base_channels", at_most(32)),
    (r"mamba_d_head|mamba_head_dim|num_conv_pos_embeddings|.*conv_dims?", at_most(16)),
    (r".*rope_head_dim|rotary_dim|d_rope", at_most(8)),
    (r"(.*_)?head_dim|d_kv|(.*_)?head_size|attention_head_dim|kv_channels|.*d_head|head_width|dim_head", at_most(16)),
    (r"tdnn_dim", at_most(32)),
    (r"n_groups|.*_groups", at_most(4)),
    (r"num_queries|num_object_queries|.*num_proposals|num_query_tokens|.*num_latents", at_most(12)),
    (r"index_topk", at_most(16)),
    (r".*sliding_window|.*attention_window|local_attention", at_most(8)),
]


def is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def are_whole(value):
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_whole(one) for one in value)


def is_named(name, expressions):
    wanted, unwanted = expressions
    return re.fullmatch(wanted, name) is not None and re.fullmatch(unwanted, name) is None


def fields_of(config):
    """Field name -> value of a configuration, without what says nothing of its model's shapes."""
    aside = ("transformers_version", "architectures", "id2label", "label2id", "problem_type", "dtype", "return_dict")
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return {name: config.__dict__[name] for name in names if name in config.__dict__ and name not in aside}


def main_width(fields):
    """The width of a model's hidden states."""
    names = "hidden_size d_model n_embd dim embed_dim hidden_dim emb_dim encoder_hidden_size decoder_hidden_size"
    for name in [*names.split(), "embedding_size", "width"]:
        if is_whole(fields.get(name)) and fields[name] > 8:
            return fields[name]
    lists = (fields.get(name) for name in ("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_sizes"))
    return next((max(value) for value in lists if are_whole(value)), 768)


def tiny_config(config, size, tokens=None):
    """A small configuration of the same type; `tokens` are the ids given to special tokens so far."""
    tokens = {} if tokens is None else tokens
    fields = fields_of(config)
    parts = {name: value for name, value in fields.items() if isinstance(value, PreTrainedConfig)}
    plain = _defaults(type(config))
    made = {
        name: value
        for name, value in fields.items()
        if name not in parts and (name not in plain or not _equal(plain[name], value))
    }
    count = _number_of_layers(config, fields)
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and count and count > 4 and len(value) == count
    }
    layers = list(range(size.layers))
    by_kind = size.kinds and any(isinstance(one, str) for value in lists.values() for one in value)
    if by_kind:
        layers = _one_of_each_kind(lists, count)
    backbone = _backbone_layers(fields, count)
    if backbone:
        layers = list(range(max(size.layers, len(backbone))))
    for name, value in fields.items():
        if name in lists:
            made.pop(name, None)
            chosen = [value[layer] for layer in layers]
            if by_kind or not _is_made_when_left_out(type(config), name):
                most = HEADS if is_named(name, ATTENTION_HEADS) else 8 if "window" in name else 2 * WIDTH
                made[name] = at_most(most)(chosen) if are_whole(chosen) else chosen
        elif backbone and name in ("_out_indices", "out_indices", "backbone_out_indices"):
            made[name.removeprefix("_")] = list(range(1, len(backbone) + 1))
        elif name not in parts:
            value = _small_value(name, value, fields, size, len(layers), tokens)
            if value is not None:
                made[name] = value
    for name in ("_out_indices", "_out_features"):  # the configuration takes these under other names
        made.pop(name, None)
    if backbone:
        made.pop("out_features", None)
    made |= {name: tiny_config(part, size, tokens) for name, part in parts.items()}
    made |= VALUES.get(config.model_type, {})
    return type(config)(**made)


def parts_of(config):
    """A configuration and all those within it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from parts_of(value)


def ready_to_train(config):
    """The configuration with what training needs: a first token for decoders, padding, and no cache."""
    for part in parts_of(config):
        if getattr(part, "is_encoder_decoder", False) and getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = 1
        if getattr(part, "use_cache", None) is True:
            part.use_cache = False
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
    return config


def _defaults(config_class):
    try:
        return fields_of(config_class())
    except Exception:  # noqa: BLE001 - a configuration that cannot be made without arguments has no defaults
        return {}


def _equal(one, other):
    return type(one) is type(other) and repr(one) == repr(other)


def _number_of_layers(config, fields):
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth")
    return next(
        (fields[name] for name in names if is_whole(fields.get(name))), getattr(config, "num_hidden_layers", None)
    )


def _one_of_each_kind(lists, count):
    """The first layer of each kind that the lists tell apart; two of the kind where there is one."""
    kinds = [value for value in lists.values() if all(isinstance(one, str) for one in value)]
    first = {}
    for layer in range(count):
        first.setdefault(tuple(kind[layer] for kind in kinds), layer)
    layers = list(first.values())
    return layers if len(layers) > 1 else [layers[0], layers[0] + 1]


def _backbone_layers(fields, count):
    """Layers whose outputs a backbone returns, where it has one stack of them."""
    if not count or any(are_whole(fields.get(name)) for name in ("depths", "hidden_sizes")):
        return None
    names = ("_out_indices", "out_indices", "backbone_out_indices")
    return next((fields[name] for name in names if are_whole(fields.get(name))), None)


def _is_made_when_left_out(config_class, name):
    return any(field.name == name and field.default is None for field in dataclasses.fields(config_class))


def _small_value(name, value, fields, size, layers, tokens):
    """The small value of one field; None where it stays as it is."""
    if value is None:
        missing = {"head_dim": WIDTH // HEADS, "vocab_size": VOCABULARY}
        return _token_id(name, tokens) if name in ("image_token_index", "video_token_index") else missing.get(name)
    if isinstance(value, dict) and "rope" in name:
        return _small_rotary(value, size.sections) if size.widths else None
    if isinstance(value, float):
        return {"depth_coefficient": 0.3, "width_coefficient": 0.2}.get(name)
    if not is_whole(value) and not are_whole(value):
        return None
    if re.fullmatch(
        r".*token_?(id|index)s?|(image|video|audio)_token|(bo|eo)[ia]_(id|index)|img_id|.*token_ids?", name
    ):
        if is_whole(value):
            return _token_id(name, tokens) if value >= 0 else None
        return [_token_id(name, tokens)] if "eos" in name else None
    for expression, rule in RULES:
        if re.fullmatch(expression, name):
            return rule(value)
    if is_named(name, LAYERS):
        if is_whole(value):
            return min(value, layers)
        return at_most(2)(value) if max(value) < 60 and len(value) <= 6 else None
    if re.fullmatch(r"(.*_)?depths(_.*)?|num_layers_per_block|layers_per_stage|stage_num_blocks|num_block_.*", name):
        return at_most(2)(value)
    if re.fullmatch(IMAGE_SIZES, name):
        return _like(value, IMAGE) if size.images and (are_whole(value) or value >= IMAGE) else None
    if re.fullmatch(r"(.*_)?patch_size", name):
        return _like(value, PATCH) if size.images and max(numbers_of(value)) > 9 else None
    return _small_width(name, value, fields, size) if size.widths else None


def _small_width(name, value, fields, size):
    """The small value of a field that counts channels, heads, or what else makes a layer wide."""
    if is_whole(fields.get("embed_dim")) and are_whole(fields.get("depths")) and name == "embed_dim":
        return 16  # of the first of several stages, each twice as wide
    for expression, rule in WIDTH_RULES:
        if re.fullmatch(expression, name) and min(numbers_of(value)) > 0:
            return rule(value)
    if is_named(name, ATTENTION_HEADS):
        if are_whole(value):  # powers of two, which divide the widths
            return [2 ** int(math.log2(min(one, HEADS))) for one in value]
        if re.search(r"kv|key_value|group|linear_num_key|multi_query", name):
            everyone = fields.get(re.sub(r"(key_value|kv)_heads", "attention_heads", name), fields.get("num_heads"))
            return min(value, HEADS if value == everyone else 2)
        return min(value, HEADS)
    if not is_named(name, WIDTHS):
        return None
    if are_whole(value):
        return _small_widths(value, fields)
    if value <= 8:
        return None
    if size.scaled:
        return min(value, _round(value / max(main_width(fields) / WIDTH, 1)))
    if re.search(r"lora_rank|bottleneck|latent", name):
        return min(value, 16)
    main = main_width(fields)
    wide = re.search(r"intermediate|ffn|_ff|inner|mlp_dim", name) or value > 1.5 * main
    of_states = value == main or re.search(r"hidden_size|embed_dim|hidden_dim|d_model", name)
    return min(value, 2 * WIDTH if wide and not of_states else WIDTH)


def _small_widths(value, fields):
    """Lists of widths shrink by one factor, so that those which belong together still do."""
    if min(value) < 1 or max(value) <= 8:
        return None
    top = max(max(other) for name, other in fields.items() if are_whole(other) and is_named(name, WIDTHS))
    factor = max(top / (2 * WIDTH), 1)
    return type(value)(one if one <= 8 else min(one, _round(one / factor)) for one in value)


def _small_rotary(value, sections):
    """Rotary positions whose sections and factors fit the width of a head."""
    half = WIDTH // HEADS // 2
    made = {}
    for key, one in value.items():
        if isinstance(one, dict):
            made[key] = _small_rotary(one, False)
        elif key == "mrope_section" and are_whole(one):
            made[key] = [max(1, round(part * half / sum(one))) for part in one]
            made[key][0] += half - sum(made[key])
        elif key in ("short_factor", "long_factor"):
            made[key] = [1.0] * half
        else:
            made[key] = min(one, 64) if "max_position" in key and is_whole(one) else one
    if sections and not any(isinstance(one, dict) for one in made.values()):
        made.setdefault("mrope_section", [half - 2 * (half // 3), half // 3, half // 3])
    return made


def _token_id(name, tokens):
    stem = re.sub(r"_?(token)?_?(id|index)s?$", "", name)
    return SPECIAL_TOKENS[stem] if stem in SPECIAL_TOKENS else tokens.setdefault(stem, 64 + len(tokens))


def numbers_of(value):
    """A list of numbers, or one as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _like(value, number):
    return type(value)([number] * len(value)) if are_whole(value) else number


def _round(value, step=8):
    return max(step, round(value / step) * step)
