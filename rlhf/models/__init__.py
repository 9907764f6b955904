"""Language models, the roles they play on a shared base, and what is read off their hidden states."""
