"""Our KV store inside other engines."""
