"""Inversion: images optimised against a frozen network; what ccsi and ccsi_seg share."""
