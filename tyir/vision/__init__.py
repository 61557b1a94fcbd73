"""What a vision-language model makes of a picture's size: settings, grids, tokens; no pixels."""
