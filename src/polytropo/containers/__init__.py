"""Containers: programs in a root that the tenant's service shows, run by an OCI runtime."""
