# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The pipeline classes that docs/pipelines.md lists as verified, written by `make matrix`.

For other classes `flowbp.verify` compares the user's own call, and the training scripts offer `--verify`.
"""

VERIFIED_PIPELINES = frozenset(
    """
    AuraFlowPipeline BriaFibo2Pipeline BriaFiboPipeline BriaPipeline ChromaPipeline CogView4Pipeline
    Cosmos2_5_PredictBasePipeline DreamLiteMobilePipeline DreamLitePipeline EasyAnimatePipeline ErnieImagePipeline
    Flux2KleinKVPipeline Flux2KleinPipeline Flux2Pipeline FluxKontextPipeline FluxPipeline GlmImagePipeline
    HeliosPipeline HiDreamImagePipeline HunyuanImagePipeline HunyuanVideo15Pipeline HunyuanVideoPipeline
    Ideogram4Pipeline Kandinsky5T2IPipeline Kandinsky5T2VPipeline Kandinsky6TI2VAPipeline Krea2Pipeline LTXPipeline
    LongCatImagePipeline Lumina2Pipeline LuminaPipeline MochiPipeline MotifVideoPipeline NucleusMoEImagePipeline
    OmniGenPipeline OvisImagePipeline PRXPipeline PRXPixelPipeline QwenImage21Pipeline QwenImagePipeline
    SanaPAGPipeline SanaPipeline SanaVideoPipeline SkyReelsV2Pipeline StableDiffusion3PAGPipeline
    StableDiffusion3Pipeline WanPipeline WanVACEPipeline ZImageOmniPipeline ZImagePipeline
    """.split()
)
