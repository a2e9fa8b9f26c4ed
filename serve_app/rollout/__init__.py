"""Who gets which pipeline."""
