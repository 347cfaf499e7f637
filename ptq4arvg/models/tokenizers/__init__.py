"""Tokenizers: images to token ids and back."""

from ptq4arvg.models.tokenizers.maskgit_vqgan import MaskGitVQGAN, MaskGitVQGANConfig, to_uint8

__all__ = ["MaskGitVQGAN", "MaskGitVQGANConfig", "to_uint8"]
