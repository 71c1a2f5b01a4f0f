"""Polytropo's files in the terms of other programs."""
