"""Inputs and labels for any model of transformers, by the names of the arguments of forward, and a loss."""

import inspect
import re

import torch
from tiny_configurations import IMAGE, are_whole, fields_of, is_whole, main_width, numbers_of, parts_of
from transformers import PreTrainedConfig

BATCH, LENGTH = 2, 16
WORDS = (5, 60)  # ids of ordinary words; special ones lie below, and from 64 on


def possible_inputs(model, config):
    """Inputs to try, the fullest first, made by the names of forward's arguments."""
    names = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    text = text_inputs(model, config)
    height, width = image_sides(config)
    images = torch.randn(BATCH, channels(config), height, width)
    frames = torch.randn(BATCH, first_number(config, ("num_frames", "frames_per_clip"), 4), *images.shape[1:])
    with_text = text if "input_ids" in names else {"decoder_input_ids": words()} if "decoder_input_ids" in names else {}
    if "input_ids" in names and main in ("input_ids", "decoder_input_ids"):
        yield from image_text_inputs(model, config, text)
        yield text
        if "pixel_values" in names:
            yield {**text, "pixel_values": images}
            yield {
                **text,
                "pixel_values": images[:, None],
                "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
            }
        if "bbox" in names:
            boxes = torch.tensor([1, 2, 3, 4]).repeat(BATCH, LENGTH, 1)
            yield {**text, "bbox": boxes}
            yield {**text, "bbox": boxes, "pixel_values": images}
    if "pixel_values" in names or main == "pixel_values":
        pixels = (images, torch.randn(BATCH, channels(config), IMAGE, IMAGE), frames, torch.randn(BATCH, 3, 224, 224))
        for value in pixels:
            yield {**with_text, "pixel_values": value}
        for value in pixels if "input_ids" in names else ():
            yield {"pixel_values": value}
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": frames}
    for flat, sides, pixel_name, grid_name in _patches_and_names(config, names):
        yield {pixel_name: flat.repeat(BATCH, 1), grid_name: torch.tensor([[1, *sides]] * BATCH)} | (
            {"merge_sizes": torch.tensor([1] * BATCH)} if "merge_sizes" in names else {}
        )
        yield {pixel_name: flat.repeat(BATCH, 1), grid_name: torch.tensor([sides] * BATCH)}
    if names & {"spatial_shapes", "pixel_position_ids"}:
        for flat, sides in patches(config):
            every = {
                "pixel_values": flat.repeat(BATCH, 1, 1),
                "pixel_attention_mask": torch.ones(BATCH, len(flat), dtype=torch.long),
                "spatial_shapes": torch.tensor([sides] * BATCH),
                "pixel_position_ids": positions(sides),
            }
            yield {**with_text, **{name: value for name, value in every.items() if name in names}}
    if main == "inputs":
        yield {"inputs": words(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
        yield {"inputs": images}
    if "flattened_patches" in names:
        flattened = torch.rand(BATCH, LENGTH, first_number(config, ("patch_embed_hidden_size",), 768) + 2)
        flattened[..., :2] = 1  # row and column
        yield {**with_text, "flattened_patches": flattened}
    yield from sound_inputs(config, names, with_text)


def words(batch=BATCH, length=LENGTH):
    return torch.randint(*WORDS, (batch, length))


def text_inputs(model, config):
    names = inspect.signature(model.forward).parameters
    tokens = words()
    if is_whole(getattr(config, "eos_token_id", None)):
        tokens[:, -1] = config.eos_token_id
    text = {"input_ids": tokens}
    if "attention_mask" in names:
        text["attention_mask"] = torch.ones_like(tokens)
    if "decoder_input_ids" in names and "SequenceClassification" not in type(model).__name__:
        text["decoder_input_ids"] = words()
    if "langs" in names and getattr(config, "use_lang_emb", False):
        text["langs"] = torch.zeros_like(tokens)
    return text


# Names for the number of frequencies.
BINS = ["num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "num_mels", "input_dim"]
BINS += ["input_size", "feature_size", "input_features_dim"]


def sound_inputs(config, names, with_text):
    if "spectrogram" in names:
        yield {"spectrogram": torch.randn(BATCH, 20, first_number(config, ("model_in_dim", "num_mel_bins"), 80))}
    if "input_features" in names:
        audio = part_named(config, "audio_config", "encoder_config", "speech_config", "audio_encoder_config", "encoder")
        mels = first_number(audio, BINS, 80)
        length = 2 * first_number(audio, ("max_source_positions",), 64)
        for shape in ((mels, length), (64, mels), (512, mels), (64, 160), (1, 1001, 64)):
            features = torch.randn(BATCH, *shape)
            yield {**with_text, "input_features": features}
            if "attention_mask" in names and "input_ids" not in names:
                mask = torch.ones(features.shape[:2], dtype=torch.long)
                yield {**with_text, "input_features": features, "attention_mask": mask}
    if "input_values" in names:
        bins, length = first_number(config, ("num_mel_bins",), 128), first_number(config, ("max_length",), 128)
        for value in (torch.randn(BATCH, 6000), torch.randn(BATCH, 1, 6000), torch.randn(BATCH, length, bins), words()):
            yield {**with_text, "input_values": value}
            yield {"input_values": value}


def image_text_inputs(model, config, text):
    """Text with as many image tokens as the model makes of one image a sample, which it is asked for."""
    names = set(inspect.signature(model.forward).parameters)
    token_names = (
        "image_token_id",
        "image_token_index",
        "media_token_index",
        "image_token",
        "media_placeholder_token_id",
    )
    token = first_number(config, token_names, None)
    encode = getattr(model, "get_image_features", None) or getattr(model.base_model, "get_image_features", None)
    if token is None or "pixel_values" not in names or encode is None:
        return
    height, width = image_sides(config)
    sizes = torch.tensor([[height, width]] * BATCH)
    ways = []
    for flat, sides in patches(config):
        ways.append({"pixel_values": flat.repeat(BATCH, 1), "image_grid_thw": torch.tensor([[1, *sides]] * BATCH)})
        ways.append({"pixel_values": flat.repeat(BATCH, 1), "image_grid_hws": torch.tensor([sides] * BATCH)})
        ways.append({"pixel_values": flat.repeat(BATCH, 1, 1), "image_position_ids": positions(sides)})
    for tiles in ((), (1,), (2,), (3,)):
        pixels = torch.randn(BATCH, *tiles, channels(config), height, width)
        ways += [{"pixel_values": pixels}, {"pixel_values": pixels, "image_sizes": sizes}]
    for images in ways:
        if not names.issuperset(images):
            continue
        try:
            with torch.no_grad():
                known = inspect.signature(encode).parameters
                made = encode(**{name: value for name, value in images.items() if name in known})
            made = getattr(made, "pooler_output", made)
            made = [part for part in made if torch.is_tensor(part)] if isinstance(made, (tuple, list)) else [made]
            each = sum(part.numel() // part.shape[-1] for part in made) // BATCH
        except Exception:  # noqa: BLE001 - not images that this model reads
            continue
        if not 0 < each <= 400:
            continue
        tokens = text["input_ids"]
        tokens = torch.cat([tokens[:, :2], torch.full((BATCH, each), token), tokens[:, 2:]], 1)
        where = (tokens == token).long()
        kinds = {name: where for name in ("mm_token_type_ids", "token_type_ids") if name in names}
        yield {**text, "input_ids": tokens, "attention_mask": torch.ones_like(tokens), **images, **kinds}


def first_number(config, names, default):
    """The first positive whole number under one of these names in a configuration or those within it."""
    for part in parts_of(config):
        for name in names:
            value = getattr(part, name, None)
            value = value[0] if are_whole(value) else value
            if is_whole(value) and value > 0:
                return value
    return default


def part_named(config, *names):
    return next((part for name in names if isinstance(part := getattr(config, name, None), PreTrainedConfig)), config)


def vision_part(config):
    return part_named(
        config, "vision_config", "encoder_config", "encoder", "backbone_config", "image_config", "vit_config"
    )


def image_sides(config):
    size = getattr(vision_part(config), "image_size", None) or getattr(config, "image_size", None)
    if are_whole(size):
        return size[0], size[-1]
    return (size, size) if is_whole(size) else (IMAGE, IMAGE)


def channels(config):
    names = ("num_channels", "in_channels", "in_chans", "image_channels")
    numbers = (getattr(part, name, None) for part in (vision_part(config), config) for name in names)
    return next((number for number in numbers if is_whole(number) and number < 16), 3)


def patches(config):
    """Images as flat patches, for models that read any resolution, and how many there are on each side."""
    vision = part_named(config, "vision_config")

    def number(*names):
        found = (getattr(vision, name, None) for name in names)
        return next((numbers_of(value)[0] for value in found if is_whole(value) or are_whole(value)), None)

    patch = number("patch_size", "spatial_patch_size")
    merge = number("spatial_merge_size") or 1
    width = channels(config) * (number("temporal_patch_size") or 1) * (patch or 0) ** 2
    return [(torch.randn(side * side, width), (side, side)) for side in (2 * merge, 4 * merge) if patch]


def _patches_and_names(config, names):
    """What `patches` gives, with the argument for it and that for the sides."""
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), None)
    pixel = next((name for name in ("hidden_states", "pixel_values", "hidden_state") if name in names), None)
    return [(flat, sides, pixel, grid) for flat, sides in patches(config)] if grid and pixel else []


def positions(sides):
    rows, columns = torch.meshgrid(torch.arange(sides[0]), torch.arange(sides[1]), indexing="ij")
    return torch.stack([rows, columns], -1).reshape(1, -1, 2).repeat(BATCH, 1, 1)


def what_is_missing(model, given):
    """Arguments that forward needs and were not made: words, masks and hidden states, by their names."""
    more = {}
    like = given.get("input_ids", given.get("decoder_input_ids"))
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.default is not parameter.empty or name in given or "VAR_" in parameter.kind.name:
            continue
        if name.endswith("input_ids"):
            more[name] = words() if like is None else words(*like.shape[:2])
        elif "features_mask" in name and "input_features" in given:
            more[name] = torch.ones(BATCH, max(given["input_features"].shape[1:]), dtype=torch.long)
        elif "mask" in name and like is not None:
            more[name] = torch.ones_like(like)
        elif name in ("encoder_hidden_states", "hidden_states", "inputs_embeds"):
            more[name] = torch.randn(BATCH, LENGTH, main_width(fields_of(model.config)))
    return more


def possible_labels(model, inputs):
    """Labels to try; the last are none: the loss is then made of what the model returns."""
    kind = type(model).__name__
    if "labels" in inspect.signature(model.forward).parameters:
        classes = torch.zeros(BATCH, dtype=torch.long)
        tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if re.search(r"(Sequence|Image|Audio|Video)Classification|XVector", kind):
            yield {"labels": classes}
        if re.search(r"CTC|RNNT|TDT", kind):
            yield {"labels": torch.full((BATCH, 3), 7)}
        if tokens is not None:
            yield {"labels": tokens.clone()}
        if "SemanticSegmentation" in kind and "pixel_values" in inputs:
            yield {"labels": classes[:, None, None].repeat(1, *inputs["pixel_values"].shape[-2:])}
    if "return_loss" in inspect.signature(model.forward).parameters:
        yield {"return_loss": True}
    yield {}


def loss_of(output):
    """The model's own loss; without one, the mean squares of all that it returns."""
    loss = getattr(output, "loss", None)
    if torch.is_tensor(loss) and loss.numel() and loss.requires_grad:
        return loss.float().mean()
    squares = [value.float().nan_to_num(0, 0, 0).clamp(-1e3, 1e3).square().mean() for value in _tensors(output)]
    return torch.stack(squares).sum()


def _tensors(value):
    """The tensors with gradients in an output."""
    if torch.is_tensor(value):
        return [value] if value.is_floating_point() and value.requires_grad and value.numel() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for one in values for tensor in _tensors(one)]
