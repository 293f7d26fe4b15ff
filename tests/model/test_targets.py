import re

import pytest
import torch
import transformers
from models import ARCHITECTURES, bert, gpt2, llama, segformer_config
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from hf_prune import Pruner, PruningConfig, TargetError
from hf_prune.model.anatomy import layer_classes
from hf_prune.model.layouts import LAYOUTS, Target, as_matrices, from_matrices
from hf_prune.model.names import named_parameters
from hf_prune.model.targets import find_targets, left_out_of, refuse_reparametrised


def names_of(targets):
    return [target.name for target in targets]


def each(template, parts, count=2):
    return [template.format(index=index, part=part) for index in range(count) for part in parts]


# What is pruned by default, in the model's order: name -> layout.
BERT_PARTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPECTED = {
    "bert": {"matrix": each("bert.encoder.layer.{index}.{part}.weight", BERT_PARTS)},
    "albert": {
        "matrix": each(
            "albert.encoder.albert_layer_groups.0.albert_layers.{index}.{part}.weight",
            ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"),
            count=1,
        )
    },
    "llama": {
        "matrix": each(
            "model.layers.{index}.{part}.weight",
            (
                *(f"self_attn.{part}" for part in ATTENTION_PARTS),
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ),
        )
    },
    "gpt2": {
        "transposed": each(
            "transformer.h.{index}.{part}.weight", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        )
    },
    "t5": {
        "matrix": [
            *each(
                "encoder.block.{index}.layer.{part}.weight",
                (
                    *(f"0.SelfAttention.{part}" for part in "qkvo"),
                    "1.DenseReluDense.wi",
                    "1.DenseReluDense.wo",
                ),
            ),
            *each(
                "decoder.block.{index}.layer.{part}.weight",
                (
                    *(f"0.SelfAttention.{part}" for part in "qkvo"),
                    *(f"1.EncDecAttention.{part}" for part in "qkvo"),
                    "2.DenseReluDense.wi",
                    "2.DenseReluDense.wo",
                ),
            ),
        ]
    },
    "mixtral": {
        "matrix": each("model.layers.{index}.self_attn.{part}.weight", ATTENTION_PARTS),
        "experts": each("model.layers.{index}.mlp.experts.{part}", ("gate_up_proj", "down_proj")),
    },
    "gpt_oss": {
        "matrix": each("model.layers.{index}.self_attn.{part}.weight", ATTENTION_PARTS),
        "experts_transposed": each("model.layers.{index}.mlp.experts.{part}", ("gate_up_proj", "down_proj")),
    },
    "vit": {
        "matrix": each(
            "vit.layers.{index}.{part}.weight",
            (*(f"attention.{part}" for part in ATTENTION_PARTS), "mlp.fc1", "mlp.fc2"),
        )
    },
    "resnet": {
        "convolution": [
            "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",
            "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight",
            "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
            "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight",
            "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight",
            "resnet.encoder.stages.1.layers.1.layer.0.convolution.weight",
            "resnet.encoder.stages.1.layers.1.layer.1.convolution.weight",
        ]
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_targets_are_the_weights_of_the_repeated_layers_and_nothing_else(name):
    found = find_targets(ARCHITECTURES[name].build())
    by_layout = {}
    for target in found:
        by_layout.setdefault(target.layout, []).append(target.name)
    assert by_layout == EXPECTED[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_have_the_parameters_shapes_and_order(name):
    model = ARCHITECTURES[name].build()
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    found = find_targets(model)
    assert names_of(found) == [key for key in shapes if key in set(names_of(found))]
    assert all(target.shape == shapes[target.name] for target in found)


def test_matrices_are_batch_out_in_for_every_layout():
    assert Target("linear", (6, 4), "matrix").matrices == (1, 6, 4)
    assert Target("conv1d", (4, 6), "transposed").matrices == (1, 6, 4)
    assert Target("conv2d", (6, 4, 3, 2), "convolution").matrices == (6, 6, 4)
    assert Target("experts", (5, 6, 4), "experts").matrices == (5, 6, 4)
    assert Target("experts", (5, 4, 6), "experts_transposed").matrices == (5, 6, 4)
    assert Target("anything", (2, 3, 4), "flat").matrices == (1, 1, 24)
    assert Target("anything", (2, 3, 4), "flat").weights == 24


LAYOUT_SHAPES = {
    "matrix": [(6, 4), (1, 1), (0, 4)],
    "transposed": [(4, 6), (1, 3)],
    "convolution": [(6, 4, 3), (6, 4, 3, 2), (6, 1, 1, 1)],
    "experts": [(5, 6, 4)],
    "experts_transposed": [(5, 4, 6)],
    "flat": [(7,), (2, 3, 4), ()],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_matrices_is_the_inverse_of_as_matrices(layout):
    for shape in LAYOUT_SHAPES[layout]:
        tensor = torch.arange(Target("t", shape, layout).weights).reshape(shape)
        matrices = as_matrices(tensor, layout)
        back = from_matrices(matrices, layout, shape)
        assert matrices.ndim == 3
        assert matrices.numel() == tensor.numel()
        assert torch.equal(back, tensor)
        assert back.is_contiguous()


def test_each_layout_puts_every_weight_at_its_output_and_input():
    linear = torch.arange(12).reshape(3, 4)
    kernel = torch.arange(48).reshape(2, 3, 4, 2)
    experts = torch.arange(24).reshape(2, 3, 4)
    assert as_matrices(linear, "matrix")[0, 2, 1] == linear[2, 1]
    assert as_matrices(linear, "transposed")[0, 2, 1] == linear[1, 2]
    assert as_matrices(kernel, "convolution")[2 * 3 + 1, 1, 2] == kernel[1, 2, 3, 1]
    assert as_matrices(experts, "experts")[1, 2, 3] == experts[1, 2, 3]
    assert as_matrices(experts, "experts_transposed")[1, 3, 2] == experts[1, 2, 3]


def test_matrices_are_views_so_that_nothing_is_copied():
    for layout, shape in (
        ("matrix", (6, 4)),
        ("transposed", (6, 4)),
        ("convolution", (6, 4, 3, 3)),
        ("experts", (5, 6, 4)),
        ("experts_transposed", (5, 6, 4)),
    ):
        tensor = torch.zeros(shape)
        assert as_matrices(tensor, layout).data_ptr() == tensor.data_ptr()


def test_a_zeroed_input_of_each_layout_makes_the_module_blind_to_that_input():
    """The layouts agree with what the modules compute: column i of the matrices is what meets input i."""
    convolution = nn.Conv1d(4, 3, 2)
    conv1d = transformers.pytorch_utils.Conv1D(3, 4)
    for module, layout, inputs in (
        (nn.Linear(4, 3), "matrix", torch.randn(5, 4)),
        (conv1d, "transposed", torch.randn(5, 4)),
        (convolution, "convolution", torch.randn(5, 4, 6)),
    ):
        with torch.no_grad():
            as_matrices(module.weight, layout)[..., 1] = 0
        changed = inputs.clone()
        changed[:, 1] += 1
        assert torch.equal(module(inputs), module(changed))


# ---- What is not pruned by default ----


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden):
        return self.dense(hidden)


class Stack(nn.Module):
    def __init__(self, block=Block, layers=2):
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(8, 8)


def test_linears_outside_a_stack_and_lists_of_bare_linears_are_not_targets():
    model = Stack()
    model.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model.projection = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.one = nn.Sequential(Block())
    model.unlike = nn.Sequential(Block(), nn.Sequential(nn.Linear(8, 8)))
    assert names_of(find_targets(model)) == ["layers.0.dense.weight", "layers.1.dense.weight"]


def test_a_sequential_of_like_modules_is_a_stack():
    model = nn.Sequential(Block(), Block(), Block())
    assert names_of(find_targets(model)) == ["0.dense.weight", "1.dense.weight", "2.dense.weight"]


@pytest.mark.parametrize("embedding_comes_first", [True, False])
def test_a_linear_that_shares_its_weight_with_an_embedding_is_not_a_target(embedding_comes_first):
    """Whichever of the two the shared parameter is named after."""
    model = Stack()
    if not embedding_comes_first:
        embedding = model.embed
        del model.embed
        model.embed = embedding
    model.layers[1].dense.weight = model.embed.weight
    assert ("embed.weight" in dict(model.named_parameters())) is embedding_comes_first
    assert names_of(find_targets(model)) == ["layers.0.dense.weight"]


def test_a_weight_tied_between_two_layers_is_one_target():
    model = Stack()
    model.layers[1].dense.weight = model.layers[0].dense.weight
    assert names_of(find_targets(model)) == ["layers.0.dense.weight"]
    assert names_of(find_targets(model, [r"layers\..*weight"])) == ["layers.0.dense.weight"]


def test_a_tied_language_model_head_is_no_target_under_either_of_its_names():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not [name for name in names_of(find_targets(model)) if "wte" in name or "lm_head" in name]


@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrised_weights_are_not_targets(normalise):
    model = Stack()
    normalise(model.layers[0].dense)
    assert names_of(find_targets(model)) == ["layers.1.dense.weight"]


def test_quantised_weights_are_not_targets_even_by_expression():
    model = Stack()
    model.layers[0].dense.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    assert names_of(find_targets(model)) == ["layers.1.dense.weight"]
    assert names_of(find_targets(model, [r"layers\..*weight"])) == ["layers.1.dense.weight"]


def test_frozen_weights_are_targets_where_nothing_is_trained():
    model = Stack().requires_grad_(False)
    assert names_of(find_targets(model)) == ["layers.0.dense.weight", "layers.1.dense.weight"]


def test_frozen_weights_beside_trained_ones_are_left_alone_unless_they_are_named():
    model = Stack()
    model.layers[0].requires_grad_(False)
    assert names_of(find_targets(model)) == ["layers.1.dense.weight"]
    assert left_out_of(model) == {"layers.0.dense.weight": "frozen", "head.weight": "outside the repeated layers"}
    assert names_of(find_targets(model, [r"layers\.0\..*weight"])) == ["layers.0.dense.weight"]


def test_what_is_left_out_by_default_has_a_reason():
    model = bert()
    assert left_out_of(model) == {
        "bert.pooler.dense.weight": "outside the repeated layers",
        "classifier.weight": "task head",
    }


def test_attention_weights_with_heads_are_targets():
    """XLNet's are parameters of three dimensions: (width, heads, width of a head)."""
    model = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=24)
    )
    found = {target.name: target.shape for target in find_targets(model)}
    for letter in "qkvor":
        assert found[f"transformer.layer.1.rel_attn.{letter}"] == (16, 2, 8)
    assert not [name for name in found if "bias" in name or "seg_embed" in name]


# ---- Layers whose weight is computed ----


def pruned_by_torch(layer):
    l1_unstructured(layer, "weight", 0.3)


WAV2VEC2 = transformers.Wav2Vec2Config(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    conv_dim=[8],
    conv_kernel=[2],
    conv_stride=[2],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=8,
)

REPARAMETRISED = {
    "prune": (pruned_by_torch, r"torch\.nn\.utils\.prune\.remove\(module, 'weight'\)"),
    "old weight norm": (torch.nn.utils.weight_norm, "remove_weight_norm"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
    "weight norm": (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", REPARAMETRISED)
def test_a_layer_whose_weight_is_computed_is_refused_with_what_to_call(way):
    reparametrise, call = REPARAMETRISED[way]
    for model, name in ((bert(), r"bert\.encoder\.layer\.1\.output\.dense"), (Stack(), r"layers\.0\.dense")):
        reparametrise(dict(model.named_modules())[name.replace("\\", "")])
        with pytest.raises(TargetError, match=f"{name}\\.weight: expected a weight of its own.*call .*{call}"):
            refuse_reparametrised(model)


def test_any_tensor_of_a_saved_model_that_is_computed_is_refused_and_named():
    """The classifier and a bias would be missing from the saved file, though neither is pruned."""
    model = transformers.Wav2Vec2ForSequenceClassification(WAV2VEC2)
    refuse_reparametrised(model)  # its class has weight norm in a convolution
    l1_unstructured(model.classifier, "weight", 0.3)
    with pytest.raises(TargetError, match=r"^classifier\.weight: .*prune\.remove\(module, 'weight'\)"):
        refuse_reparametrised(model)
    model = bert()
    l1_unstructured(model.bert.encoder.layer[0].output.dense, "bias", 3)
    with pytest.raises(TargetError, match=r"output\.dense\.bias: .*prune\.remove\(module, 'bias'\)"):
        refuse_reparametrised(model)


def test_a_compiled_part_of_a_model_is_refused_and_one_compiled_in_place_is_not():
    model = bert()
    model.bert.encoder.layer[0].compile(backend="eager")
    refuse_reparametrised(model)
    refuse_reparametrised(torch.compile(model, backend="eager"))
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    with pytest.raises(TargetError, match=r"bert\.encoder\.layer\.1: is wrapped by torch\.compile"):
        refuse_reparametrised(model)


def test_layers_that_the_models_own_class_reparametrises_are_left_out():
    config = transformers.EncodecConfig(
        hidden_size=8,
        num_filters=4,
        num_residual_layers=1,
        upsampling_ratios=[2, 2],
        num_lstm_layers=1,
        codebook_size=8,
    )
    model = transformers.EncodecModel(config)
    refuse_reparametrised(model)
    norms = [path for path, module in model.named_modules() if nn.utils.parametrize.is_parametrized(module)]
    assert norms
    assert not [name for name in names_of(find_targets(model)) if name.removesuffix(".weight") in norms]


# ---- Names ----


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_tensor_is_known_by_each_of_its_names(tied):
    model = llama(tie_word_embeddings=tied)
    assert len(find_targets(model, exclude=[r"lm_head\.weight"])) == 14
    [target] = find_targets(model, [r"lm_head\.weight"])
    assert target.name == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert find_targets(model, [r"lm_head\.weight"], exclude=[r"lm_head\.weight"]) == []
    with pytest.raises(TargetError, match=r"the nearest is 'lm_head\.weight'"):
        find_targets(model, exclude=[r"lm_heads\.weight"])


def test_a_head_that_peft_trains_whole_has_the_name_of_the_plain_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    [target] = find_targets(model, [r"classifier\.weight"])
    parameters = dict(named_parameters(model))
    assert target.name == "classifier.weight"
    assert parameters["classifier.weight"].requires_grad


@pytest.mark.parametrize("dora", [False, True])
def test_base_layers_under_adapters_are_targets_and_the_adapters_are_not(dora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value"], use_dora=dora))
    assert names_of(find_targets(model)) == EXPECTED["bert"]["matrix"], "other names than those of the plain model"


def test_fused_experts_under_adapters_are_targets_and_the_adapters_are_not():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        ARCHITECTURES["mixtral"].build(),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    )
    found = {target.name: target.layout for target in find_targets(model)}
    assert len(found) == 12
    assert sum(layout == "experts" for layout in found.values()) == 4
    assert not [name for name in found if "lora" in name]


# A mixture-of-experts model's router chooses experts. Each entry: the model, its routers, and how many weights of
# experts and shared experts are targets (names that hold "expert").
MIXTURE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
}
ENCODER_DECODER_MIXTURE = {"vocab_size": 64, "d_model": 16, "num_experts": 4}


def qwen2_moe():
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=24))


def switch_transformers():
    config = transformers.SwitchTransformersConfig(
        **ENCODER_DECODER_MIXTURE,
        d_ff=24,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_moe():
    config = transformers.NllbMoeConfig(
        **ENCODER_DECODER_MIXTURE,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def llama4():
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**MIXTURE, intermediate_size_mlp=24))


def jetmoe():
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**MIXTURE, kv_channels=8))


