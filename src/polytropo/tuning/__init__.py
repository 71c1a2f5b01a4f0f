"""Finding what is fastest on the machine at hand."""
