"""The imperative shell around the ledger: its lock, its inbox, and doing what it decided."""
