"""Class impressions for segmentation: CCSI's idea carried over to masks. Ours; there is no published counterpart."""
