"""Diffusion of image and mask together: network, noise, and embedded prompts."""
