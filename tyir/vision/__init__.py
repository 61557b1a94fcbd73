"""What a vision-language model makes of a picture's size: settings, grids, tokens; numbers only, no pixels."""