@pytest.mark.parametrize(
    ("build", "routers", "experts"),
    [
        (qwen2_moe, r".*mlp\.(gate|shared_expert_gate)\.weight", 2 * (2 + 3)),
        (switch_transformers, r".*router\.classifier\.weight", 2 * 4 * 2),
        (nllb_moe, r".*router\.classifier\.weight", 2 * 4 * 2),
        (llama4, r".*feed_forward\.router\.weight", None),
        (jetmoe, r".*router\.layer\.weight", 2 * 2),
    ],
)
def test_routers_are_not_targets_while_experts_are(build, routers, experts):
    with torch.device("meta"):
        model = build()
    assert any(re.fullmatch(routers, name) for name, _ in model.named_parameters())
    found = names_of(find_targets(model))
    assert not [name for name in found if re.fullmatch(routers, name)]
    if experts is not None:
        assert len([name for name in found if "expert" in name and "decoder.block.0." not in name]) == experts


def test_layers_and_experts_of_classes_of_their_own_are_known_by_what_their_weight_looks_like():
    with torch.device("meta"):
        experts = {target.name: target for target in find_targets(jetmoe())}
        config = transformers.IBertConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
        linear = {target.name: target for target in find_targets(transformers.IBertForMaskedLM(config))}
    for name in ("mlp.input_linear", "mlp.output_linear", "self_attention.experts.input_linear"):
        assert experts[f"model.layers.0.{name}.weight"].layout == "experts"
    assert len(linear) == 6
    assert linear["ibert.encoder.layer.0.intermediate.dense.weight"].layout == "matrix"


