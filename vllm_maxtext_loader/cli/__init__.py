"""The command `vllm-maxtext`: arguments in, tables out."""
