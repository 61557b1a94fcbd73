"""Pictures in: files to pixels, pixels to patches, positions, and where the tower's rows go."""
