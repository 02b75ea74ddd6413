"""tpu-inference's side: which arrays it computes with, and how chunks get there."""
