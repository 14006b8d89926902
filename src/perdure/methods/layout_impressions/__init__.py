"""Class impressions for segmentation: CCSI's idea carried over to masks. Ours; there is no published counterpart."""

from perdure.methods.layout_impressions.method import LayoutImpressions

__all__ = ["LayoutImpressions"]
