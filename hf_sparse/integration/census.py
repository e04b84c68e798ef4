"""The census: which of transformers' model types convert, which are refused and why, and which were never tried.

``tests/integration/test_census.py`` proves every row by a tiny random model of the type (transformers 5.23).
"""

from dataclasses import dataclass

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

# by how they come to read longer inputs
WORKS: dict[str, str] = {
    "its rotary positions stay as they are or are scaled": (
        "afmoe apertus arcee aria_text axk1 bailing_hybrid beam bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 "
        "deepseek_v3 diffllama embedding_gemma2_text ernie4_5 ernie4_5_moe eurobert exaone4 exaone_moe flex_olmo "
        "flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm4v_text "
        "glm_image_text glm_ocr_text gpt_neox gpt_oss granite granite_docling_text granite_swa granitemoe "
        "granitemoe_swa granitemoeshared gte helium higgs_audio_v2 hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 "
        "hyperclovax internlm3 iquestcoder jais2 jetmoe jina_embeddings_v3 kolibri1 laguna lfm2 lfm2_moe lfm3 llama "
        "llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral "
        "ministral3 mistral mistral4 mixtral modernbert modernbert-decoder molmo2_text muse_glimmer_text "
        "muse_spark_text nanochat nemotron nomic_bert olmo olmo2 olmo3 olmoe openai_privacy_filter persimmon phi phi3 "
        "phimoe qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe "
        "qwen3_next qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 solar_open stablelm starcoder2 ultrabert "
        "vaultgemma youtu"
    ),
    "it keeps its own length": (
        "bert-generation biogpt blenderbot blenderbot-small clip_text_model ctrl esm gpt_bigcode inkling_text "
        "kimi_linear layoutlm m2m_100 nemotron_h nllb-moe roc_bert seamless_m4t seamless_m4t_v2 splinter "
        "tipsv2_text_model whisper"
    ),
    "a learned table of positions repeats or is stretched": (
        "albert bart bert camembert data2vec-text distilbert electra ernie gpt-sw3 gpt2 mbart mobilebert opt plbart "
        "roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl"
    ),
    "the positions of its patches are interpolated": "beit clip_vision_model deit dinov2 dinov2_with_registers vit",
    "its bias by distance has no end": "mt5 switch_transformers t5 umt5",
    "its table of sines goes on": "marian pegasus",
    "it is sparse itself, and is read as the dense type that it otherwise is": "big_bird bigbird_pegasus led longformer",
}

