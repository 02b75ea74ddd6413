"""The other file format: config.json and directories of safetensors files."""
