"""Volumes: how nnU-Net plans and prepares them, their working files, and the samples that are cut from those."""
