"""The bundled reference model: tokenizer, training data, training loop."""