def test_a_task_head_with_a_stack_of_its_own_is_not_a_target():
    with torch.device("meta"):
        model = transformers.SegformerForSemanticSegmentation(segformer_config())
    assert not [name for name in names_of(find_targets(model)) if name.startswith("decode_head.")]


# ---- Expressions ----


def test_targets_replace_the_default_and_must_match_the_whole_name():
    model = bert()
    assert names_of(find_targets(model, [r"bert\.pooler\.dense\.weight"])) == ["bert.pooler.dense.weight"]
    assert names_of(find_targets(model, [r".*\.query\.weight", "classifier.weight"])) == [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.1.attention.self.query.weight",
        "classifier.weight",
    ]
    with pytest.raises(TargetError, match=r"targets: 'bert' matches no parameter name"):
        find_targets(model, ["bert"])


def test_exclude_subtracts_from_the_default_and_from_targets():
    model = bert()
    without = [name for name in EXPECTED["bert"]["matrix"] if "layer.0" not in name]
    assert names_of(find_targets(model, exclude=[r"bert\.encoder\.layer\.0\..*"])) == without
    assert names_of(find_targets(model, [r".*query\.weight"], [r".*layer\.1.*"])) == [
        "bert.encoder.layer.0.attention.self.query.weight"
    ]


def test_exclude_must_match_the_whole_name_too():
    with pytest.raises(TargetError, match=r"exclude: 'query' matches no parameter name"):
        find_targets(bert(), exclude=["query"])


