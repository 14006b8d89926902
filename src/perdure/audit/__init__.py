"""The audit of a run folder: is anything in it that no ledger knows, or that must not be there?"""
