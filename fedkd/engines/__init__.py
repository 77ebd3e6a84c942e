"""Engines train and question devices: ``serial`` one by one (the oracle), ``stacked`` many at once."""
