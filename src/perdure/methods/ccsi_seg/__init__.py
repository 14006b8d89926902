"""Class impressions for segmentation: CCSI's idea carried over to masks. Ours; there is no published counterpart."""

from perdure.methods.ccsi_seg.method import CcsiSeg

__all__ = ["CcsiSeg"]
