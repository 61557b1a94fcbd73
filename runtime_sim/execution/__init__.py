"""Command programs executed on modelled memories."""
