"""Random operations on a mount and on a plain ext4 directory, compared after each step."""
