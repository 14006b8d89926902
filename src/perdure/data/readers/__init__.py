"""One file a layout: how a data set on disk, or made on the fly, becomes cases."""
