"""What MaxText's leaves become under Hugging Face names. Knows the model, reads no bytes."""
