"""Other libraries' weights, as mappings of names to NumPy arrays; none of the libraries is imported."""
