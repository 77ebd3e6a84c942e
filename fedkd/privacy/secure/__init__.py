"""Secure sums: the server learns the sum of the devices' integer vectors and nothing else. See ``protocol``."""
