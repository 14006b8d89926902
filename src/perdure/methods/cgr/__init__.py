"""CGR: a generator of image-mask pairs keeps the past, for itself and for the segmenter."""
