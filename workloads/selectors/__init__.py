"""Ways to decide which tokens of an offloaded KV cache a decode step reads, one per file."""
