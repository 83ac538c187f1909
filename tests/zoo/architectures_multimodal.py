"""Text and images (or boxes) together: matching, captions, answers, documents."""

from __future__ import annotations

import functools

from tests.zoo.build import Config, describe_architecture
from tests.zoo.inputs import (
    IMAGE_TOKEN,
    captioned_image,
    document_with_class,
    image_and_text,
    image_in_text,
    image_with_answers,
    leave_out,
    placed_regions_with_class,
    regions_with_scores,
)
from tests.zoo.shapes import IMAGE, LAYERS, SPECIAL, TEXT

multimodal = functools.partial(describe_architecture, "multimodal")

PAIR = {"text_config": TEXT | SPECIAL, "vision_config": IMAGE, "projection_dim": 24}
BLIP = PAIR | {"text_config": TEXT | SPECIAL | {"sep_token_id": 2, "encoder_hidden_size": 32, "use_cache": False}}
FLAVA = {"hidden_size": 32, "projection_dim": 24, "text_config": TEXT, "image_config": IMAGE}
FLAVA |= {"multimodal_config": LAYERS}
GROUPVIT = {"text_config": TEXT | SPECIAL, "projection_dim": 24, "projection_intermediate_dim": 32}
GROUPVIT |= {
    "vision_config": IMAGE
    | {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0]}
    | {"num_output_groups": [8, 4, 4], "num_hidden_layers": 3}
}
LAYOUT = TEXT | {"coordinate_size": 6, "shape_size": 4, "input_size": 16, "patch_size": 8}
LLAVA: Config = {"text_config": TEXT | SPECIAL | {"model_type": "llama", "num_key_value_heads": 2, "use_cache": False}}
LLAVA |= {"vision_config": IMAGE | {"model_type": "clip_vision_model"}, "image_token_index": IMAGE_TOKEN}
LLAVA |= {"image_seq_length": 16}
LXMERT = TEXT | {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12, "num_qa_labels": 4}

MULTIMODAL = (
    multimodal("clip", "CLIPModel", image_and_text, PAIR, traits=["python-flag"]),
    multimodal("siglip", "SiglipModel", image_and_text, PAIR, traits=["python-flag"]),
    multimodal(
        "altclip",
        "AltCLIPModel",
        image_and_text,
        PAIR | {"text_config": TEXT | {"project_dim": 24}},
        traits=["python-flag"],
    ),
    multimodal("groupvit", "GroupViTModel", image_and_text, GROUPVIT, traits=["python-flag", "rng"]),
    multimodal("blip", "BlipForConditionalGeneration", captioned_image, BLIP, traits=["tied"]),
    multimodal("flava", "FlavaModel", leave_out(image_and_text, "return_loss"), FLAVA),
    multimodal("vilt", "ViltForQuestionAnswering", image_with_answers, TEXT | IMAGE, traits=["rng", "data-dependent"]),
    multimodal("layoutlmv3", "LayoutLMv3ForSequenceClassification", document_with_class, LAYOUT),
    multimodal(
        "visual-bert", "VisualBertForQuestionAnswering", regions_with_scores, TEXT | {"visual_embedding_dim": 12}
    ),
    multimodal("lxmert", "LxmertForQuestionAnswering", placed_regions_with_class, LXMERT),
    multimodal("git", "GitForCausalLM", captioned_image, TEXT | SPECIAL | {"vision_config": IMAGE, "use_cache": False}),
    multimodal("llava", "LlavaForConditionalGeneration", image_in_text, LLAVA, traits=["data-dependent"]),
)
