"""The service through the command line: real mounts in a machine of their own."""
