# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The pipeline classes that docs/pipelines.md lists as verified, written by `make matrix`.

For other classes `flowbp.verify` compares the user's own call, and the training scripts offer `--verify`.
"""

VERIFIED_PIPELINES = frozenset(
    """
    AnyFlowPipeline AuraFlowPipeline BriaFibo2Pipeline BriaFiboEditPipeline BriaFiboPipeline BriaPipeline
    ChromaImg2ImgPipeline ChromaInpaintPipeline ChromaPipeline ChronoEditPipeline CogView4ControlPipeline
    CogView4Pipeline Cosmos2_5_PredictBasePipeline Cosmos3OmniPipeline DreamLiteMobilePipeline DreamLitePipeline
    EasyAnimateInpaintPipeline EasyAnimatePipeline ErnieImagePipeline Flux2KleinInpaintPipeline Flux2KleinKVPipeline
    Flux2KleinPipeline Flux2Pipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline
    FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxControlNetPipeline FluxControlPipeline
    FluxFillPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline FluxKontextPipeline
    FluxPipeline GlmImagePipeline HeliosPipeline HiDreamImagePipeline HunyuanImagePipeline HunyuanImageRefinerPipeline
    HunyuanSkyreelsImageToVideoPipeline HunyuanVideo15ImageToVideoPipeline HunyuanVideo15Pipeline
    HunyuanVideoFramepackPipeline HunyuanVideoImageToVideoPipeline HunyuanVideoPipeline Ideogram4Pipeline
    JoyImageEditPipeline JoyImageEditPlusPipeline Kandinsky5I2IPipeline Kandinsky5I2VPipeline Kandinsky5T2IPipeline
    Kandinsky5T2VPipeline Kandinsky6TI2VAPipeline Krea2Pipeline LTX2DFRPipeline LTX2HDRPipeline LTXConditionPipeline
    LTXImageToVideoPipeline LTXPipeline LongCatImageEditPipeline LongCatImagePipeline LucyEditPipeline Lumina2Pipeline
    LuminaPipeline MochiPipeline MotifVideoImage2VideoPipeline MotifVideoPipeline NucleusMoEImagePipeline
    OmniGenPipeline OvisImagePipeline PRXPipeline PRXPixelPipeline QwenImage21Pipeline
    QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline QwenImageEditInpaintPipeline QwenImageEditPipeline
    QwenImageEditPlusPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline QwenImageLayeredPipeline
    QwenImagePipeline SanaControlNetPipeline SanaImageToVideoPipeline SanaPAGPipeline SanaPipeline SanaVideoPipeline
    SanaWMPipeline SkyReelsV2ImageToVideoPipeline SkyReelsV2Pipeline StableDiffusion3ControlNetInpaintingPipeline
    StableDiffusion3ControlNetPipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
    StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline StableDiffusion3Pipeline
    VisualClozeGenerationPipeline WanAnimatePipeline WanImageToVideoPipeline WanPipeline WanVACEPipeline
    WanVideoToVideoPipeline ZImageControlNetInpaintPipeline ZImageControlNetPipeline ZImageImg2ImgPipeline
    ZImageInpaintPipeline ZImageOmniPipeline ZImagePipeline
    """.split()
)
