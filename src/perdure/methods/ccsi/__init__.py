"""CCSI: continual learning without old data, from images that the old network itself dreams up."""
