"""CLIP for segmentation (spec CLIP-CISS): image encoder, text table, class queries, attention decoder."""
