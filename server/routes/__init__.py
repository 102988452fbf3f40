"""HTTP routes and the error envelopes."""
