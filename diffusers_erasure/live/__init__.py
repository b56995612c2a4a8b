"""What is on a pipeline now: attached, fused into its weights or an adapter, and what guards it."""
