"""Where a checkpoint is, what is in it, and how its arrays are read. Knows Orbax, knows no model."""
