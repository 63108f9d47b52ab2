"""A model and the rooms above, run over items: records in memory and on disk."""
