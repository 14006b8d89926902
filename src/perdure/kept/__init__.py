"""The ledger of what is kept of past data, and the files that hold it."""
