"""Python SDK and load generator; imports nothing of the rest."""
