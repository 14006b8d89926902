"""From counts to named figures."""