def test_an_expression_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(TargetError, match=r"targets: 'clasifier\\\\.weight'.*nearest is 'classifier.weight'"):
        find_targets(bert(), [r"clasifier\.weight"])
    with pytest.raises(
        TargetError, match=r"exclude: 'bert\.poolr\.dense\.weight'.*nearest is 'bert.pooler.dense.weight'"
    ):
        find_targets(bert(), exclude=["bert.poolr.dense.weight"])


def test_an_override_that_matches_no_target_is_an_error_with_the_nearest_name():
    config = PruningConfig(sparsity=0.5, overrides={"bert.encoder.layer.0.output.dens.weight": 0.1})
    with pytest.raises(TargetError, match=r"overrides: .*nearest is 'bert.encoder.layer.0.output.dense.weight'"):
        Pruner(bert(), config)
    with pytest.raises(TargetError, match=r"overrides: 'classifier.weight' matches no parameter name"):
        Pruner(bert(), PruningConfig(sparsity=0.5, overrides={"classifier.weight": 0.1}))


def test_a_broken_expression_is_an_error_that_says_so():
    with pytest.raises(TargetError, match=r"targets: '\(' is not a regular expression"):
        find_targets(bert(), ["("])


def test_vectors_are_targets_only_by_their_literal_name():
    model = bert()
    bias = "bert.encoder.layer.0.output.dense.bias"
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert names_of(find_targets(model, [".*"])) == matrices
    assert names_of(find_targets(model, [".*bias"])) == []
    assert find_targets(model, [bias]) == [Target(bias, (16,), "flat")]
    assert find_targets(model, [re.escape(bias)]) == [Target(bias, (16,), "flat")]


