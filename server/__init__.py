"""Aquifer's service: HTTP routes, engine, model adapters, settings, metrics, command line."""
