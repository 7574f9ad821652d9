"""The vocab and tokens stages."""
