"""Language models, the roles they play on a shared base, and what is read off their hidden states."""


class ModelError(Exception):
    """A model or tokenizer that cannot be used as configured, explained in one sentence."""
