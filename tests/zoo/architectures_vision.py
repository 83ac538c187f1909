"""Vision: image and video classifiers, segmentation, depth, detection."""

from __future__ import annotations

import functools

from tests.zoo.build import Config, describe_architecture
from tests.zoo.entry import in_float64
from tests.zoo.inputs import image, image_with_class, image_with_map, video_with_class
from tests.zoo.shapes import IMAGE, LAYERS

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
WINDOWS |= {"window_size": 4}
STAGES = {"image_size": 32, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {
    "num_attention_heads": [1, 2, 2, 4],
    "strides": [4, 2, 2, 1],
    "sr_ratios": [2, 2, 1, 1],
    "mlp_ratios": [2, 2, 2, 2],
    "drop_path_rate": 0.1,
}
SEGFORMER = PYRAMID | {"decoder_hidden_size": 16, "num_labels": 3}
CVT = {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]}
DPT = IMAGE | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 16, 24]}
DPT |= {"fusion_hidden_size": 16, "num_labels": 3}
MAE = IMAGE | {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
MAE |= {"decoder_intermediate_size": 32}
LEVIT = {"image_size": 32, "patch_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4]}
LEVIT |= {"depths": [1, 1, 1], "key_dim": [4, 4, 4], "kernel_size": 3}
HIERA = {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "depths": [1, 1, 1]}
HIERA |= {"num_heads": [1, 2, 4], "masked_unit_size": [4, 4], "num_query_pool": 2, "patch_padding": [3, 3]}
HIERA |= {"masked_unit_attention": [True, False, False]}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"}
DETR: Config = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 5,
}
DETR |= {"backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage2"]}, "d_model": 32}
DETR |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
DETR |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}

vision = functools.partial(describe_architecture, "vision")

VISION = (
    vision("vit", "ViTForImageClassification", image_with_class, IMAGE | DROPOUT),
    vision("deit", "DeiTForImageClassification", image_with_class, IMAGE | DROPOUT),
    vision(
        "beit",
        "BeitForImageClassification",
        image_with_class,
        IMAGE | {"use_relative_position_bias": True, "drop_path_rate": 0.1},
        traits=["drop-path"],
    ),
    vision("swin", "SwinForImageClassification", image_with_class, WINDOWS, traits=["drop-path"]),
    vision("swinv2", "Swinv2ForImageClassification", image_with_class, WINDOWS, traits=["drop-path"]),
    vision(
        "convnext",
        "ConvNextForImageClassification",
        image_with_class,
        STAGES | {"layer_scale_init_value": 0.5, "drop_path_rate": 0.1},
        traits=["convolution", "drop-path"],
    ),
    vision("convnextv2", "ConvNextV2ForImageClassification", image_with_class, STAGES, traits=["convolution"]),
    vision("resnet", "ResNetForImageClassification", image_with_class, RESNET, traits=["convolution", "buffers"]),
    vision("segformer", "SegformerForSemanticSegmentation", image_with_map, SEGFORMER, traits=["drop-path", "buffers"]),
    vision(
        "dinov2",
        "Dinov2ForImageClassification",
        image_with_class,
        IMAGE | {"drop_path_rate": 0.1},
        traits=["drop-path"],
    ),
    vision(
        "pvt",
        "PvtForImageClassification",
        image_with_class,
        STAGES
        | {"sequence_reduction_ratios": [2, 2, 1, 1], "num_attention_heads": [1, 2, 2, 4], "drop_path_rate": 0.1},
        traits=["drop-path"],
    ),
    vision("pvt-v2", "PvtV2ForImageClassification", image_with_class, PYRAMID, traits=["drop-path"]),
    vision(
        "mobilevit",
        "MobileViTForImageClassification",
        image_with_class,
        {"image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 32]},
        traits=["convolution", "buffers"],
    ),
    in_float64(
        vision(
            "mobilenet-v2",
            "MobileNetV2ForImageClassification",
            image_with_class,
            {"image_size": 32, "depth_multiplier": 0.25},
            traits=["convolution", "buffers"],
        )
    ),
    vision(
        "efficientnet",
        "EfficientNetForImageClassification",
        image_with_class,
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
        | {"batch_norm_momentum": 0.1},
        traits=["convolution", "buffers"],
    ),
    vision(
        "regnet",
        "RegNetForImageClassification",
        image_with_class,
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "groups_width": 8},
        traits=["convolution", "buffers"],
    ),
    vision(
        "poolformer",
        "PoolFormerForImageClassification",
        image_with_class,
        STAGES | {"layer_scale_init_value": 0.5, "mlp_ratio": 2.0, "drop_path_rate": 0.1},
        traits=["convolution", "drop-path"],
    ),
    vision("cvt", "CvtForImageClassification", image_with_class, CVT, traits=["convolution", "drop-path", "buffers"]),
    in_float64(
        vision(
            "levit",
            "LevitForImageClassification",
            image_with_class,
            LEVIT,
            traits=["convolution", "buffers", "no-eval-backward"],
        )
    ),
    vision(
        "focalnet",
        "FocalNetForImageClassification",
        image_with_class,
        {"image_size": 32, "embed_dim": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [2, 2]}
        | {"focal_windows": [3, 3]},
        traits=["convolution", "drop-path"],
    ),
    vision("hiera", "HieraForImageClassification", image_with_class, HIERA),
    vision("vit-mae", "ViTMAEForPreTraining", image, MAE, traits=["rng"]),
    vision("yolos", "YolosForObjectDetection", image, IMAGE | {"image_size": [32, 32], "num_detection_tokens": 5}),
    vision("detr", "DetrForObjectDetection", image, DETR, traits=["convolution", "buffers"]),
    vision("dpt", "DPTForSemanticSegmentation", image_with_map, DPT, traits=["convolution"]),
    vision(
        "timesformer",
        "TimesformerForVideoClassification",
        video_with_class,
        LAYERS | {"image_size": 16, "patch_size": 8, "num_frames": 2},
    ),
)
