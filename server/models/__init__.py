"""Adapters between Hugging Face decoders and the engine."""
