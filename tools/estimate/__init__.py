"""`--plan`: what fits, from config.json alone."""
