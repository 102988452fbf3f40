"""The step loop: prefix lookup, restore, chunked prefill, store, batched decode."""
