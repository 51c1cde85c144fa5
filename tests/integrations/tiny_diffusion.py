"""A Stable Diffusion model that trains in seconds, in folders named like the models of the hub."""

import json
from pathlib import Path
from types import ModuleType

import torch

WIDTH = 32  # the fewest channels that its group norms can have


def shrink(original_unet: ModuleType) -> None:
    """Give sd-scripts' U-Net, whose sizes are constants of its module, the sizes of this model."""
    original_unet.BLOCK_OUT_CHANNELS = (WIDTH,) * 4
    original_unet.TIMESTEP_INPUT_DIM = WIDTH
    original_unet.TIME_EMBED_DIM = 4 * WIDTH


def save_model(folder: Path, characters: str = "apicture") -> None:
    """Save a model with random weights, whose words consist of these characters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(each + "</w>" for each in characters)]
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(vocab_size=len(tokens), num_attention_heads=2, **sizes, **special)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    torch.manual_seed(0)
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text),
        unet=UNet2DConditionModel(32, block_out_channels=(WIDTH,) * 4, cross_attention_dim=WIDTH),
        vae=AutoencoderKL(
            block_out_channels=(WIDTH,) * 4, down_block_types=down, up_block_types=up, latent_channels=4
        ),
        scheduler=DDIMScheduler(),
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    tokenizer = folder / "openai" / "clip-vit-large-patch14"
    tokenizer.mkdir(parents=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 77}', encoding="utf-8")
