"""vLLM's side: the plugin, the engine's arguments, the loader."""
