"""Writers of what a trained model answers: masks and tables."""
