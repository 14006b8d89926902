"""CLIP-CISS: class queries from text, masks from attention, kept by distillation alone."""
