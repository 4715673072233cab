"""ACE-Step small: its sizes are constants of ComfyUI, which this replaces in the process that imports it.

The server of the tests loads it as a custom node; nothing of ComfyUI's is edited.
"""

from functools import partial

import comfy.ldm.ace.model
import comfy.model_detection
import comfy.text_encoders.ace
from comfy.ldm.ace.vae import music_dcae_pipeline as pipeline

NODE_CLASS_MAPPINGS = {}

NETWORK = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "mlp_ratio": 2.0,
    "max_position": 256,
    "text_embedding_dim": 48,
    "lyric_encoder_vocab_size": 6693,  # As the tokenizer has it.
    "lyric_hidden_size": 64,
    "ssl_latent_dims": [16, 16],
}
LYRIC_ENCODER = {"output_size": 64, "attention_heads": 4, "linear_units": 128, "num_blocks": 1}
TEXT_ENCODER = {"d_model": 48, "d_kv": 12, "num_heads": 4, "d_ff": 96, "num_layers": 2, "vocab_size": 32}
AUTOENCODER = {
    "encoder_block_out_channels": [32] * 4,
    "decoder_block_out_channels": [32] * 4,
    "encoder_layers_per_block": [1] * 4,
    "decoder_layers_per_block": [1] * 4,
}
VOCODER = {"depths": [1] * 4, "dims": [32] * 4, "num_mels": 32, "upsample_initial_channel": 128}


class TextEncoder(comfy.text_encoders.ace.UMT5BaseModel):
    def __init__(self, *args, model_options=None, **kwargs):
        options = {**(model_options or {}), "model_name": "small", "small_model_config": TEXT_ENCODER}
        super().__init__(*args, model_options=options, **kwargs)


def detect(*args, of=comfy.model_detection.detect_unet_config, **kwargs):
    found = of(*args, **kwargs)
    return {**found, **NETWORK} if found and found.get("audio_model") == "ace" else found


comfy.model_detection.detect_unet_config = detect
comfy.ldm.ace.model.LyricEncoder = partial(comfy.ldm.ace.model.LyricEncoder, **LYRIC_ENCODER)
comfy.text_encoders.ace.UMT5BaseModel = TextEncoder
pipeline.AutoencoderDC = partial(pipeline.AutoencoderDC, **AUTOENCODER)
pipeline.ADaMoSHiFiGANV1 = partial(pipeline.ADaMoSHiFiGANV1, **VOCODER)
