"""One run from its configuration to its results: checked, built from the cache, trained, resumed."""
