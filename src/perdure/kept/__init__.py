"""The ledger of what is kept of past data, and its audit."""
