"""Polytropo: a user-level storage service for each tenant's containers."""

__version__ = "0.1.0"
