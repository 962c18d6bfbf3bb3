"""timm's families as teachers, one small network of each: what serves as it is, and what is refused and why."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Teacher:
    """A network of timm, its layouts and default taps; `size`: of its square images, in pixels."""

    network: str
    layout: str = "BCHW"
    taps: str = "stages.0 stages.1 stages.2"
    size: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        return build(self.network, self.size, self.kwargs)

    def images(self, count: int = 2) -> Tensor:
        return images_of(self.size, count)


@dataclass(frozen=True)
class Refused:
    """A network whose default taps are refused, why (a regular expression, and in words), and taps that serve."""

    network: str
    reason: str
    words: str
    by_hand: str = ""
    size: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict)

    build, images = Teacher.build, Teacher.images


def build(network: str, size: int, kwargs: dict[str, Any]) -> nn.Module:
    """Seven classes, in evaluation mode, with logits that depend on the image.

    What timm starts at one number (heads and layer scales of zero) is not left at it. Batch norm has the statistics of
    sixteen images: with those of the start a deep network forgets its image, with those of four it is chaotic.
    """
    torch.manual_seed(0)
    teacher = timm.create_model(network, num_classes=7, **kwargs)
    norms = [module for module in teacher.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.numel() > 1 and parameter.std() < 1e-3:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in norms:
            module.momentum = 1.0
        if norms:
            teacher.train()(torch.randn(16, 3, size, size))
    return teacher.eval()


def images_of(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def at(size: int = 64, **kwargs: Any) -> dict[str, Any]:
    """Of networks that are built for one size of image."""
    return {"size": size, "kwargs": {"img_size": size, **kwargs}}


def vit(**kwargs: Any) -> dict[str, Any]:
    return at(embed_dim=32, num_heads=2, **kwargs)


LAYERS, RESNET = "layers.0 layers.1 layers.2", "layer1 layer2 layer3"
INVERTED = "blocks.0 blocks.1 blocks.2 blocks.4"  # inverted bottlenecks, as timm's EfficientNet builder numbers them
TWELVE = "blocks.2 blocks.5 blocks.8"  # of twelve blocks of one resolution
SMALL = {"depths": (1, 1, 2, 1)}
DIMS = {"embed_dim": (32, 32, 64, 64), **SMALL}
WINDOWS = {"embed_dim": 16, "num_heads": (1, 2, 2, 2), **SMALL}

TEACHERS = {
    "ResNet": Teacher("resnet18", taps=RESNET, kwargs={"channels": (8, 8, 16, 16)}),
    "ResNetV2": Teacher("resnetv2_18", kwargs={"channels": (16, 16, 32, 32)}),
    "SE-ResNet": Teacher("seresnet18", taps=RESNET, kwargs={"channels": (8, 8, 16, 16)}),
    "SENet": Teacher("legacy_seresnet18", taps=RESNET),
    "ResNeSt": Teacher("resnest14d", taps=RESNET),
    "SKNet": Teacher("skresnet18", taps=RESNET),
    "Res2Net": Teacher("res2net50_14w_8s", taps=RESNET, kwargs={"layers": (1, 1, 1, 1)}),
    "RegNetX": Teacher("regnetx_002", taps="s1 s2 s3"),
    "RegNetY": Teacher("regnety_002", taps="s1 s2 s3"),
    "RegNetZ": Teacher("regnetz_005", taps="s1 s2 s3"),
    "VGG": Teacher(
        "vgg11", taps="features.1 features.4 features.9 features.14 features.19", kwargs={"mlp_ratio": 0.01}
    ),
    "DenseNet": Teacher(
        "densenet121",
        taps="features.denseblock1 features.denseblock2 features.denseblock3",
        kwargs={"block_config": (2, 2, 2, 2), "growth_rate": 8},
    ),
    "RDNet": Teacher("rdnet_tiny", taps="dense_stages.0 dense_stages.1 dense_stages.5"),
    "EfficientNet": Teacher("efficientnet_b0", taps=INVERTED),
    "EfficientNet-Lite": Teacher("efficientnet_lite0", taps=INVERTED),
    "EfficientNetV2": Teacher("efficientnetv2_rw_t", taps=INVERTED),
    "MnasNet": Teacher("mnasnet_small", taps=INVERTED),
    "FBNet": Teacher("fbnetc_100", taps=INVERTED),
    "MixNet": Teacher("mixnet_s", taps=INVERTED),
    "TinyNet": Teacher("tinynet_e", taps=INVERTED),
    "HardCoRe-NAS": Teacher("hardcorenas_a", taps=INVERTED),
    "MobileNetV1": Teacher("mobilenetv1_100", taps="blocks.0 blocks.1 blocks.2 blocks.3"),
    "MobileNetV2": Teacher("mobilenetv2_035", taps=INVERTED),
    "MobileNetV3": Teacher("mobilenetv3_small_050", taps="blocks.0 blocks.1 blocks.3"),
    "MobileNetV4": Teacher("mobilenetv4_conv_small_035", taps="blocks.0 blocks.1 blocks.2"),
    "MobileNetV4 hybrid": Teacher("mobilenetv4_hybrid_medium", taps="blocks.0 blocks.1 blocks.2"),
    "MobileNetV5": Teacher("mobilenetv5_base", taps="blocks.0 blocks.1 blocks.2"),
    "LCNet": Teacher("lcnet_035", taps=INVERTED),
    "LCNetV2": Teacher("lcnetv2_small"),
    "RepVGG": Teacher("repvgg_a0"),
    "MobileOne": Teacher("mobileone_s0"),
    "GERNet": Teacher("gernet_s"),
    "GCResNeXt": Teacher("gcresnext26ts"),
    "BoTNet": Teacher("botnet26t_256", **at()),
    "LambdaResNet": Teacher("lambda_resnet26t"),
    "NFNet": Teacher("nfnet_l0"),
    "ReXNet": Teacher("rexnet_100", taps="features.0 features.2 features.4 features.10"),
    "TResNet": Teacher("tresnet_m", taps="body.layer1 body.layer2 body.layer3"),
    "VoVNet": Teacher("ese_vovnet19b_slim_dw"),
    "HGNet": Teacher("hgnetv2_b0"),
    "GhostNet": Teacher("ghostnet_050", taps="blocks.1 blocks.3 blocks.5"),
    "RepGhostNet": Teacher("repghostnet_050", taps="blocks.1 blocks.3 blocks.5"),
    "CSPNet": Teacher("cspresnet50"),
    "CS3DarkNet": Teacher("cs3darknet_s"),
    "DarkNet": Teacher("darknet17", taps="stages.0 stages.1 stages.2 stages.3"),
    "CSPNeXt": Teacher("cspnext_tiny"),
    "DLA": Teacher("dla46_c", taps="level1 level2 level3 level4"),
    "DPN": Teacher("dpn48b", taps="features.conv2_3 features.conv3_4 features.conv4_6"),
    "Inception v3": Teacher("inception_v3", taps="Conv2d_4a_3x3 Mixed_5d Mixed_6e", size=128),
    "Inception v4": Teacher("inception_v4", taps="features.2 features.3 features.9 features.17", size=128),
    "Inception-ResNet v2": Teacher("inception_resnet_v2", taps="conv2d_4a repeat repeat_1", size=128),
    "ConvNeXt": Teacher("convnext_atto", kwargs={"dims": (8, 16, 24, 32), **SMALL}),
    "ConvNeXtV2": Teacher("convnextv2_atto", kwargs={"dims": (8, 16, 24, 32), **SMALL}),
    "InceptionNeXt": Teacher("inception_next_atto"),
    "FasterNet": Teacher("fasternet_t0"),
    "StarNet": Teacher("starnet_s050"),
    "SHViT": Teacher("shvit_s1", taps="stages.0 stages.1"),
    "CSATv2": Teacher("csatv2"),
    "ConvMixer": Teacher("convmixer_768_32", taps="blocks.7 blocks.15 blocks.23"),
    "PoolFormer": Teacher("poolformer_s12"),
    "ConvFormer": Teacher("convformer_s18"),
    "CAFormer": Teacher("caformer_s18"),
    "EdgeNeXt": Teacher("edgenext_xx_small"),
    "RepViT": Teacher("repvit_m1"),
    "EfficientFormer": Teacher("efficientformer_l1", size=224),
    "EfficientFormerV2": Teacher("efficientformerv2_s0", **at()),
    "EfficientViT (MIT)": Teacher("efficientvit_b0"),
    "EfficientViT (MSRA)": Teacher("efficientvit_m0", taps="stages.0 stages.1", **at()),
    "FastViT": Teacher("fastvit_t8"),
    "MobileViT": Teacher("mobilevit_xxs", taps="stages.0 stages.1 stages.2 stages.3"),
    "MobileViTV2": Teacher("mobilevitv2_050", taps="stages.0 stages.1 stages.2 stages.3"),
    "SwiftFormer": Teacher("swiftformer_xs", **at()),
    "CPUBone": Teacher("cpubone_nano"),
    "LowFormer": Teacher("lowformer_b0"),
    "iFormer": Teacher("iformer_t"),
    "NextViT": Teacher("nextvit_small"),
    "PVTv2": Teacher("pvt_v2_b0"),
    "TinyViT": Teacher("tiny_vit_5m_224"),
    "DaViT": Teacher("davit_tiny", kwargs={"embed_dims": (32, 32, 64, 64), "num_heads": (2, 2, 4, 4), **SMALL}),
    "FocalNet": Teacher("focalnet_tiny_srf", taps=LAYERS),
    "GCViT": Teacher("gcvit_xxtiny", **at()),
    "NesT": Teacher("nest_tiny", taps="levels.0 levels.1", **at()),
    "MaxViT": Teacher("maxvit_tiny_tf_224", **at(stem_width=32, **DIMS)),
    "CoAtNet": Teacher("coatnet_0_rw_224", **at(stem_width=(16, 32), **DIMS)),
    "CoAtNeXt": Teacher("coatnext_nano_rw_224", **at()),
    "Visformer": Teacher("visformer_tiny", taps="stage2", **at()),
    "SwinV2-CR": Teacher("swinv2_cr_tiny_224", **at(embed_dim=32, num_heads=(1, 2, 4, 8), **SMALL)),
    "Swin": Teacher("swin_tiny_patch4_window7_224", "BHWC", LAYERS, **at(**WINDOWS)),
    "SwinV2": Teacher("swinv2_tiny_window8_256", "BHWC", LAYERS, **at(**WINDOWS)),
    "MambaOut": Teacher("test_mambaout", "BHWC"),
    "Sequencer2D": Teacher("sequencer2d_s", "BHWC", **at(layers=(1, 1, 1, 1))),
    "VOLO": Teacher("volo_d1_224", "BHWC", "network.0 network.2 network.3", **at()),
    "SAM ViT": Teacher("samvit_base_patch16", "BHWC", TWELVE, **vit()),
    "HieraDet": Teacher("sam2_hiera_tiny", "BHWC", "blocks.0 blocks.2 blocks.9", kwargs={"embed_dim": 32}),
    "ViT": Teacher("vit_tiny_patch16_224", "BNC+1", TWELVE, **vit()),
    "ViT with registers": Teacher("vit_medium_patch16_reg4_gap_256", "BNC+4", TWELVE, **vit()),
    "ViT on a ResNet": Teacher("vit_tiny_r_s16_p8_224", "BNC+1", TWELVE, **vit()),
    "ViT, relative positions": Teacher("vit_relpos_small_patch16_224", "BNC", TWELVE, **vit()),
    "ViTamin": Teacher("vitamin_small_224", "BNC", "blocks.2 blocks.6 blocks.9", **at()),
    "NaFlexViT": Teacher("naflexvit_base_patch16_gap", "BNC+4", TWELVE, kwargs={"embed_dim": 32, "num_heads": 2}),
    "DeiT": Teacher("deit_tiny_patch16_224", "BNC+1", TWELVE, **vit()),
    "DeiT, distilled": Teacher("deit_tiny_distilled_patch16_224", "BNC+2", TWELVE, **vit()),
    "DeiT III": Teacher("deit3_small_patch16_224", "BNC+1", TWELVE, **vit()),
    "BEiT": Teacher("beit_base_patch16_224", "BNC+1", TWELVE, **vit()),
    "EVA": Teacher("eva02_tiny_patch14_224", "BNC+1", TWELVE, **at(56, embed_dim=48, num_heads=3)),
    "CaiT": Teacher("cait_xxs24_224", "BNC", "blocks.5 blocks.11 blocks.17", **vit()),
    "XCiT": Teacher("xcit_nano_12_p16_224", "BNC", TWELVE, **vit()),
    "ConViT": Teacher("convit_tiny", "BNC", TWELVE, **vit()),
    "LeViT": Teacher("levit_128s", "BNC", "stages.0 stages.1", **at()),
    "MLP-Mixer": Teacher("mixer_s32_224", "BNC", "blocks.1 blocks.3 blocks.5", **at()),
    "gMixer": Teacher("gmixer_12_224", "BNC", TWELVE, **at()),
    "ResMLP": Teacher("resmlp_12_224", "BNC", TWELVE, **at()),
    "gMLP": Teacher("gmlp_ti16_224", "BNC", "blocks.6 blocks.14 blocks.21", **at()),
}
"""By family. The layout: "BNC+1" is tokens with one in front of the patches."""

QUICK = ["ResNet", "MobileNetV2", "CoAtNet", "MaxViT", "Swin", "ViT", "MLP-Mixer"]
"""One of each kind: ReLU maps, linear bottlenecks, convolutions with attention, channels last, tokens."""

RESIDUAL = "named inside of a residual, which goes around it"
NO_MODULE = "named by no module"
TUPLE = "yield more than one tensor"
ITS_OWN_BATCH = "reshapes its tokens by the number of images, so that no rows can be appended"

REFUSED = {
    "Hiera": Refused(
        "hiera_tiny_224",
        r"tap 'blocks.0' yields places \(256,\) in an order that is not the image's",
        "tokens in the order of its pooling, not of the image",
        kwargs={"img_size": 64, "embed_dim": 32, "num_heads": 1, "stages": (1, 1, 2, 1)},
    ),
    "PiT": Refused(
        "pit_ti_224",
        "tap 'transformers.0' yields a tuple",
        TUPLE,
        **at(),
    ),
    "EfficientViM": Refused("efficientvim_m1", "tap 'stages.0' yields a tuple", TUPLE),
    "TNT": Refused("tnt_s_patch16_224", "tap 'blocks.2' yields a tuple", TUPLE, **at()),
    "SelecSLS": Refused("selecsls42", "tap 'features.1' yields a list", TUPLE, "stem head.0"),
    "Twins": Refused("twins_svt_small", "tap 'block.0' is no module", NO_MODULE, **at()),
    "MViTv2": Refused("mvitv2_tiny", "tap 'block.0' is no module", NO_MODULE, **at()),
    "HRNet": Refused("hrnet_w18_small", "tap 'stage1' is no module", NO_MODULE, "layer1"),
    "Gemma 4 ViT": Refused(
        "gemma4_vit_167m",
        "tap 'blocks.2' is no module",
        NO_MODULE,
        "encoder.blocks.2 encoder.blocks.5 encoder.blocks.8",
        kwargs={"depth": 12, "embed_dim": 32, "num_heads": 2},
    ),
    "Qwen3 ViT": Refused(
        "qwen3_vit_88m",
        "tap 'encoder.blocks.2' takes no rows",
        ITS_OWN_BATCH,
        kwargs={"embed_dim": 32, "num_heads": 2},
    ),
    "DeepSeek ViT": Refused(
        "deepseek_vit_412m",
        "tap 'encoder.blocks.2' takes no rows",
        ITS_OWN_BATCH,
        size=84,
        kwargs={"depth": 12, "embed_dim": 32, "num_heads": 2},
    ),
    "CrossViT": Refused(
        "crossvit_tiny_240", "taps must differ", "two branches that share their blocks' names", size=240
    ),
    "CoaT": Refused("coat_tiny", "taps must differ", "parallel branches under one name", **at()),
    "CoaT-Lite": Refused(
        "coat_lite_tiny",
        "tap 'serial_blocks2' does not fire",
        "named by lists, which do not run themselves",
        **at(),
    ),
    "Xception": Refused(
        "legacy_xception", "tap 'block2.rep.0' is not a cut of Xception", RESIDUAL, "block1 block3 block12"
    ),
    "Xception, aligned": Refused(
        "xception41",
        "tap 'blocks.1.stack.act3' is not a cut of XceptionAligned",
        RESIDUAL,
        "blocks.1 blocks.2 blocks.11",
    ),
    "NASNet": Refused(
        "nasnetalarge", "tap 'cell_stem_1.conv_1x1.act' is not a cut", "cells read the two cells before them"
    ),
    "PNASNet": Refused(
        "pnasnet5large", "tap 'cell_stem_1.conv_1x1.act' is not a cut", "cells read the two cells before them"
    ),
}
