"""vLLM behind the engine seam. Importing this package imports neither vLLM nor torch."""
