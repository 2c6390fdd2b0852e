"""Base models: what a source means, fetching, checking, loading, NF4, and the cache of quantized bases."""