def test_tensors_of_unknown_orientation_are_flat_when_named():
    model = ARCHITECTURES["vit"].build()
    name = "vit.embeddings.position_embeddings"
    assert find_targets(model, [name]) == [Target(name, (1, 5, 16), "flat")]


# ---- Shapes that a pattern does not fit ----


@pytest.mark.parametrize(
    ("pattern", "name", "why"),
    [
        ("2:4", "model.layers.0.mlp.down_proj.weight", "input width 22 is not a multiple of 4"),
        ("block:4x1", "model.layers.0.mlp.gate_proj.weight", "22x16 matrix cannot be divided into 4x1 blocks"),
        ("block:1x4", "model.layers.0.mlp.down_proj.weight", "16x22 matrix cannot be divided into 1x4 blocks"),
    ],
)
def test_a_pattern_that_does_not_fit_names_the_tensor(pattern, name, why):
    sparsity = None if pattern == "2:4" else 0.5
    config = PruningConfig(sparsity=sparsity, pattern=pattern)
    with pytest.raises(TargetError, match=f"^{re.escape(name)}: .*{why}"):
        Pruner(llama(intermediate_size=22), config)
    Pruner(llama(intermediate_size=22), PruningConfig(sparsity=sparsity, pattern=pattern, exclude=[r".*\.mlp\..*"]))


