"""Context-intensive tasks, scorers, evaluation."""
