"""What `tyir.pipeline` is made of: pipeline text, options, the registry, analyses, instruments and timing."""