@pytest.mark.parametrize("pattern", ["2:4", "block:1x2"])
def test_a_pattern_over_a_tensor_of_unknown_orientation_is_refused_by_name(pattern):
    sparsity = None if pattern == "2:4" else 0.5
    config = PruningConfig(sparsity=sparsity, pattern=pattern, targets=["classifier.bias"])
    with pytest.raises(TargetError, match=r"^classifier\.bias: .*input dimension is not known"):
        Pruner(bert(), config)


def test_groups_lie_along_the_input_of_a_transposed_weight():
    """GPT-2's c_attn is (in 16, out 48): 16 inputs divide into groups of 16, 48 outputs are never grouped."""
    assert Pruner(gpt2(), PruningConfig(pattern="8:16")).targets
    with pytest.raises(TargetError, match=r"c_attn\.weight: .*input width 16 is not a multiple of 48"):
        Pruner(gpt2(), PruningConfig(pattern="24:48"))


LAYERS = {
    "bert": "BertLayer",
    "albert": "AlbertLayerGroup",
    "llama": "LlamaDecoderLayer",
    "gpt2": "GPT2Block",
    "t5": "T5Block",
    "mixtral": "MixtralDecoderLayer",
    "gpt_oss": "GptOssDecoderLayer",
    "vit": "ViTLayer",
    "resnet": "ResNetStage",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_repeated_layers_are_the_outermost_ones(architecture):
    assert layer_classes(ARCHITECTURES[architecture].build()) == [LAYERS[architecture]]


def test_repeated_layers_in_lists_of_lists_are_the_layers_and_not_the_lists():
    layers = [nn.Sequential(nn.Linear(2, 2)) for _ in range(4)]
    model = nn.Module()
    model.lists = nn.ModuleList([nn.ModuleList(layers[:2]), nn.ModuleList(layers[2:])])
    assert layer_classes(model) == ["Sequential"]
    assert layer_classes(nn.Linear(2, 2)) == []
