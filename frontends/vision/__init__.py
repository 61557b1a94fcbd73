"""Models that see pictures: towers at fixed sizes and language models with positions on several axes."""