# by the reason
REFUSED: dict[str, str] = {
    "it is made of several models; each part may be one that works": (
        "aimv2 align altclip aria audioflamingo3 aya_vision bark blip blip-2 blt bridgetower canary chameleon "
        "chinese_clip clap clip clipseg clvp cohere2_vision cohere_asr cohere_compass conditional_detr cosmos3_edge "
        "cosmos3_omni csm d_fine dab-detr dbrx deepseek_ocr2 deepseek_vl deepseek_vl_hybrid deformable_detr deimv2 "
        "depth_pro detr dia diffusion_gemma dots3_note edgetam edgetam_video edgetam_vision_model embedding_gemma2 "
        "emu3 ernie4_5_vl_moe evolla exaone4_5 fast_vlm fastspeech2_conformer_with_hifigan flava florence2 "
        "fun_asr_nano fuyu gemma3 gemma3n gemma4 gemma4_unified git glm46v glm4v glm4v_moe glm5_next glm_image "
        "glm_ocr glmasr glmga got_ocr2 gradium_phonon_tts granite4_vision granite_docling granite_speech "
        "granite_speech5_ctc granite_speech_plus grounding-dino groupvit higgs_audio_v2_tokenizer hunyuan_vl "
        "hyperclovax_vision_v2 idefics idefics2 idefics3 inkling2 inkling_mm_model instructblip instructblipvideo "
        "internvl janus kimi_k25 kosmos-2 kosmos-2.5 kyutai_speech_to_text lasr_ctc lfm2_vl lfm3_vl lightglue "
        "lighton_ocr llama4 llava llava_next llava_next_video llava_onevision lw_detr mask2former maskformer "
        "metaclip_2 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 mllama "
        "mm-grounding-dino modernvbert molmo2 moonshine_streaming moshi moss_transcribe_diarize mpt muse_glimmer "
        "muse_spark musicflamingo musicgen musicgen_melody nemo_speechlm nemotron3_5_asr nemotron3_5_transcribe_audio "
        "nemotron3_diarization nemotron_asr_streaming neucodec omdet-turbo oneformer ovis2 owlv2 owlvit paddleocr_vl "
        "paligemma parakeet_ctc parakeet_rnnt parakeet_tdt pe_audio pe_audio_encoder pe_audio_video "
        "pe_audio_video_encoder pe_video pe_video_encoder perception_lm phi4_multimodal pi0 pocket_tts "
        "pp_doclayout_v3 pp_doclayout_v4 pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_medium_det "
        "pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl "
        "qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp "
        "rf_detr rt_detr rt_detr_v2 sam sam2 sam2_video sam2_vision_model sam3 sam3_lite_text sam3_tracker "
        "sam3_tracker_video sam3_video sam3_vision_model sam_hq sapiens2 siglip siglip2 smolvlm step3p7 t5gemma "
        "t5gemma2 t5gemma2_encoder table-transformer tipsv2 tvp ultravbert unlimited_ocr uvdoc vibevoice "
        "vibevoice_asr video_llama_3 video_llava videoprism vipllava vision-text-dual-encoder voxtral "
        "voxtral_realtime xclip xcodec xcodec2"
    ),
    "its attention does not go through the attention interface": (
        "autoformer bit bloom bros canine codegen convbert convnext convnextv2 cpmant cvt dac "
        "data2vec-vision deberta deberta-v2 dinat dinov3_convnext donut-swin dpr efficientnet encodec falcon "
        "falcon_mamba fastspeech2_conformer flaubert fnet focalnet fsmt funnel gemma3n_vision glpn gpt_neo "
        "gpt_neox_japanese gptj hgnet_v2 hiera ibert imagegpt layoutlmv2 layoutlmv3 levit lilt luke "
        "lxmert mamba mamba2 maskformer-swin megatron-bert mgp-str mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 "
        "mpnet mra mvp nystromformer openai-gpt perceiver poolformer prophetnet pvt pvt_v2 reformer regnet rembert "
        "resnet roformer rwkv seggpt sew-d speecht5 squeezebert swiftformer swin2sr swinv2 tapas textnet timesformer "
        "timm_backbone timm_wrapper univnet vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder "
        "vibevoice_acoustic_tokenizer_encoder vilt visual_bert vitdet vits wavlm xglm xlm xlnet xlstm yoso"
    ),
    "it reads something else than text or images of a known grid": (
        "aimv2_vision_model audio-spectrogram-transformer audioflamingo3_encoder chinese_clip_vision_model "
        "cohere_compass_vision cosmos3_edge_vision data2vec-audio dinov3_vit dpt exaone4_5_vision "
        "fun_asr_nano_encoder gemma4_vision glm4v_moe_vision glm4v_vision glm5_next_vision glm_image_vision "
        "glm_ocr_vision glmasr_encoder granite_docling_vision granite_speech5_encoder hubert hunyuan_vl_vision "
        "idefics3_vision ijepa informer inkling2_vision internvl_vision kimi_k25_vision lasr_encoder lfm3_vl_vision "
        "minicpm_ocr_vision minicpmv4_7_vision mlcd mlcd_vision_model moss_transcribe_diarize_audio "
        "muse_glimmer_vision muse_spark_vision nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio "
        "nemotron_asr_streaming_encoder neomme parakeet_encoder pixio pixtral qianfan_ocr_vision qwen2_5_vl_vision "
        "qwen2_audio_encoder qwen3_5_moe_vision qwen3_5_vision qwen3_asr_encoder qwen3_vl_moe_vision qwen3_vl_vision "
        "qwen4_exp_vision radio sam2_hiera_det_model sam3_vit_model sam_hq_vision_model sam_vision_model segformer "
        "sew siglip2_vision_model siglip_vision_model smolvlm_vision swin time_series_transformer tipsv2_vision_model "
        "udop unispeech unispeech-sat video_llama_3_vision videomae videoprism_vision_model vit_mae vit_msn vivit "
        "vjepa2 voxtral_encoder voxtral_realtime_encoder wav2vec2 wav2vec2-conformer yolos"
    ),
    "its config names no longest input": (
        "gemma3n_audio gemma4_audio glm_image_vqmodel muse_spark_audio patchtsmixer patchtst speech_to_text timesfm "
        "wav2vec2-bert"
    ),
    "some of its layers compute attention by themselves": "longt5 pegasus_x",
    "a tiny copy of it does not run with our mask and our attention": "doge dots3_note_text",
    "it has an attention mask of its own that sparse attention does not honour": "minimax_m3_vl_text",
    "wide open it does not say what its source says": "falcon_h1",
    "its positions do not begin at the first row of their table": "markuplm",
}

NOT_TRIED = "no tiny model of it could be made to try it on"


@dataclass(frozen=True)
class Row:
    """What becomes of one model type.

    Attributes:
        model_type: as config.json names it.
        status: "works", "refused" or "not tried".
        reason: how a type that works comes to read longer inputs, and why another does not work.
    """

    model_type: str
    status: str
    reason: str


def census() -> list[Row]:
    """Return what becomes of every model type of which transformers has a base model, by name."""
    rows = {name: Row(name, "works", reason) for reason, names in WORKS.items() for name in names.split()}
    rows |= {name: Row(name, "refused", reason) for reason, names in REFUSED.items() for name in names.split()}
    return [rows.get(name) or Row(name, "not tried", NOT_TRIED) for name in sorted(MODEL_MAPPING_NAMES)]
