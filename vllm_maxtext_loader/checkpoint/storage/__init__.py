"""Paths, buckets, retries and stalled transfers."""
